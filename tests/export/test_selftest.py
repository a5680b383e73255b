"""`rt doctor --selftest`: every engine that is here runs a network; what is wrong is said, and fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from rt.backends import BACKENDS, Backend, Form, get
from rt.backends.base import Availability
from rt.backends.ort_gpu import OnnxRuntimeCuda, OnnxRuntimeTensorRT
from rt.cli.doctor import command
from rt.config import DType
from rt.cuda.host import HostDevice
from rt.errors import AccuracyError, BackendError, BuildError, ConfigError
from rt.export import selftest as module
from rt.export.forms import Writer
from rt.export.selftest import Outcome, Probe, selftest


@pytest.mark.slow
def test_what_is_compiled_from_torch_agrees_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    [outcome] = outcomes(monkeypatch, "inductor-cpu")
    assert (outcome.result, outcome.dtype) == ("ok", "fp32"), outcome


@pytest.mark.slow
def test_every_engine_that_is_here_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # inductor compiles C++ for each format, which takes a minute.
    monkeypatch.setattr(module, "BACKENDS", {n: b for n, b in BACKENDS.items() if n != "inductor-cpu"})
    result = CliRunner().invoke(command, ["--selftest"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "everything for rt build" in line) + 2 :]
    passed = {tuple(line.split()[1:4]) for line in table if line.startswith("ok")}
    assert passed >= {("openvino", dtype, "onnx") for dtype in ("fp32", "fp16", "bf16")}
    assert passed >= {("onnxruntime", dtype, "onnx") for dtype in ("fp32", "fp16")}
    assert "no      onnxruntime          bf16" in result.output
    assert any(line.split()[1:2] == ["tensorrt"] for line in table), "it says whether it is there"
    assert all(len(line) <= 80 for line in table)


def outcomes(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Outcome]:
    """Of these backends alone, in fp32."""
    monkeypatch.setattr(module, "BACKENDS", {name: get(name) for name in names})
    monkeypatch.setattr(module, "FORMATS", (DType.FP32,))
    return list(selftest())


def test_onnx_runtime_on_a_gpu_is_run(gpu_ort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in, which computes as the processor does."""
    device = HostDevice()
    gpu_ort(device)
    for kind in (OnnxRuntimeCuda, OnnxRuntimeTensorRT):
        backend = kind(lambda: device)
        monkeypatch.setattr(backend, "available", lambda: Availability(version="1.31.1"))
        monkeypatch.setitem(BACKENDS, backend.name, backend)
    names = ("onnxruntime-cuda", "onnxruntime-tensorrt")
    monkeypatch.setattr(module, "BACKENDS", {name: get(name) for name in names})
    monkeypatch.setattr(module, "FORMATS", (DType.FP32, DType.FP16))
    found = {(one.backend, one.dtype): (one.result, one.form) for one in selftest()}
    assert found == {
        ("onnxruntime-cuda", "fp32"): ("ok", "onnx"),
        ("onnxruntime-cuda", "fp16"): ("ok", "onnx"),
        ("onnxruntime-tensorrt", "fp32"): ("no", ""),
        ("onnxruntime-tensorrt", "fp16"): ("ok", "onnx"),
    }
    assert device.in_use == 0


def test_a_wrong_engine_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(record: object, folder: object, backend: Backend) -> dict[str, float]:
        if backend.name == "openvino":
            raise AccuracyError("probe: far off")
        return {"prediction": 1e-7}

    monkeypatch.setattr(module, "check", check)
    monkeypatch.setattr(module, "BACKENDS", {name: get(name) for name in ("openvino", "onnxruntime")})
    monkeypatch.setattr(module, "FORMATS", (DType.FP32,))
    result = CliRunner().invoke(command, ["--selftest"])
    assert "FAILED  openvino             fp32  onnx               probe: far off" in result.output
    assert "ok      onnxruntime          fp32  onnx               1.0e-07 from torch" in result.output
    assert isinstance(result.exception, BackendError) and result.exception.exit_code == 1
    assert str(result.exception) == "the self-test found faults: openvino fp32 onnx"
    result = CliRunner().invoke(command, ["--selftest", "--json"])
    assert [entry["result"] for entry in json.loads(result.output)["selftest"]] == ["FAILED", "ok"]


def test_a_plan_that_cannot_run_here_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get("tensorrt-rtx")
    monkeypatch.setattr(backend, "available", lambda: Availability(version="1.7", problem="needs a GPU"))
    monkeypatch.setattr(
        module,
        "writer",
        lambda backend: Writer(check=lambda request: None, write=lambda *given: {Form.TENSORRT_RTX: "p"}),
    )
    [outcome] = outcomes(monkeypatch, "tensorrt-rtx")
    assert (outcome.result, outcome.form, outcome.detail) == (
        "built",
        "tensorrt-rtx.plan",
        "not run: needs a GPU",
    )
    assert not outcome.failed


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BuildError("no tactic"), "no tactic"),
        (MemoryError(), "out of memory"),
        (RuntimeError("g++ failed\nof that command"), "g++ failed"),
    ],
)
def test_a_plan_that_does_not_build_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def write(*given: object) -> dict[Form, str]:
        raise error

    monkeypatch.setattr(get("tensorrt"), "available", lambda: Availability(version="11.4"))
    monkeypatch.setattr(module, "writer", lambda backend: Writer(check=lambda request: None, write=write))
    [outcome] = outcomes(monkeypatch, "tensorrt")
    assert outcome.failed and outcome.detail == f"does not build: {reason}"


def test_what_this_machine_cannot_build_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(request: object) -> None:
        raise ConfigError("needs a GPU")

    monkeypatch.setattr(get("tensorrt"), "available", lambda: Availability(version="11.4"))
    monkeypatch.setattr(module, "writer", lambda backend: Writer(check=check))
    [outcome] = outcomes(monkeypatch, "tensorrt")
    assert (outcome.result, outcome.dtype, outcome.detail) == ("no", "fp32", "needs a GPU")


def test_what_is_not_installed_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        get("tensorrt"), "available", lambda: Availability(version=None, problem="not installed; run: pip")
    )
    [outcome] = outcomes(monkeypatch, "tensorrt")
    assert (outcome.result, outcome.failed) == ("no", False)
    assert outcome.lines() == [
        "no      tensorrt                                      not installed; run: pip"
    ]


def test_the_network_has_every_operator() -> None:
    """What is fused in it is tested in test_tensorrt_plugins."""
    x = torch.randn(1, 4, 16, 16)
    assert Probe()(x)[0].shape == x.shape
