"""From a scheduler_config.json and a name to a sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from numbers import Real
from typing import Any

import numpy as np

from rt.errors import ConfigError, shown
from rt.samplers.ddim import DDIM
from rt.samplers.names import CLASSES, SAMPLERS, SLUGS, resolve, spaced
from rt.samplers.sampler import Sampler
from rt.samplers.spacing import AYS_SPACINGS, align_your_steps
from rt.samplers.table import Schedule
from rt.samplers.tcd import TCD
from rt.whole import is_whole

REPAIRED = "_repaired"
"""In a config: the options that it lacked and that diffusers' pipeline sets for its own class."""


@dataclass(frozen=True)
class Scheduler:
    """A sampler with its options, ready to be compiled for a number of steps."""

    sampler: Sampler
    align_your_steps: str | None = None
    """`ays` or `ays-sdxl` where the timesteps are Align Your Steps', which no option of a sampler says."""

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise ConfigError(f"sampler is {shown(self.sampler)}; use Scheduler.from_config(config, name)")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], name: str | None = None, *, spacing: str | None = None
    ) -> Scheduler:
        """The scheduler that a checkpoint asks for, or another one on the same noise schedule.

        A `name` means what `OtherScheduler.from_config(pipe.scheduler.config)` does in diffusers: options
        that the other class has carry over, and those that `config` lacks take the other class's defaults
        (except `clip_sample`, which is then false).
        What the name itself says is set: `dpmpp-2m` is dpmsolver++ of order 2, `pndm` has no warm-up, a
        suffix is a spacing of noise levels. What it does not say stays as in `config`, Karras included.

        Args:
            config: the contents of diffusers' scheduler_config.json, or what `ModelSpec.scheduler` made of them.
            name: a slug of `SAMPLERS` with or without suffix, a class of diffusers, or what the A1111 web UI or
                ComfyUI call it, see `rt.samplers.names`; by default the `_class_name` of `config`.
            spacing: one of `SPACINGS`, in place of all that `config` and `name` say about it.

        Raises:
            ConfigError: an unknown name or spacing, or an option that the sampler does not support.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"the scheduler's config is {shown(config)}; expected a mapping of its options")
        for what, value in (("sampler", name), ("spacing", spacing)):
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{what} is {shown(value)}; expected a name, or None")
        # Another class than the checkpoint's own takes its default for what diffusers' pipeline had repaired.
        lists = ("_use_default_values",) if name is None else ("_use_default_values", REPAIRED)
        defaulted: set[object] = set()
        for key in lists:
            if not isinstance(names := config.get(key, ()), list | tuple):
                raise ConfigError(f"{key} got {shown(names)}; expected a list of names.")
            defaulted.update(option for option in names if isinstance(option, str))
        asked = name if name is not None else config.get("_class_name")
        if not isinstance(asked, str):
            raise ConfigError(
                f"scheduler_config.json names no sampler: '_class_name' is {shown(asked)}; expected a class of "
                f"diffusers. Give a name, one of {', '.join(SAMPLERS)}."
            )
        config = {key: value for key, value in config.items() if key not in defaulted}
        if name is not None:
            # A checkpoint that says nothing of clipping was not made to be clipped, whatever the other class's
            # default is: latents go far beyond 1.
            config = {"clip_sample": False, **config}
        named, said = resolve(asked)
        spacing = said if spacing is None else spacing
        options = {**named.options, **({} if spacing is None else spaced(named.sampler, spacing))}
        return cls(
            named.sampler.from_config({**config, **options}), spacing if spacing in AYS_SPACINGS else None
        )

    @property
    def name(self) -> str:
        """Our slug with its suffix, or the class of diffusers where no slug says what its options do."""
        slug = self._slug()
        return slug + self._suffix() if slug else self._class_name

    @property
    def label(self) -> str:
        """The label of the A1111 web UI, for the metadata of an image, such as `DPM++ 2M Karras`."""
        slug = self._slug()
        base = SLUGS[slug].label if slug else self._class_name
        return base + (
            " Align Your Steps" if self.align_your_steps else self._suffix().replace("-", " ").title()
        )

    def schedule(
        self, num_inference_steps: int, *, timesteps: Sequence[int] | None = None, eta: float | None = None
    ) -> Schedule:
        """Compile for a number of steps.

        Args:
            num_inference_steps: steps; some samplers have two rows a step.
            timesteps: the timesteps themselves, falling, where the class of diffusers takes them.
            eta: of DDIM and TCD, from 0 to 1; their own when left out, which is 0 of DDIM and 0.3 of TCD. 0 says
                nothing to the others. `Pipeline` always says it, as pipelines of diffusers do, and by default 0.

        Raises:
            ConfigError: a number of steps, timesteps or eta that the sampler cannot run.
        """
        total = self.sampler.num_train_timesteps
        if not is_whole(num_inference_steps) or not 1 <= num_inference_steps <= total:
            raise ConfigError(
                f"num_inference_steps got {shown(num_inference_steps)}; expected a whole number from 1 to "
                f"{total}, the number of timesteps that the model was trained on."
            )
        sampler = self.sampler if eta is None else self._with_eta(eta)
        if timesteps is not None:
            timesteps = self._check(timesteps, int(num_inference_steps))
        elif self.align_your_steps is not None:
            timesteps = align_your_steps(self.align_your_steps, num_inference_steps, sampler.noise)
        with np.errstate(all="ignore"):  # λ is infinite at σ = 0; what must be finite is checked by Table
            return sampler.schedule(int(num_inference_steps), timesteps)

    @property
    def _class_name(self) -> str:
        """Of diffusers, which every sampler has but the one that is always its slug."""
        return next(name for name, kind in CLASSES.items() if kind is type(self.sampler))

    def _slug(self) -> str | None:
        for slug, entry in SLUGS.items():
            says = entry.options.items()
            if type(self.sampler) is entry.sampler and all(getattr(self.sampler, k) == v for k, v in says):
                return slug
        return None

    def _suffix(self) -> str:
        spacing = self.sampler.level_spacing
        return f"-{spacing}" if spacing in ("karras", "exponential") else ""

    def _with_eta(self, eta: float) -> Sampler:
        if not isinstance(eta, Real) or isinstance(eta, bool):
            raise ConfigError(f"{self.name}: eta got {shown(eta)}; expected a number from 0 to 1.")
        if not isinstance(self.sampler, DDIM | TCD):
            if eta == 0:
                return self.sampler
            raise ConfigError(f"{self.name}: eta got {shown(eta)}; only ddim and tcd have it. Leave it out.")
        if not 0 <= eta <= 1:
            raise ConfigError(f"{self.name}: eta got {shown(eta)}; expected a number from 0 to 1.")
        return replace(self.sampler, eta=float(eta))

    def _check(self, timesteps: Sequence[int], steps: int) -> list[int]:
        sampler, total = self.sampler, self.sampler.num_train_timesteps
        if not sampler.takes_timesteps:
            raise ConfigError(
                f"{self.name}: got timesteps, which it cannot take; expected a sampler that can: "
                f"{', '.join(slug for slug, entry in SLUGS.items() if entry.sampler.takes_timesteps)}."
            )
        if sampler.level_spacing is not None:
            raise ConfigError(
                f"{self.name}: got timesteps, but its noise levels are spaced already; expected one of the "
                "two. Give spacing='linspace' with the timesteps."
            )
        try:
            given = list(islice(timesteps, total + 1))
        except Exception:  # an object's own
            given = []
        whole = bool(given) and all(map(is_whole, given))
        if whole and len(given) != steps:
            raise ConfigError(
                f"{self.name}: got {len(given)} timesteps for {steps} steps; expected as many. "
                f"Use num_inference_steps={len(given)}."
            )
        falling = whole and all(later < earlier for earlier, later in pairwise(given))
        if not falling or not 0 <= given[-1] <= given[0] < total:
            raise ConfigError(
                f"{self.name}: timesteps got {shown(timesteps)}; expected each below the one before, "
                f"whole numbers from at most {total - 1} to at least 0."
            )
        return [int(step) for step in given]
