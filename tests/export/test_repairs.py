"""Old configs: what diffusers' pipelines make of them when they are built is what rt reads."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest

from rt.errors import CheckpointError, ConfigError
from rt.export.build import default_profiles
from rt.export.checkpoint import open_checkpoint
from rt.export.repairs import sample_size, scheduler_config
from rt.samplers import Scheduler
from rt.samplers.scheduler import REPAIRED

PIPELINES = [
    f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "XL", "XLImg2Img", "XLInpaint")
]
CLASSES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
]
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ABSENT = object()
VALUES = {
    "steps_offset": [ABSENT, 0, 1, 2, None, True],
    "clip_sample": [ABSENT, True, False, None],
    "skip_prk_steps": [ABSENT, True, False, None],
    "set_alpha_to_one": [ABSENT, True, False, None],
    "timestep_spacing": [ABSENT, "leading", "trailing"],
    "_use_default_values": [ABSENT, ["steps_offset"], ["clip_sample", "steps_offset", "beta_end"]],
}

Folder = Callable[..., Path]
Edit = Callable[..., None]


VERSIONS = [
    *("0.0.1", "0.2.2", "0.8.0.dev0", "0.8.1", "0.9.0.dev0", "0.9.0rc1", "0.10.2", "1!0.1", ABSENT),
]
# Names of ours and what they mean in diffusers.
OTHERS = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
}


def pipeline_of(name: str, scheduler: Any, unet: Any = None) -> Any:
    """A pipeline of diffusers that has only a scheduler, and perhaps the config of a U-Net."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if "XL" in name:
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, name)(scheduler=scheduler, unet=unet, **parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_schedulers_are_repaired_as_in_diffusers(pipeline: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    ran = 0
    for named, name in itertools.product(rng.sample(CLASSES, 6), (None, *OTHERS)):
        config: dict[str, Any] = {"_class_name": rng.choice(CLASSES), **NOISE}
        config |= {key: value for key in VALUES if (value := rng.choice(VALUES[key])) is not ABSENT}
        index = {"_class_name": pipeline, "scheduler": ["diffusers", named]}
        ours = scheduler_config(index, config, "x")
        try:
            theirs = pipeline_of(pipeline, getattr(diffusers, named).from_config(config)).scheduler
        except TypeError:
            continue  # null, where the class wants a number
        for key in set(ours) - {REPAIRED, "_class_name"}:
            assert ours[key] == theirs.config[key], (key, config)
        try:
            if name is not None:
                kind, options = OTHERS[name]
                theirs = getattr(diffusers, kind).from_config(theirs.config, **options)
            theirs.set_timesteps(20)
            got = Scheduler.from_config(ours, name).schedule(20).timesteps
        except (TypeError, ConfigError):
            continue  # as above, or what rt does not run, such as clipping
        np.testing.assert_allclose(got, theirs.timesteps, atol=0.01, err_msg=f"{named} {name} {config}")
        ran += 1
    assert ran


def test_a_switch_that_is_null_is_off() -> None:
    config = {"_class_name": "DDIMScheduler", **NOISE, "clip_sample": None, "set_alpha_to_one": None}
    assert not Scheduler.from_config(config).sampler.set_alpha_to_one  # type: ignore[attr-defined]
    assert not diffusers.DDIMScheduler.from_config(config).config.set_alpha_to_one


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (["diffusers", "DDIMScheduler"], "DDIMScheduler"),
        (["diffusers", "CosineDPMSolverMultistepScheduler"], "CosineDPMSolverMultistepScheduler"),
        (["my_schedulers", "DDIMScheduler"], "my_schedulers.DDIMScheduler"),
        ([None, None], "PNDMScheduler"),
        (["diffusers", 3], "PNDMScheduler"),
        ("DDIMScheduler", "PNDMScheduler"),
        ({}, "PNDMScheduler"),
        (ABSENT, "PNDMScheduler"),
    ],
)
def test_the_index_names_the_class(folder: Folder, edit_json: Edit, entry: Any, expected: str) -> None:
    root = folder()
    edit_json(root / "model_index.json", scheduler=None if entry is ABSENT else entry)
    assert open_checkpoint(str(root)).spec.scheduler["_class_name"] == expected


def test_a_config_without_a_class_is_read(folder: Folder, edit_json: Edit) -> None:
    root = folder()
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    edit_json(root / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert Scheduler.from_config(open_checkpoint(str(root)).spec.scheduler).name == "euler"


def test_repairs_are_said(caplog: pytest.LogCaptureFixture) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    with caplog.at_level(logging.INFO):
        scheduler_config(index, {"_class_name": "PNDMScheduler", "steps_offset": 0}, "model")
    assert caplog.messages == [
        "model: model_index.json names 'DDIMScheduler', scheduler_config.json 'PNDMScheduler': read as the former",
        "model has an old scheduler_config.json, read as StableDiffusionPipeline reads it: "
        "steps_offset 1 instead of 0, clip_sample False instead of none",
    ]
    caplog.clear()
    scheduler_config(index, {"steps_offset": 1, "clip_sample": False}, "model")
    assert not caplog.messages


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_sample_size_of_old_unets(pipeline: str) -> None:
    for size, version in itertools.product((8, 32, 63, 64, 96), VERSIONS):
        config = {"sample_size": size, "in_channels": 4}
        if version is not ABSENT:
            config["_diffusers_version"] = version
        unet = SimpleNamespace(config=diffusers.configuration_utils.FrozenDict(config), add_embedding=None)
        with contextlib.suppress(
            ValueError, AttributeError
        ):  # of a fake in place of a module, after the repair
            pipeline_of(pipeline, None, unet)
        wanted = getattr(unet, "_internal_dict", unet.config)["sample_size"]
        assert sample_size({"_class_name": pipeline}, config, size, "x") == wanted, (size, version)


@pytest.mark.parametrize("version", ["junk", "", 3, None, ["0.2.2"], "0.2.2 of mine"])
def test_a_version_that_is_none(version: Any) -> None:
    index, unet = {"_class_name": "StableDiffusionPipeline"}, {"_diffusers_version": version}
    with pytest.raises(CheckpointError, match=r"expected one like '0\.30\.0': correct or remove it"):
        sample_size(index, unet, 32, "x")
    assert sample_size(index, unet, 64, "x") == 64  # either way
    assert sample_size({"_class_name": "StableDiffusionXLPipeline"}, unet, 32, "x") == 32


def test_sample_size_of_two_sides(folder: Folder, edit_json: Edit) -> None:
    root = folder()
    edit_json(root / "unet" / "config.json", sample_size=[6, 10], _diffusers_version="0.2.2")
    checkpoint = open_checkpoint(str(root))
    assert checkpoint.spec.sample_size == [6, 10]
    assert [(p.height, p.width) for p in default_profiles(checkpoint)] == [(12, 20)]
    assert [(p.height, p.width) for p in default_profiles(checkpoint, width=[8])] == [(12, 8)]
    spec = checkpoint.spec
    assert type(spec).from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_sample_size_of_the_vae_where_the_unet_has_none(folder: Folder, edit_json: Edit) -> None:
    root = folder()
    edit_json(root / "unet" / "config.json", sample_size=None)
    edit_json(root / "vae" / "config.json", sample_size=[12, 20])
    assert open_checkpoint(str(root)).spec.sample_size == [6, 10]
