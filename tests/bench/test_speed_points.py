"""The small scripts that publish a figure: each runs, prints it and writes its file."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner


def run(script: str, *arguments: str | Path) -> tuple[str, dict[str, Any]]:
    *_, out = arguments
    command = import_module(f"rt.bench.{script}").command
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (file,) = Path(out).iterdir()
    assert script.replace("_", "-") in file.name
    return result.stdout, json.loads(file.read_text())


def test_loop_overhead(tiny_bundle: Path, tmp_path: Path) -> None:
    quick = ("--steps", "2", "--warmup", "0", "--iterations", "2")
    printed, record = run("loop_overhead", tiny_bundle, tiny_bundle, *quick, "--out", tmp_path)
    assert printed.count("outside the engine") == 2
    assert [0 < result["loop"]["overhead_percent"] < 100 for result in record["results"]] == [True, True]
    assert all(result["calibration"]["before_gflops"] > 0 for result in record["results"])


def test_startup(tiny_bundle: Path, tmp_path: Path) -> None:
    printed, record = run("startup", tiny_bundle, "--steps", "1", "--rounds", "1", "--out", tmp_path)
    median = {name: samples["median_s"] for name, samples in record["processes"].items()}
    assert list(median) == ["interpreter", "import rt", "import rt.cli.run", "rt run"]
    assert median["rt run"] > sum(record["inside_rt_run"].values()) > 0
    assert all(name in printed for name in median)


def test_against_openvino(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    quick = ("--steps", "2", "--rounds", "2")
    printed, record = run("against_openvino", tiny_bundle, *quick, "--out", tmp_path)
    assert list(record["step"]) == ["by hand", "Engine.enqueue", "session step"]
    assert record["step"]["by hand"]["ratio"] == 1
    assert all(step["ratio"] > 0 and len(step["seconds"]) == 2 for step in record["step"].values())
    assert "session step" in printed


def test_by_hand_computes_what_the_engine_computes(tiny_bundle: Path) -> None:
    """The comparison is fair only when both run the same graph on the same inputs."""
    pytest.importorskip("openvino")
    import numpy as np

    from rt.bench.against_openvino import _by_hand, _graph
    from rt.bench.bundle import describe, find_profile
    from rt.model import Component
    from rt.pipeline import Pipeline

    pipe = Pipeline.from_bundle(tiny_bundle, backend="openvino")
    profile = find_profile(pipe.bundle)
    engine = pipe.engines.get(Component.UNET, profile, guided=True)
    rng = np.random.default_rng()
    for array in engine.inputs.values():
        array[...] = rng.standard_normal(array.shape)
    subject = describe(pipe, profile)
    results = _by_hand(_graph(pipe.bundle, profile), engine, subject.arithmetic, subject.threads)()
    engine.enqueue()
    np.testing.assert_allclose(results["prediction"], engine.outputs["prediction"], rtol=1e-4, atol=1e-4)
