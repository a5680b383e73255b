"""ONNX Runtime on a GPU: on a library that records and computes on the host, and by the provider of the processor."""

from __future__ import annotations

import gc
import io
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import rt
from rt.backends import BACKENDS, DeviceBackend, Form, get, ort_gpu
from rt.backends.base import Availability
from rt.backends.ort import Provider
from rt.backends.ort_gpu import OnnxRuntimeCuda, OnnxRuntimeTensorRT, wheels_problem
from rt.cli import doctor
from rt.config import DType
from rt.cuda import Device, Stream, capture
from rt.cuda.host import HostDevice
from rt.cuda.probe import NO_GPU
from rt.errors import BackendError
from rt.shapes import TensorSpec

X, Y = TensorSpec(name="x", shape=(2, 3)), TensorSpec(name="y", shape=(2, 3))
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
WAITS = {"synchronise", "wait", "allocate", "free", "pinned", "upload", "download"}


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def ort(gpu_ort: Any, device: HostDevice) -> Any:
    return gpu_ort(device)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = x + x, in a bundle's place."""
    from onnx import TensorProto, helper, save

    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in "xy"]
    body = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", tensors[:1], tensors[1:])
    path = tmp_path / "bundle" / "engines" / "double.onnx"
    path.parent.mkdir(parents=True)
    save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    path.with_name("some.weights").write_bytes(b"weights")
    return path


def load(device: HostDevice, path: Path, backend: Any = None, dtype: DType = DType.FP32) -> Any:
    return (backend or OnnxRuntimeCuda()).load_on(device, path, [X], [Y], dtype=dtype)


def names(device: HostDevice) -> list[str]:
    return [call.name for call in device.calls]


def test_a_session_is_made_for_its_stream_and_bound_to_the_devices_memory(
    ort: Any, device: HostDevice, graph: Path
) -> None:
    engine, stream = load(device, graph), device.create_stream()
    [(name, provider, options)] = ort.named("InferenceSession")
    assert (name, provider) == ("double.onnx", "CUDAExecutionProvider")
    own = options["user_compute_stream"]
    assert options == {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": own,
        "enable_cuda_graph": "1",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }
    x, y = engine.inputs["x"], engine.outputs["y"]
    assert ort.named("bind_input") == [("x", "cuda", 0, np.float32, (2, 3), x.pointer)]
    assert ort.named("bind_output") == [("y", "cuda", 0, np.float32, (2, 3), y.pointer)]
    for _ in range(3):
        engine.enqueue(stream)
    assert ort.named("run") == [(int(own), {"disable_synchronize_execution_providers": "1"})] * 3
    assert int(own) != stream
    device.synchronise(stream)
    engine.close()
    engine.close()
    device.destroy_stream(stream)
    assert device.in_use == 0


def test_it_runs_between_what_comes_before_and_after_and_the_host_does_not_wait(
    ort: Any, device: HostDevice, graph: Path
) -> None:
    engine, stream = load(device, graph), device.create_stream()
    x, y = engine.inputs["x"], engine.outputs["y"]
    source, target = device.pinned((2, 3), "float32"), device.pinned((2, 3), "float32")
    source[...] = VALUES
    device.upload(x, source, stream)
    device.calls = []
    engine.enqueue(stream)
    device.copy(x, y, stream)
    engine.enqueue(stream)
    assert not WAITS & set(names(device))
    device.download(target, y, stream)
    device.synchronise(stream)
    np.testing.assert_array_equal(target, 4 * VALUES)


def test_it_waits_for_what_comes_before(ort: Any, device: HostDevice, graph: Path) -> None:
    """Seen from the session's stream, which a GPU may come to first."""
    engine, stream = load(device, graph), device.create_stream()
    source = device.pinned((2, 3), "float32")
    source[...] = VALUES
    device.upload(engine.inputs["x"], source, stream)
    engine.enqueue(stream)
    [(own, _)] = ort.named("run")
    device.synchronise(own)
    np.testing.assert_array_equal(device.view(engine.outputs["y"]), 2 * VALUES)


def test_it_cannot_be_captured(ort: Any, device: HostDevice, graph: Path) -> None:
    engine, stream = load(device, graph), device.create_stream()
    with pytest.raises(BackendError, match="failed while running: the provider's graph while a stream is"):
        capture(device, stream, lambda: engine.enqueue(stream))


