"""TensorRT's engines on a library that records, and what a machine without a GPU says."""

from __future__ import annotations

import ctypes
import gc
import weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rt.backends import AUTO, DeviceBackend, Form, choose, choose_target, get
from rt.backends import tensorrt as backend_module
from rt.backends.tensorrt import CLASSIC, RTX, Scratch, TensorRT, library
from rt.config import DType
from rt.cuda import probe
from rt.cuda.host import HostDevice
from rt.cuda.probe import NO_GPU, gpu_capability, gpu_problem
from rt.errors import BackendError, BackendUnavailableError, ConfigError
from rt.shapes import TensorSpec

X, Y = TensorSpec(name="x", shape=(2, 3)), TensorSpec(name="y", shape=(2, 3))
NBYTES = 2 * 3 * 4
TENSORS = (("x", "float32", (2, 3)), ("y", "float32", (2, 3)))


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def plan(fake_tensorrt: ModuleType, tmp_path: Path) -> Any:
    """`plan(needs=1024, name="a")`: a file that the fake library loads."""

    def write(needs: int = 1024, name: str = "a", tensors: Any = TENSORS) -> Path:
        path = tmp_path / f"{name}.tensorrt.plan"
        path.write_bytes(fake_tensorrt.Plan(tensors, needs).to_bytes())
        return path

    return write


def load(device: HostDevice, path: Path, backend: TensorRT | None = None) -> Any:
    return (backend or TensorRT(CLASSIC)).load_on(device, path, [X], [Y], dtype=DType.FP16)


def test_an_engine_is_bound_once_and_then_only_executed(trt: Any, device: HostDevice, plan: Any) -> None:
    engine, stream = load(device, plan()), device.create_stream()
    for _ in range(3):
        engine.enqueue(stream)
    assert trt.named("create_execution_context") == [("USER_MANAGED",)]
    assert trt.named("set_tensor_address") == [
        ("x", engine.inputs["x"].pointer),
        ("y", engine.outputs["y"].pointer),
    ]
    [(address, size)] = trt.named("set_device_memory")
    assert size == 1024 and address % 256 == 0
    assert trt.named("execute_async_v3") == [(stream,)] * 3
    engine.close()
    engine.close()
    device.destroy_stream(stream)
    assert device.in_use == 0


def test_engines_share_one_block_of_the_largest_size(trt: Any, device: HostDevice, plan: Any) -> None:
    backend, stream = TensorRT(CLASSIC), device.create_stream()
    engines = [load(device, plan(needs, str(needs)), backend) for needs in (512, 4096, 1024)]
    for engine in engines:
        engine.enqueue(stream)
    [first, *others] = trt.named("set_device_memory")
    assert first[1] == 4096 and others == [first, first]
    late = load(device, plan(8192, "late"), backend)
    late.enqueue(stream)
    assert trt.named("set_device_memory")[-1][1] == 8192
    engines[0].enqueue(stream)
    assert len(trt.named("set_device_memory")) == 4, "what a graph may have captured stays where it was"
    for engine in (*engines, late):
        engine.close()
    device.destroy_stream(stream)
    assert device.in_use == 0


def test_another_device_has_its_own_block(trt: Any, plan: Any) -> None:
    backend, here, there = TensorRT(CLASSIC), HostDevice(), HostDevice()
    for device in (here, there):
        load(device, plan(), backend).enqueue(device.create_stream())
    first, second = trt.named("set_device_memory")
    assert first != second


