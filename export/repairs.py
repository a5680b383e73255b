"""Old configs as diffusers' pipelines repair them when they are built.

The first repositories of Stable Diffusion were written before a few options existed, and their defaults are other
than what the models were trained with. Each pipeline of SD 1.x and 2.x mends its scheduler and its U-Net for that
(`__init__` of pipeline_stable_diffusion.py, …_img2img.py and …_inpaint.py); those of XL mend nothing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import schedulers
from packaging.version import InvalidVersion, Version

from rt.errors import CheckpointError, shown
from rt.samplers.scheduler import REPAIRED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Repair:
    """An option of schedulers, its right value, and which values are read as that."""

    option: str
    right: Any
    wrong: Callable[[Any], bool]


_STEPS_OFFSET = _Repair("steps_offset", 1, lambda value: value != 1)
_CLIP_SAMPLE = _Repair("clip_sample", False, lambda value: value is True)
_SKIP_PRK_STEPS = _Repair("skip_prk_steps", True, lambda value: value is False)
_REPAIRS = {
    "StableDiffusionPipeline": (_STEPS_OFFSET, _CLIP_SAMPLE),
    "StableDiffusionImg2ImgPipeline": (_STEPS_OFFSET, _CLIP_SAMPLE),
    "StableDiffusionInpaintPipeline": (_STEPS_OFFSET, _SKIP_PRK_STEPS),
}

_WHOLE_SIZE = 64
_SAYS_WHOLE_SIZE = Version("0.9.0.dev0")
"""The first version of diffusers whose `sample_size` is that of the latents; 0.2 wrote 32 for every model."""


def scheduler_config(index: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `pipe.scheduler.config` is in diffusers, of the values that `config` has or that were repaired.

    The class is the one that `model_index.json` names, the options are those of scheduler_config.json. A repaired
    option that `config` lacks is listed in `REPAIRED`: another class does not take it over.
    """
    defaulted = _list(config.get("_use_default_values"))
    ours = ("_use_default_values", REPAIRED)
    scheduler = {k: v for k, v in config.items() if k not in ours and k not in defaulted}
    if (named := _named(index)) is not None:
        if (own := scheduler.get("_class_name")) not in (None, named):
            logger.info(
                "%s: model_index.json names %s, scheduler_config.json %s: read as the former",
                where,
                shown(named),
                shown(own),
            )
        scheduler["_class_name"] = named

    options = {**_defaults(scheduler.get("_class_name")), **scheduler}
    repairs = [
        repair
        for repair in _REPAIRS.get(index["_class_name"], ())
        if repair.option in options and repair.wrong(options[repair.option])
    ]
    if repairs:
        logger.warning(
            "%s has an old scheduler_config.json, read as %s reads it: %s",
            where,
            index["_class_name"],
            ", ".join(
                f"{repair.option} {shown(repair.right)} instead of "
                + (shown(scheduler[repair.option]) if repair.option in scheduler else "none")
                for repair in repairs
            ),
        )
    if absent := [repair.option for repair in repairs if repair.option not in scheduler]:
        scheduler[REPAIRED] = absent
    return scheduler | {repair.option: repair.right for repair in repairs}


def sample_size(
    index: Mapping[str, Any], unet: Mapping[str, Any], size: int | list[int], where: str
) -> int | list[int]:
    """The size of the latents where the config of the U-Net says `size`: of diffusers below 0.9, a side below 64 is 64.

    Raises:
        CheckpointError: The U-Net's `_diffusers_version` is none, so that `size` could mean either.
    """
    old = index["_class_name"] in _REPAIRS and "_diffusers_version" in unet
    if not old or isinstance(size, list) or size >= _WHOLE_SIZE:
        return size
    try:
        written = Version(Version(unet["_diffusers_version"]).base_version)
    except (InvalidVersion, TypeError):
        raise CheckpointError(
            f"{where}: the U-Net's config has _diffusers_version {shown(unet['_diffusers_version'])}, expected "
            "one like '0.30.0': correct or remove it"
        ) from None
    if written >= _SAYS_WHOLE_SIZE:
        return size
    logger.warning(
        "%s has a U-Net config of diffusers %s, read as %s reads it: sample_size %d instead of %d",
        where,
        unet["_diffusers_version"],
        index["_class_name"],
        _WHOLE_SIZE,
        size,
    )
    return _WHOLE_SIZE


def _named(index: Mapping[str, Any]) -> str | None:
    """The class of the scheduler in `model_index.json`, with its library where that is not diffusers."""
    entry = index.get("scheduler")
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
        return None
    library, name = entry
    return name if library == "diffusers" else f"{library}.{name}"


def _defaults(name: object) -> dict[str, Any]:
    """The options of a scheduler of diffusers with their defaults; of any other class, none is known."""
    kind = getattr(schedulers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not isinstance(kind, type):
        return {}
    return {p.name: p.default for p in inspect.signature(kind).parameters.values()}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