class OnProcessor(OnnxRuntimeCuda):
    """The same calls of the real library, with the provider and the memory of the processor."""

    provider = "CPUExecutionProvider"
    memory = "cpu"

    @contextmanager
    def _prepared(self, device: Device, path: Path, stream: Stream, dtype: DType) -> Iterator[Provider]:
        yield self.provider, {}


def test_the_real_library_computes_through_the_same_calls(device: HostDevice, graph: Path) -> None:
    engine, stream = load(device, graph, OnProcessor()), device.create_stream()
    device.view(engine.inputs["x"])[...] = VALUES
    engine.enqueue(stream)
    np.testing.assert_array_equal(device.view(engine.outputs["y"]), 2 * VALUES)
    device.synchronise(stream)
    engine.close()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TensorSpec(name="z", shape=(2, 3)), r"double\.onnx has no z: "),
        (TensorSpec(name="x", shape=(2, 4)), "^onnxruntime failed while running: .*x"),
    ],
)
def test_a_graph_of_another_program_is_refused(
    device: HostDevice, graph: Path, other: TensorSpec, message: str
) -> None:
    with pytest.raises(BackendError, match=message) as error:
        engine = OnProcessor().load_on(device, graph, [other], [Y], dtype=DType.FP32)
        engine.enqueue(device.create_stream())
    assert "\n" not in str(error.value)


def test_what_the_library_refuses_is_one_line(device: HostDevice, graph: Path) -> None:
    graph.write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"^onnxruntime cannot load .*double\.onnx: .*") as error:
        load(device, graph, OnProcessor())
    assert "\n" not in str(error.value)
    assert device.in_use == 0


@pytest.mark.parametrize(
    ("call", "reason", "kind", "message"),
    [
        ("InferenceSession", "Failed to allocate memory for requested buffer of size 9", MemoryError, "cannot load"),
        ("InferenceSession", "CUDA failure 2: out of memory ; GPU=0 ;", MemoryError, "cannot load"),
        ("InferenceSession", "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", MemoryError, "cannot load"),
        (
            "InferenceSession",
            "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED :\nCould not find an implementation for Erf(13)",
            BackendError,
            r"double\.onnx: \[ONNXRuntimeError\] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Erf",
        ),
        ("run", "CUDA failure 700: an\nillegal access", BackendError, "running: CUDA failure 700: an illegal access$"),
        ("run", "BFCArena::AllocateRawInternal Failed to allocate memory", MemoryError, "failed while running"),
    ],
)  # fmt: skip
def test_errors(
    ort: Any, device: HostDevice, graph: Path, call: str, reason: str, kind: type[Exception], message: str
) -> None:
    ort.failing[call] = RuntimeError(reason)
    with pytest.raises(kind, match=message) as error:
        load(device, graph).enqueue(device.create_stream())
    assert type(error.value) is kind
    if call == "InferenceSession":
        assert device.in_use == 0


def test_a_provider_that_does_not_load_is_not_replaced_by_another(
    ort: Any, device: HostDevice, graph: Path
) -> None:
    ort.loads = ()
    with pytest.raises(
        BackendError, match=r"^onnxruntime cannot load its CUDAExecutionProvider; rt doctor says"
    ):
        load(device, graph)
    assert device.in_use == 0


def test_a_device_that_is_full(ort: Any, graph: Path) -> None:
    device = HostDevice(memory=40)  # the inputs, and no more
    with pytest.raises(MemoryError):
        load(device, graph)
    assert device.in_use == 0
    assert not ort.named("InferenceSession")


