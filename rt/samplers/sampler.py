"""What every sampler has: options with their defaults, a noise schedule and a spacing that follow from them.

A sampler is a frozen dataclass whose fields are the options of the diffusers class of the same name, with the
same defaults, so reading a scheduler_config.json is: take the keys that are fields. Options that shared code
reads are declared here as `absent`; a sampler that has one declares it again. An option that would take a run
out of the table (clipping is not linear), or is not implemented, is declared with the one value that works.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, TypeVar

from rt.errors import ConfigError, nearest, shown
from rt.samplers import spacing
from rt.samplers.noise_schedule import Floats, NoiseSchedule, betas
from rt.samplers.table import Schedule

S = TypeVar("S", bound="Sampler")

_MOST_TIMESTEPS = 100_000
_LARGEST = 2**31
"""Of a whole number: more has no meaning, and could not become a float."""
_FIRST = object()
_LISTS = ("trained_betas", "disable_corrector")


def choice(*valid: Any, default: Any = _FIRST, reads_as: Mapping[str, str] | None = None) -> Any:
    """An option that must be one of `valid`; `reads_as` maps the words of other samplers to these.

    The default is the first, or else the one of diffusers: where that one is not valid, it must be set.
    """
    default = valid[0] if default is _FIRST else default
    return field(default=default, metadata={"valid": valid, "reads_as": reads_as or {}})


def absent(value: Any) -> Any:
    """An option that this sampler does not have: configs do not reach it, code reads `value`."""
    return field(default=value, init=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """An algorithm with its options; `schedule` compiles it for a number of steps.

    Raises:
        ConfigError: an option has a value that the sampler does not support.
    """

    takes_timesteps: ClassVar[bool] = False
    """Whether the caller may list the timesteps."""
    terminal_alpha_cumprod: ClassVar[float] = 0.0
    """What zero terminal SNR leaves of the image at the last timestep."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = choice("linear", "scaled_linear", "squaredcos_cap_v2")
    trained_betas: Sequence[float] | None = None
    prediction_type: str = choice("epsilon", "v_prediction", "sample")

    rescale_betas_zero_snr: bool = absent(False)
    timestep_spacing: str = absent("linspace")
    steps_offset: int = absent(0)
    use_karras_sigmas: bool = absent(False)
    use_exponential_sigmas: bool = absent(False)
    use_lu_lambdas: bool = absent(False)
    sigma_min: float | None = absent(None)
    sigma_max: float | None = absent(None)
    final_sigmas_type: str = absent("zero")

    @classmethod
    def from_config(cls: type[S], config: Mapping[str, Any]) -> S:
        """The sampler with the keys of `config` that it knows; keys of other samplers are left.

        A null is the default, but for a switch, which it turns off.
        """
        read = {
            option.name: _read(option, config[option.name])
            for option in cls.options()
            if option.name in config
        }
        return cls(**{name: value for name, value in read.items() if value is not None})

    @classmethod
    def options(cls) -> list[Field[Any]]:
        """The options that a config can set."""
        return [f for f in fields(cls) if f.init]

    def __post_init__(self) -> None:
        for f in self.options():
            self._check(f, getattr(self, f.name))
        if not 2 <= self.num_train_timesteps <= _MOST_TIMESTEPS:
            raise ConfigError(
                f"num_train_timesteps got {shown(self.num_train_timesteps)}; expected 2 to {_MOST_TIMESTEPS:,}. "
                "Correct scheduler_config.json."
            )
        if not 0 <= (eta := getattr(self, "eta", 0)) <= 1:  # which DDIM and TCD have
            raise ConfigError(f"eta got {eta}; expected a number from 0 to 1. Correct scheduler_config.json.")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ConfigError(
                f"trained_betas has {len(self.trained_betas)} entries; expected num_train_timesteps = "
                f"{self.num_train_timesteps}. Correct scheduler_config.json."
            )
        for beta in (
            self.beta_start,
            self.beta_end,
            *([] if self.trained_betas is None else self.trained_betas),
        ):
            if not (isinstance(beta, Real) and 0 <= beta < 1):
                raise ConfigError(
                    f"beta_start, beta_end or trained_betas has {shown(beta)}; expected numbers from 0 to below 1. "
                    "Correct scheduler_config.json."
                )
        if self.use_karras_sigmas and self.use_exponential_sigmas:
            raise ConfigError(
                "more than one of use_karras_sigmas and use_exponential_sigmas is true; expected at most one. "
                "Set the other to false in scheduler_config.json."
            )

    def _check(self, option: Field[Any], value: Any) -> None:
        valid = option.metadata.get("valid")
        if valid is not None:
            fits = isinstance(value, str | bool | int | float | None) and value in valid
            close = nearest(value, valid) if isinstance(value, str) and isinstance(valid[0], str) else ""
            expected = " or ".join(map(repr, valid)) + close
            advice = "Choose another sampler, or set it so in the checkpoint's scheduler_config.json and build again"
        else:
            fits, expected = _fits(option, value)
            advice = "Correct scheduler_config.json"
        if not fits:
            raise ConfigError(
                f"{type(self).__name__}: {option.name} got {shown(value)}; expected {expected}. {advice}."
            )

    @property
    def level_spacing(self) -> str | None:
        """How noise levels are spaced, or None for a run that is spaced in timesteps."""
        if self.use_karras_sigmas:
            return "karras"
        if self.use_lu_lambdas:
            return "lu"
        return "exponential" if self.use_exponential_sigmas else None

    @property
    def noise(self) -> NoiseSchedule:
        """The forward process that the model was trained on."""
        variances = betas(
            self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end, self.trained_betas
        )
        return NoiseSchedule.from_betas(
            variances, zero_snr=self.rescale_betas_zero_snr, floor=self.terminal_alpha_cumprod
        )

    @abstractmethod
    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """The table for `steps` steps, or for the `timesteps` given where the sampler takes them."""

    def spaced(self, steps: int, *, clipped: int = 0, drop_last: bool = False) -> Floats:
        """`steps` timesteps in the sampler's spacing, noisiest first; `linspace` ones are not yet whole.

        Raises:
            ConfigError: They begin beyond the last timestep that the model was trained on.
        """
        t = spacing.timesteps(
            self.timestep_spacing,
            steps,
            self.num_train_timesteps,
            offset=self.steps_offset,
            clipped=clipped,
            drop_last=drop_last,
        )
        if t.max() > self.num_train_timesteps - 1:
            raise ConfigError(
                f"{type(self).__name__}: {steps} steps in {self.timestep_spacing!r} spacing start at timestep "
                f"{t.max():g}; expected at most {self.num_train_timesteps - 1}. Use fewer steps or another spacing."
            )
        return t


def _fits(option: Field[Any], value: Any) -> tuple[bool, str]:
    """Whether an option that is not a choice can have that value, and what it can have."""
    kind, got = type(option.default), type(value)
    if option.name in _LISTS:
        items = () if value is None else value
        return isinstance(items, list | tuple) and all(map(_is_number, items)), "a list of numbers"
    if option.default is None:
        return value is None or _is_number(value), "a number"
    if kind in (bool, int, float):
        same = got is kind or (got, kind) == (int, float)
        return same and (got is bool or _is_number(value)), f"a value like {option.default!r}"
    return True, ""


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST)


def _read(option: Field[Any], value: Any) -> Any:
    if value is None and type(option.default) is bool:
        return False
    reads_as = option.metadata.get("reads_as", {})
    return reads_as.get(value, value) if isinstance(value, str) else value