def test_a_released_scratch_begins_anew(device: HostDevice) -> None:
    scratch = Scratch(device)
    scratch.reserve(4096)
    assert scratch.block(100).nbytes == 4096
    scratch.release()
    scratch.reserve(512)
    assert scratch.block(512).nbytes == 512


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            (TENSORS[0], ("y", "float16", (2, 3))),
            r"has y as float16 \(2, 3\), the bundle as float32 \(2, 3\)",
        ),
        (
            (TENSORS[0], ("y", "float32", (2, 4))),
            r"has y as float32 \(2, 4\), the bundle as float32 \(2, 3\)",
        ),
    ],
)
def test_a_plan_of_another_program_is_refused(
    trt: Any, device: HostDevice, plan: Any, tensors: Any, message: str
) -> None:
    with pytest.raises(BackendError, match=message + ": build it again$"):
        load(device, plan(tensors=tensors))
    assert device.in_use == 0


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("deserialize", r"^tensorrt cannot load .*a\.tensorrt\.plan: deserialize went wrong$"),
        ("create_execution_context", r"^tensorrt cannot run .*: create_execution_context went wrong$"),
    ],
)
def test_a_plan_that_the_library_refuses(
    trt: Any, device: HostDevice, plan: Any, fails: str, message: str
) -> None:
    trt.fails = {fails}
    with pytest.raises(BackendError, match=message):
        load(device, plan())
    assert device.in_use == 0


def test_a_run_that_fails_says_why(trt: Any, device: HostDevice, plan: Any) -> None:
    engine = load(device, plan())
    trt.fails = {"execute_async_v3"}
    with pytest.raises(BackendError, match=r"^a\.tensorrt\.plan failed while running: execute_async_v3 went"):
        engine.enqueue(device.create_stream())


def test_seen_from_the_host_it_computes_and_gives_its_device_back(trt: Any, plan: Any) -> None:
    device = HostDevice()

    def double(addresses: dict[str, int]) -> None:
        def work() -> None:
            x, y = (
                np.ctypeslib.as_array((ctypes.c_float * 6).from_address(addresses[name]))
                for name in ("x", "y")
            )
            y[...] = 2 * x

        device.run("double", work, stream)

    engine = TensorRT(CLASSIC, lambda: device).load(plan(), [X], [Y], dtype=DType.FP32, threads=1)
    stream = engine._stream
    trt.run = double
    engine.inputs["x"][...] = np.arange(6).reshape(2, 3)
    engine.enqueue()
    np.testing.assert_array_equal(engine.outputs["y"], 2 * np.arange(6, dtype=np.float32).reshape(2, 3))
    del engine
    assert device.in_use == 0


def test_one_that_never_ran_gives_its_device_back_too(trt: Any, plan: Any) -> None:
    device = HostDevice()
    engine = TensorRT(CLASSIC, lambda: device).load(plan(), [X], [Y], dtype=DType.FP32, threads=1)
    engine.close()
    del engine
    assert device.in_use == 0


def test_an_engine_that_does_not_fit_gives_back_what_it_took(trt: Any, plan: Any) -> None:
    backend, device = TensorRT(CLASSIC), HostDevice(memory=2 * NBYTES - 1)
    with pytest.raises(MemoryError):
        load(device, plan(), backend)
    assert device.in_use == 0 and device.calls[-1].name == "free"
    assert device not in backend._scratch


def test_a_device_of_its_own_is_closed_when_nothing_loads(trt: Any, plan: Any) -> None:
    device = HostDevice(memory=NBYTES)
    with pytest.raises(MemoryError):
        TensorRT(CLASSIC, lambda: device).load(plan(), [X], [Y], dtype=DType.FP32, threads=1)
    assert device.in_use == 0 and device.calls[-1].name == "close"


def test_a_backend_does_not_keep_the_devices_of_the_past(trt: Any, plan: Any) -> None:
    backend, device = TensorRT(CLASSIC), HostDevice()
    engine = load(device, plan(), backend)
    past = weakref.ref(device)
    engine.close()
    del engine, device
    gc.collect()
    assert past() is None


