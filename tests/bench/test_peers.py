"""The tiny random model through every peer that is installed: they compute the same thing."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rt.bench.peers.__main__ import command
from rt.bench.peers.checkpoint import diffusers_folder, weights_gib
from rt.bench.peers.inputs import draw, picture_size
from rt.bench.peers.once import make_once
from rt.export.checkpoint import open_checkpoint
from rt.model import Component

GENAI = find_spec("openvino_genai") is not None


@pytest.mark.slow
def test_the_peers_agree_on_the_tiny_model(tmp_path: Path, tiny_bundle: Path) -> None:
    names = ["rt", "diffusers fp32", "ONNX Runtime fp32", *(["openvino_genai bf16"] if GENAI else [])]
    arguments = ["synthetic:tiny", "--rt", f"rt={tiny_bundle}", *(f"--only={name}" for name in names)]
    arguments += ["--rounds", "1", "--pictures", "1", "--steps", "2", "--turn-seconds", "0"]
    result = CliRunner().invoke(
        command, [*arguments, "--work", str(tmp_path), "--out", str(tmp_path / "results")]
    )
    assert result.exit_code == 0, result.output
    [path] = (tmp_path / "results").iterdir()
    assert result.output.strip().endswith(str(path))
    peers = json.loads(path.read_text())["peers"]
    errors = {
        row["name"]: {
            measure: figure["error"] for measure, figure in row["figures"].items() if measure != "step"
        }
        for row in peers["rows"]
    }
    assert set(errors["diffusers fp32"].values()) == {0.0}
    for name in ("rt", "ONNX Runtime fp32"):
        assert set(errors[name]) == {"text", "unet", "vae", "picture"}
        assert max(errors[name].values()) < 1e-4, name
    assert max(errors["OpenVINO bf16"].values()) < 0.1
    if GENAI:
        assert errors["openvino_genai bf16"]["picture"] < 0.1
    assert peers["absent"] == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_folder("synthetic:tiny", tmp_path_factory.mktemp("work"))


def test_the_folder_has_the_weights_and_words_that_rt_compiles(folder: Path) -> None:
    ours, theirs = open_checkpoint("synthetic:tiny"), open_checkpoint(str(folder))
    for component in (Component.TEXT_ENCODER, Component.UNET, Component.VAE_DECODER):
        expected = ours.load(component).state_dict()
        found = theirs.load(component).state_dict()
        assert list(found) == list(expected)
        assert all(bool((found[name] == expected[name]).all()) for name in expected)
    tokenizers = [checkpoint.tokenizer(Component.TEXT_ENCODER) for checkpoint in (ours, theirs)]
    for prompt in ("a red heart", "", "Ünïcode 123!"):
        ids = [tokenizer(prompt).ids for tokenizer in tokenizers]
        assert np.array_equal(*ids)
    assert ours.spec == theirs.spec
    expected_bytes = sum(
        t.nbytes
        for c in (Component.TEXT_ENCODER, Component.UNET, Component.VAE_DECODER)
        for t in ours.load(c).state_dict().values()
    )
    assert weights_gib(folder) * 2**30 == pytest.approx(expected_bytes, rel=0.05)


def test_a_folder_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert diffusers_folder(str(folder), tmp_path) == folder
    assert not any(tmp_path.iterdir())


def test_inputs_have_the_shapes_of_the_model_and_come_from_the_seed(folder: Path) -> None:
    first, second = draw(folder, count=2, steps=7, seed=5)
    assert first.tokens.shape == (1, 77) and first.tokens.dtype == np.int64
    assert first.latents.shape == first.noise.shape == (1, 4, 16, 16) and first.latents.dtype == np.float32
    assert first.context.shape == (2, 77, 32)
    assert 1 <= first.timestep < 1000 and first.steps == 7
    assert not np.array_equal(first.latents, second.latents) and not np.array_equal(
        first.latents, first.noise
    )
    again, _ = draw(folder, count=2, steps=7, seed=5)
    assert np.array_equal(first.context, again.context)
    assert picture_size(folder) == 128


def test_a_folder_is_made_once_and_only_whole(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyError

    def write(folder: Path) -> None:
        (folder / "whole").touch()

    with pytest.raises(KeyError):
        make_once(tmp_path / "x", fail)
    assert not (tmp_path / "x").exists()
    assert [path.name for path in make_once(tmp_path / "x", write).iterdir()] == ["whole"]
    assert make_once(tmp_path / "x", fail) == tmp_path / "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthetic:sd51"], "Error: no synthetic:sd51 (did you mean 'sd21'?)"),
        (["synthetic:tiny", "--rt", "out/sd15"], "Error: 'out/sd15' is not a variant of rt"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(command, [*arguments, "--work", str(tmp_path), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith(message) and result.output.count("\n") == 1