def test_the_session_goes_before_the_memory_that_it_is_bound_to(
    ort: Any, device: HostDevice, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, free = [], device.free

    def check(array: Any) -> None:
        gc.collect()
        assert sessions[0]() is None
        free(array)

    monkeypatch.setattr(device, "free", check)
    engine = load(device, graph)
    sessions.append(weakref.ref(engine._session))
    engine.close()
    assert device.in_use == 0


def test_seen_from_the_host(ort: Any, device: HostDevice, graph: Path) -> None:
    engine = OnnxRuntimeCuda(lambda: device).load(graph, [X], [Y], dtype=DType.FP32, threads=1)
    engine.inputs["x"][...] = VALUES
    engine.enqueue()
    np.testing.assert_array_equal(engine.outputs["y"], 2 * VALUES)
    del engine
    assert device.in_use == 0


# Whole pictures.


@pytest.fixture
def gpu(gpu_ort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend on a device of the host with the loop's kernels; `gpu.kernels` puts them into every bundle."""
    pytest.importorskip("triton")  # the kernels' references are in the kernels' files
    from .device_fakes import host_device, library

    device = host_device()
    backend = OnnxRuntimeCuda(lambda: device)
    ort = gpu_ort(device)
    monkeypatch.setattr(backend, "available", lambda: Availability(version="1.31.1"))
    monkeypatch.setitem(BACKENDS, backend.name, backend)
    ort.kernels = lambda: monkeypatch.setattr(
        "rt.pipeline.KernelLibrary", lambda device, *_: library(device, tmp_path)
    )
    return ort


@pytest.mark.parametrize("kernels", [True, False])
def test_a_bundle_draws_the_same(
    gpu: Any, demo_bundle: Path, kernels: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was built for a processor runs, too: its loop stays on the host."""
    caplog.set_level("INFO")
    if kernels:
        gpu.kernels()
    arguments: dict[str, Any] = {
        "prompt": "a red heart",
        "num_images_per_prompt": 2,
        "num_inference_steps": 3,
        "scheduler": "euler-a",
        "guidance_interval": (0.0, 0.6),
        "output_type": "np",
        "seed": 3,
    }
    with rt.Pipeline.from_bundle(demo_bundle, backend="onnxruntime-cuda") as pipe:
        got = pipe(**arguments).images
        device = pipe.engines.place.device  # type: ignore[union-attr]
        assert ("kernel" in names(device)) is kernels
    assert device.in_use == 0
    said = [line for line in caplog.messages if line.endswith("build it with --backend onnxruntime-cuda")]
    assert len(said) == (not kernels)
    expected = rt.Pipeline.from_bundle(demo_bundle, backend="onnxruntime")(**arguments).images
    for one, other in zip(got, expected, strict=True):
        assert np.abs(one - other).max() <= 1e-3


# The TensorRT provider and its cache.


@pytest.fixture
def compiling(ort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, whose TensorRT provider writes an engine where there is none, and lengthens its timings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    ort.compiled = []

    def compile(options: Mapping[str, str]) -> None:
        if "trt_engine_cache_path" in options:
            folder = Path(options["trt_engine_cache_path"])
            if not list(folder.glob("*.engine")):
                (folder / "graph.engine").write_bytes(b"engine")
                timings = folder / "sm90.timing"
                timings.write_bytes((timings.read_bytes() if timings.exists() else b"") + b"+")
                ort.compiled.append(folder)

    ort.compile = compile
    return ort


def tensorrt(device: HostDevice, graph: Path) -> Path:
    """Load; gives the folder that the provider was told of."""
    load(device, graph, OnnxRuntimeTensorRT(), DType.FP16).close()
    *_, options = sys.modules["onnxruntime"].fake.named("InferenceSession")[-1]  # type: ignore[attr-defined]
    assert options["trt_timing_cache_path"] == options["trt_engine_cache_path"]
    return Path(options["trt_engine_cache_path"])


def test_what_tensorrt_compiles_stays_in_the_bundle(compiling: Any, device: HostDevice, graph: Path) -> None:
    filling, kept = tensorrt(device, graph), tensorrt(device, graph)
    [(*_, options), _] = compiling.named("InferenceSession")
    assert options == {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": options["user_compute_stream"],
        "trt_cuda_graph_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(filling),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(filling),
    }
    folder = graph.parents[1] / "cache" / "onnxruntime-tensorrt"
    assert kept.parent == folder and kept.name.startswith("double-") and filling.name.startswith(".double-")
    assert compiling.compiled == [filling], "once"
    assert {path.name for path in folder.iterdir()} == {kept.name, "sm90.timing"}
    assert {path.name for path in kept.iterdir()} == {"graph.engine", "sm90.timing"}


def test_programs_share_their_timings(compiling: Any, device: HostDevice, graph: Path) -> None:
    other = graph.with_name("other.onnx")
    other.write_bytes(graph.read_bytes())
    folder = tensorrt(device, graph).parent
    tensorrt(device, other)
    assert (folder / "sm90.timing").read_bytes() == b"++"


def test_programs_in_fp32_of_a_half_bundle_stay_exact(
    compiling: Any, device: HostDevice, graph: Path
) -> None:
    load(device, graph, OnnxRuntimeTensorRT(), DType.FP32)
    [(_, provider, options)] = compiling.named("InferenceSession")
    assert provider == "CUDAExecutionProvider" and options["use_tf32"] == "0"


@pytest.mark.parametrize("change", ["graph", "weights", "version"])
def test_what_was_compiled_of_something_else_is_not_used(
    compiling: Any, device: HostDevice, graph: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    tensorrt(device, graph)
    if change == "graph":
        graph.write_bytes(graph.read_bytes() + b"\x12\x00")  # an empty name of the producer
    elif change == "weights":
        graph.with_name("some.weights").write_bytes(b"weights of a LoRA")
    else:
        monkeypatch.setattr(ort_gpu, "version", lambda package: "99.0")
    tensorrt(device, graph)
    assert len(compiling.compiled) == 2


def test_a_bundle_that_cannot_be_written_to_has_its_cache_with_the_user(
    compiling: Any, device: HostDevice, graph: Path, tmp_path: Path
) -> None:
    (graph.parents[1] / "cache").write_bytes(b"in the way, as a disk that is read only")
    tensorrt(device, graph)
    kept = tensorrt(device, graph)
    assert kept.parent == tmp_path / "user" / "rt" / "onnxruntime-tensorrt"
    assert len(compiling.compiled) == 1


def test_no_place_for_a_cache(compiling: Any, device: HostDevice, graph: Path, tmp_path: Path) -> None:
    for name in (graph.parents[1] / "cache", tmp_path / "user"):
        name.write_bytes(b"in the way")
    with pytest.raises(BackendError, match=r"^there is no place for .*; set XDG_CACHE_HOME to a folder that"):
        tensorrt(device, graph)
    assert device.in_use == 0


def test_of_two_that_compile_at_once_the_first_ones_stays(
    compiling: Any, device: HostDevice, graph: Path
) -> None:
    write, nested = compiling.compile, []

    def compile(options: Mapping[str, str]) -> None:
        if not nested:
            nested.append(True)
            tensorrt(device, graph)  # as if another process were faster
        write(options)

    compiling.compile = compile
    tensorrt(device, graph)
    kept = tensorrt(device, graph)
    assert len(compiling.compiled) == 2
    assert {path.name for path in kept.parent.iterdir()} == {kept.name, "sm90.timing"}


def test_a_load_that_fails_leaves_nothing_and_a_bad_cache_is_named(
    compiling: Any, device: HostDevice, graph: Path
) -> None:
    compiling.failing["InferenceSession"] = RuntimeError("no tactic")
    with pytest.raises(BackendError, match=r"no tactic$"):
        tensorrt(device, graph)
    root = graph.parents[1] / "cache" / "onnxruntime-tensorrt"
    assert not list(root.iterdir())
    del compiling.failing["InferenceSession"]
    tensorrt(device, graph)
    kept = tensorrt(device, graph)
    compiling.failing["InferenceSession"] = RuntimeError("could not deserialize")
    with pytest.raises(BackendError, match=rf"could not deserialize; .* in {kept}: delete it and try again$"):
        tensorrt(device, graph)


# What the machine has.


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("onnxruntime-cuda", {DType.BF16: "bf16 in part", DType.INT8: "in floats", DType.FP8: "in floats"}),
        ("onnxruntime-tensorrt", {DType.FP32: "TF32", DType.BF16: "bf16", DType.INT8: "int8", DType.FP8: "fp8"}),
    ],
)  # fmt: skip
def test_both_are_backends_of_a_device(name: str, refused: Mapping[DType, str]) -> None:
    backend = get(name)
    assert isinstance(backend, DeviceBackend)
    assert [backend.arithmetic(dtype) for dtype in (DType.FP32, DType.FP16)] == ["f32", "f16"]
    for dtype in DType:
        assert backend.forms(dtype) == (Form.ONNX,)
        assert (refused.get(dtype, "") in backend.refuses(dtype)) and bool(backend.refuses(dtype)) == (
            dtype in refused
        )


def test_they_come_after_those_that_compile_and_before_the_processor() -> None:
    order = [*BACKENDS]
    assert order.index("inductor") < order.index("onnxruntime-cuda") < order.index("onnxruntime-tensorrt")
    assert order.index("onnxruntime-tensorrt") < order.index("openvino")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`installed("onnxruntime-gpu", gpu=True)`: these packages, and a GPU or none."""

    def have(*packages: str, gpu: bool = True) -> None:
        def find(package: str) -> str:
            if package not in packages:
                raise PackageNotFoundError(package)
            return "1.31.1"

        monkeypatch.setattr(ort_gpu, "version", find)
        monkeypatch.setattr(ort_gpu, "gpu_problem", lambda: "" if gpu else NO_GPU)
        monkeypatch.setattr(ort_gpu, "_unloadable", lambda library: "")

    return have


@pytest.mark.parametrize(
    ("packages", "problem"),
    [
        ((), 'not installed; run: pip install "onnxruntime-gpu['),
        (
            ("onnxruntime",),
            "onnxruntime 1.31.1 is the wheel for processors; run: pip uninstall --yes onnxruntime && pip install",
        ),
    ],
)
def test_the_wheel_is_missing(installed: Any, packages: tuple[str, ...], problem: str) -> None:
    installed(*packages)
    availability = get("onnxruntime-cuda").available()
    assert availability.version is None and availability.problem.startswith(problem)


def test_without_a_gpu_the_library_is_not_even_imported(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("onnxruntime-gpu", gpu=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert get("onnxruntime-cuda").available() == Availability(version="1.31.1", problem=NO_GPU)
    installed("onnxruntime-gpu")
    assert "does not load" in get("onnxruntime-cuda").available().problem


def test_everything_is_there(installed: Any, ort: Any) -> None:
    installed("onnxruntime-gpu")
    with redirect_stdout(io.StringIO()) as printed:
        for name in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
            assert get(name).available() == Availability(version="1.31.1")
    assert not printed.getvalue(), "standard output is for paths"
    assert ort.named("preload_dlls")


def test_a_wheel_without_the_provider(installed: Any, ort: Any) -> None:
    installed("onnxruntime-gpu")
    ort.offered = ("CPUExecutionProvider",)
    problem = get("onnxruntime-cuda").available().problem
    assert problem.startswith("it has no CUDAExecutionProvider; run: pip install")
    assert not wheels_problem()
    installed("onnxruntime-gpu", "onnxruntime")
    problem = get("onnxruntime-cuda").available().problem
    assert problem == wheels_problem()
    assert "are both installed, and each overwrites files of the other; run: pip uninstall --yes" in problem


def test_doctor_says_that_two_wheels_overwrite_each_other(installed: Any) -> None:
    installed("onnxruntime-gpu", "onnxruntime", gpu=False)
    lines = CliRunner().invoke(doctor.command).output.splitlines()
    assert f"problem  {wheels_problem()}" in lines
    installed("onnxruntime-gpu", gpu=False)
    lines = CliRunner().invoke(doctor.command).output.splitlines()
    assert not [line for line in lines if line.startswith("problem")]
    assert f"unused   onnxruntime-cuda: {NO_GPU}" in lines


def missing(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = {missing: f"{missing}: cannot open shared object file: No such file or directory"}
    monkeypatch.setattr(ort_gpu, "_unloadable", lambda library: found.get(library, ""))


def test_what_the_loader_says() -> None:
    assert not ort_gpu._unloadable("libc.so.6")
    assert ort_gpu._unloadable("libnone.so.1").startswith("libnone.so.1: cannot open shared object file")


@pytest.mark.parametrize("library", ["libcudart.so.13", "libcublasLt.so.13", "libcudnn.so.9"])
def test_a_library_of_cuda_is_missing(
    installed: Any, ort: Any, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    installed("onnxruntime-gpu")
    missing(monkeypatch, library)
    for name in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        problem = get(name).available().problem
        assert problem.startswith(
            f"{library}: cannot open shared object file: No such file or directory; run: pip"
        )


def test_tensorrt_is_wanted_in_the_version_that_the_wheel_was_built_with(
    installed: Any, ort: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed("onnxruntime-gpu")
    (tmp_path / "capi").mkdir()
    provider = tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so"
    provider.write_bytes(b"\x7fELF\0libcudart.so.13\0libnvinfer.so.10\0libnvonnxparser.so.10\0")
    monkeypatch.setattr(sys.modules["onnxruntime"], "__file__", str(tmp_path / "__init__.py"))
    missing(monkeypatch, "libnvinfer.so.10")
    assert not get("onnxruntime-cuda").available().problem
    problem = get("onnxruntime-tensorrt").available().problem
    assert problem.startswith("libnvinfer.so.10: cannot open shared object file")
    assert (
        'run: pip install "tensorrt-cu13>=10,<11", the version that this onnxruntime-gpu was built with'
        in problem
    )
