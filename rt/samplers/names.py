"""What samplers are called: here, in diffusers, in the A1111 web UI and in ComfyUI.

Case, spaces, underscores and hyphens do not matter, nor does k-diffusion's `k_` or `sample_` before a name; a word for
the spacing of the noise levels may follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rt.errors import ConfigError, nearest, shown
from rt.samplers.ddim import DDIM
from rt.samplers.ddpm import DDPM
from rt.samplers.deis import DEIS
from rt.samplers.dpm2 import DPM2, DPM2Ancestral
from rt.samplers.dpm_sde import DPM2SAncestral, DPMSolverSDE
from rt.samplers.dpm_solver import DPMSolverMultistep, DPMSolverSinglestep
from rt.samplers.euler import Euler, EulerAncestral
from rt.samplers.heun import Heun
from rt.samplers.lcm import LCM
from rt.samplers.lms import LMS
from rt.samplers.pndm import PNDM
from rt.samplers.sampler import Sampler
from rt.samplers.spacing import AYS_SPACINGS, TIMESTEP_SPACINGS
from rt.samplers.tcd import TCD
from rt.samplers.unipc import UniPC


@dataclass(frozen=True)
class Named:
    """A sampler, and what its name says of its options."""

    sampler: type[Sampler]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Slug(Named):
    """A name of ours, with the label of the A1111 web UI."""

    label: str
    about: str


def _slug(sampler: type[Sampler], label: str, about: str, **options: Any) -> Slug:
    return Slug(sampler, options, label, about)


_PP = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
SLUGS: Mapping[str, Slug] = {
    "ddim": _slug(DDIM, "DDIM", "first order, no noise (eta 0) to DDPM's (eta 1)"),
    "ddpm": _slug(DDPM, "DDPM", "ancestral sampling; wants hundreds of steps"),
    "pndm": _slug(
        PNDM, "PLMS", "linear multistep of order 4; one evaluation more than steps", skip_prk_steps=True
    ),
    "lms": _slug(LMS, "LMS", "linear multistep of order 4 over noise levels"),
    "euler": _slug(Euler, "Euler", "first order over noise levels"),
    "euler-a": _slug(EulerAncestral, "Euler a", "Euler with fresh noise each step"),
    "heun": _slug(Heun, "Heun", "second order; two evaluations a step"),
    "dpm2": _slug(DPM2, "DPM2", "second order through a midpoint; two evaluations a step"),
    "dpm2-a": _slug(DPM2Ancestral, "DPM2 a", "DPM2 with fresh noise each step"),
    "dpmpp-2m": _slug(DPMSolverMultistep, "DPM++ 2M", "second order multistep; 20 steps do", **_PP),
    "dpmpp-2m-sde": _slug(
        DPMSolverMultistep, "DPM++ 2M SDE", "DPM++ 2M with fresh noise", **_SDE, solver_type="midpoint"
    ),
    "dpmpp-2m-sde-heun": _slug(
        DPMSolverMultistep, "DPM++ 2M SDE Heun", "the same in Heun's form", **_SDE, solver_type="heun"
    ),
    "dpmpp-3m-sde": _slug(
        DPMSolverMultistep, "DPM++ 3M SDE", "third order, fresh noise", **_SDE | {"solver_order": 3}
    ),
    "dpmpp-sde": _slug(
        DPMSolverSDE, "DPM++ SDE", "second order along a Brownian path; two evaluations a step"
    ),
    "dpmpp-2s": _slug(DPMSolverSinglestep, "DPM++ 2S", "second order singlestep", **_PP),
    "dpmpp-2s-a": _slug(
        DPM2SAncestral, "DPM++ 2S a", "DPM++ 2S with fresh noise each step; two evaluations a step"
    ),
    "deis": _slug(DEIS, "DEIS", "exponential multistep over log noise levels"),
    "unipc": _slug(UniPC, "UniPC", "multistep predictor and corrector; 10 to 20 steps do"),
    "lcm": _slug(LCM, "LCM", "for consistency models; 2 to 8 steps"),
    "tcd": _slug(TCD, "TCD", "for trajectory consistency models; 2 to 8 steps, noise by eta"),
}
SAMPLERS: Mapping[str, str] = {slug: entry.about for slug, entry in SLUGS.items()}
"""Every sampler: slug to one line. Those over noise levels also take the suffix -karras or -exponential."""

CLASSES: Mapping[str, type[Sampler]] = {
    "DDIMScheduler": DDIM,
    "DDPMScheduler": DDPM,
    "PNDMScheduler": PNDM,
    "LMSDiscreteScheduler": LMS,
    "EulerDiscreteScheduler": Euler,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "HeunDiscreteScheduler": Heun,
    "KDPM2DiscreteScheduler": DPM2,
    "KDPM2AncestralDiscreteScheduler": DPM2Ancestral,
    "DPMSolverMultistepScheduler": DPMSolverMultistep,
    "DPMSolverSinglestepScheduler": DPMSolverSinglestep,
    "DPMSolverSDEScheduler": DPMSolverSDE,
    "DEISMultistepScheduler": DEIS,
    "UniPCMultistepScheduler": UniPC,
    "LCMScheduler": LCM,
    "TCDScheduler": TCD,
}
"""Of diffusers."""

_ALIASES: Mapping[str, str] = {
    "euler ancestral": "euler-a",
    "dpm 2 ancestral": "dpm2-a",
    "dpmpp 2m sde gpu": "dpmpp-2m-sde",
    "dpmpp 2m sde heun gpu": "dpmpp-2m-sde-heun",
    "dpmpp 3m sde gpu": "dpmpp-3m-sde",
    "dpmpp sde gpu": "dpmpp-sde",
    "dpmpp 2s ancestral": "dpmpp-2s-a",
}
_VARIANTS: Mapping[str, Named] = {
    "uni pc bh1": Named(UniPC, {"solver_type": "bh1"}),
    "uni pc bh2": Named(UniPC, {"solver_type": "bh2"}),
}
_SPACINGS: Mapping[str, str] = {
    "karras": "karras",
    "ka": "karras",
    "exponential": "exponential",
    "exp": "exponential",
    "align your steps": "ays",
    "ays": "ays",
    "ays sdxl": "ays-sdxl",
}
_PREFIXES = ("sample", "k")

_LACKING: Mapping[str, str] = {
    "dpm fast": "dpmpp-2m",
    "dpm adaptive": "dpmpp-2m",
    "dpm ad": "dpmpp-2m",
    "restart": "heun",
    "heunpp2": "heun",
    "exp heun 2 x0": "heun",
    "exp heun 2 x0 sde": "dpmpp-sde",
    "ipndm": "pndm",
    "ipndm v": "pndm",
    "ddim cfg++": "ddim",
    "euler cfg++": "euler",
    "euler ancestral cfg++": "euler-a",
    "dpmpp 2s ancestral cfg++": "dpmpp-2s-a",
    "dpmpp 2m cfg++": "dpmpp-2m",
    "res multistep": "dpmpp-2m",
    "res multistep cfg++": "dpmpp-2m",
    "res multistep ancestral": "dpmpp-2m-sde",
    "res multistep ancestral cfg++": "dpmpp-2m-sde",
    "gradient estimation": "euler",
    "gradient estimation cfg++": "euler",
    "er sde": "dpmpp-3m-sde",
    "seeds 2": "dpmpp-sde",
    "seeds 3": "dpmpp-3m-sde",
    "sa solver": "dpmpp-3m-sde",
    "sa solver pece": "dpmpp-3m-sde",
}
"""Samplers of A1111 and ComfyUI that are not here, and which of ours is nearest."""

_LACKING_SPACINGS: Mapping[str, str] = {
    "uniform": "linspace",
    "normal": "linspace",
    "simple": "trailing",
    "sgm uniform": "trailing",
    "ddim uniform": "leading",
    "linear quadratic": "trailing",
    "beta": "karras",
    "kl optimal": "karras",
    "polyexponential": "exponential",
}


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower().replace("++", "pp"))


def _keyed(names: Mapping[str, Any]) -> dict[str, Any]:
    return {_key(name): value for name, value in names.items()}


_NAMED: Mapping[str, Named] = {
    **_keyed({name: Named(sampler, {}) for name, sampler in CLASSES.items()}),
    **_keyed({entry.label: entry for entry in SLUGS.values()}),
    **_keyed(SLUGS),
    **_keyed({alias: SLUGS[slug] for alias, slug in _ALIASES.items()}),
    **_keyed(_VARIANTS),
}
# The longest first: one may end in another.
_SUFFIXES = sorted(_keyed(_SPACINGS).items(), key=lambda item: -len(item[0]))
_LACKING_KEYS: Mapping[str, str] = _keyed(_LACKING)
_LACKING_SUFFIXES = sorted(_keyed(_LACKING_SPACINGS).items(), key=lambda item: -len(item[0]))


def resolve(name: str) -> tuple[Named, str | None]:
    """The sampler of a name, and the spacing that the name says.

    Raises:
        ConfigError: There is none.
    """
    key = _key(name)
    if (named := _find(key)) is not None:
        return named, None
    if (found := _spaced(key, _SUFFIXES)) is not None:
        return found
    if (found := _spaced(key, _LACKING_SUFFIXES)) is not None:
        raise ConfigError(
            f"sampler {shown(name)} asks for a spacing that rt does not have; leave that word out, and give the "
            f"nearest with --spacing {found[1]} (spacing={found[1]!r})."
        )
    lacking = _LACKING_KEYS.get(_bare(key))
    if lacking is not None:
        unknown = f"rt does not have the sampler {shown(name)} (the nearest is {lacking!r})"
    else:
        written = name.strip().lower().replace("++", "pp").replace(" ", "-").replace("_", "-")
        unknown = f"unknown sampler {shown(name)}{nearest(written, SAMPLERS)}"
    raise ConfigError(
        f"{unknown}; expected one of {', '.join(SAMPLERS)} "
        "(those over noise levels also with -karras or -exponential), a name that A1111 or ComfyUI has for "
        "one of them, or a diffusers class name."
    )


def _find(key: str) -> Named | None:
    return _NAMED.get(key) or _NAMED.get(_bare(key))


def _spaced(key: str, suffixes: Sequence[tuple[str, str]]) -> tuple[Named, str] | None:
    """The sampler and the spacing of a key that ends in one of `suffixes`."""
    for suffix, spacing in suffixes:
        if key.endswith(suffix) and (named := _find(key.removesuffix(suffix))) is not None:
            return named, spacing
    return None


def _bare(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)


def spaced(sampler: type[Sampler], spacing: str) -> dict[str, Any]:
    """The options that put `spacing` in place of any other.

    Raises:
        ConfigError: The sampler does not have it.
    """
    has = {option.name for option in sampler.options()}
    valid = [
        *(TIMESTEP_SPACINGS if "timestep_spacing" in has else ()),
        *(kind for kind in ("karras", "exponential") if f"use_{kind}_sigmas" in has),
        *(AYS_SPACINGS if sampler.takes_timesteps else ()),
    ]
    if spacing not in valid:
        slug = next(slug for slug, entry in SLUGS.items() if entry.sampler is sampler)
        raise ConfigError(
            f"spacing got {shown(spacing)}{nearest(str(spacing), valid)}; expected for {slug}: "
            f"{', '.join(valid) or 'none'}. Leave it out, or choose another sampler."
        )
    options: dict[str, Any] = dict.fromkeys(
        ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"), False
    )
    if spacing in TIMESTEP_SPACINGS:
        options["timestep_spacing"] = spacing
    elif spacing not in AYS_SPACINGS:
        options[f"use_{spacing}_sigmas"] = True
    return options