@pytest.mark.parametrize("flavour", [CLASSIC, RTX], ids=lambda flavour: flavour.name)
def test_both_are_backends_of_a_device(flavour: Any) -> None:
    backend = get(flavour.name)
    assert isinstance(backend, DeviceBackend)
    assert backend.forms(DType.FP16) == (flavour.form,) and flavour.form.holds_weights
    assert [backend.arithmetic(dtype) for dtype in (DType.FP32, DType.FP16, DType.BF16)] == [
        "f32",
        "f16",
        "bf16",
    ]
    assert not any(map(backend.refuses, (DType.FP32, DType.FP16, DType.BF16)))
    assert "no zero points; use --fp16" in backend.refuses(DType.INT8)
    assert "no fp8 plans yet; use --fp16" in backend.refuses(DType.FP8)
    assert not Form.ONNX.holds_weights


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def find(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(backend_module, "version", find)


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    assert get("tensorrt").available().problem.startswith('not installed; run: pip install "tensorrt-cu13>=')
    with pytest.raises(BackendUnavailableError, match=r"^tensorrt-rtx: not installed; run: pip install"):
        choose_target("tensorrt-rtx", DType.FP16)


def test_what_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tensorrt="10.8.0.43")
    availability = get("tensorrt").available()
    assert availability.version is None
    assert availability.problem.startswith("10.8.0.43 is too old, rt needs 10.9; run: pip install")


def test_what_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tensorrt="11.4.0.106")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    availability = get("tensorrt").available()
    assert availability.version is None
    assert availability.problem.startswith("11.4.0.106 is installed but does not load: ")
    with pytest.raises(BackendUnavailableError, match=r"^tensorrt needs tensorrt, .*run: pip install"):
        library(CLASSIC)


def test_a_build_needs_no_gpu_and_a_run_does(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, **{"tensorrt-rtx": "1.7.1"})
    monkeypatch.setattr(backend_module, "gpu_problem", lambda: NO_GPU)
    assert choose_target("tensorrt-rtx", DType.FP16)[0] is get("tensorrt-rtx")
    with pytest.raises(BackendUnavailableError, match=f"^tensorrt-rtx: {NO_GPU}$"):
        choose("tensorrt-rtx", DType.FP16)
    with pytest.raises(ConfigError, match="tensorrt-rtx cannot run int8 graphs: "):
        choose_target("tensorrt-rtx", DType.INT8)
    backend, why = choose(AUTO, DType.FP32, "tensorrt-rtx")
    assert backend.name == "openvino" and f"not tensorrt-rtx ({NO_GPU})" in why
    assert "tensorrt (" not in why, "nobody asked for it"


def test_with_a_gpu_it_is_what_auto_takes(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tensorrt="11.4.0", openvino="2026.1")
    monkeypatch.setattr(backend_module, "gpu_problem", lambda: "")
    assert choose(AUTO, DType.FP16)[0].name == "tensorrt"
    backend, why = choose(AUTO, DType.FP16, unfit=lambda backend: "no plans" * (backend.name == "tensorrt"))
    assert backend.name == "openvino" and "not tensorrt (no plans)" in why


def test_the_real_library_on_this_machine() -> None:
    """CI has the package and no GPU."""
    try:
        installed = version("tensorrt-rtx-cu13")
    except PackageNotFoundError:
        pytest.skip("tensorrt-rtx-cu13 is not installed")
    availability = get("tensorrt-rtx").available()
    assert availability.version == installed
    assert availability.problem == gpu_problem()


def driver(monkeypatch: pytest.MonkeyPatch, init: int = 0, count: int = 1) -> None:
    def get_count(pointer: Any) -> int:
        pointer._obj.value = count
        return 0

    def get_device(pointer: Any, ordinal: int) -> int:
        pointer._obj.value = 7
        return 0

    def get_attribute(pointer: Any, attribute: int, device: Any) -> int:
        assert device.value == 7
        pointer._obj.value = {75: 10, 76: 3}[attribute]
        return 0

    fake = SimpleNamespace(
        cuInit=lambda flags: init,
        cuDeviceGetCount=get_count,
        cuDeviceGet=get_device,
        cuDeviceGetAttribute=get_attribute,
    )
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: fake)


def test_the_driver_says_whether_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_problem("libnot-there.so.1") == NO_GPU
    driver(monkeypatch)
    assert gpu_problem() == "" and gpu_capability() == 103
    driver(monkeypatch, count=0)
    assert gpu_problem() == NO_GPU and gpu_capability() == 0
    driver(monkeypatch, init=803)
    assert gpu_problem() == "needs an NVIDIA GPU, and the driver does not start (CUresult 803)"
