"""A program as a package of AOTInductor: compiled on this processor, loaded, run, and refused where it cannot run."""

from __future__ import annotations

import contextlib
import gc
import getpass
import json
import os
import platform
import signal
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rt.backends import Form, get
from rt.backends import inductor as backend_module
from rt.backends.inductor import (
    About,
    Inductor,
    InductorDeviceEngine,
    Weight,
    check_gpu,
    check_processor,
    check_torch,
    convolutions,
    processor,
)
from rt.config import BuildConfig, DType
from rt.cuda.host import HostDevice
from rt.errors import BackendError, ConfigError, IncompatibleBundleError
from rt.export.architectures import Architecture, clip, unet, vae
from rt.export.build import build
from rt.export.checkpoint import open_checkpoint
from rt.export.forms import Request, check_options
from rt.export.inductor import WRITERS, _copy, _exact, _writers_kept
from rt.export.lower import WeightFile
from rt.export.operators import ops
from rt.export.program import Program, trace_program
from rt.model import Component, Family
from rt.shapes import ShapeProfile, TensorSpec

INPUTS = [TensorSpec(name="x", shape=(1, 64, 32))]
OUTPUTS = [TensorSpec(name="y", shape=(1, 64, 64))]


class Block(nn.Module):
    """Every operator `rt::…` once, and what is around them: a filter, a matrix, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.up = nn.Linear(32, 128)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = ops.group_norm(x, self.norm.weight, self.norm.bias, 4, 1e-5, True)
        x = ops.convolution(x.view(1, 8, 8, 32), self.filter.weight, self.filter.bias).view(1, 64, 32)
        x = ops.attention(x, x, x, 2)
        return (ops.geglu(self.up(x)),)


def request(stage: Path, **options: Any) -> Request:
    return Request(stage=stage, config=BuildConfig(profiles=(ShapeProfile(64, 64),), **options))


def placed(module: nn.Module) -> list[Any]:
    """Where a module's weights are and how they lie."""
    return [
        (name, w.data_ptr(), w.stride(), w.device) for name, w in module.state_dict(keep_vars=True).items()
    ]


@pytest.fixture(scope="module")
def program() -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = {"x": torch.randn(1, 64, 32)}
        return trace_program("block", Component.UNET, None, Block(), inputs, ("y",))


@pytest.fixture(scope="module")
def stage(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its weights."""
    stage = tmp_path_factory.mktemp("inductor")
    (stage / "engines").mkdir()
    with WeightFile(stage / "engines" / "unet.weights") as weights:
        compile = WRITERS["inductor-cpu"].compile
        assert compile is not None
        before = placed(program.module)
        forms = compile(program, program.module, weights, request(stage))
        assert placed(program.module) == before, "the next program of the component reads the same tensors"
    assert forms == {Form.INDUCTOR_CPU: "engines/block.inductor-cpu.pt2"}
    return stage


@pytest.fixture
def package(stage: Path) -> Path:
    return stage / "engines" / "block.inductor-cpu.pt2"


@pytest.mark.slow
def test_it_computes_what_torch_computes(program, package):
    engine = get("inductor-cpu").load(package, INPUTS, OUTPUTS, dtype=DType.FP32, threads=1)
    address = engine.outputs["y"].ctypes.data
    expected = program.module(**program.inputs)[0].detach().numpy()
    for _ in range(2):
        engine.outputs["y"].fill(np.nan)
        engine.inputs["x"][...] = program.inputs["x"].numpy()
        engine.enqueue()
        np.testing.assert_allclose(engine.outputs["y"], expected, rtol=0, atol=1e-5)
    assert engine.outputs["y"].ctypes.data == address
    engine.inputs["x"].fill(0)  # the array is the input, not a copy of it
    engine.enqueue()
    assert np.abs(engine.outputs["y"] - expected).max() > 1e-2


@pytest.mark.slow
def test_weights_are_in_the_file_once_and_shared(program, package):
    about = About.read(package)
    weights = package.with_name("unet.weights")
    total = sum(value.numel() * 4 for value in program.module.state_dict().values())
    assert weights.stat().st_size < total + 4096 * 2  # to the page, for two large tensors
    raw = weights.read_bytes()
    matrix = program.module.up.weight.detach().numpy()
    assert raw[about.weights["up.weight"].offset :][: matrix.nbytes] == matrix.tobytes()
    assert about.weights["up.weight"].stride == (32, 1)  # read as it is, in a transposed view
    assert about.weights["filter.weight"].stride == (288, 1, 96, 32)
    backend = get("inductor-cpu")
    first, second = (
        backend.load(package, INPUTS, OUTPUTS, dtype=DType.FP32, threads=1)._program for _ in range(2)
    )
    for name, tensor in first._weights.items():
        assert second._weights[name].data_ptr() == tensor.data_ptr()


@pytest.mark.slow
def test_a_package_says_nothing_of_the_machine_that_built_it(package):
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        content = b"".join(archive.read(name) for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cubin"))]
    private = (
        Path(torch.__file__).parents[1],
        Path.cwd(),
        Path.home() / "",
        "torchinductor_",
        getpass.getuser() + "/",
    )
    for secret in private:
        assert str(secret).encode() not in content


@pytest.mark.slow
def test_it_is_refused_where_it_cannot_run(package, tmp_path, monkeypatch):
    about = About.read(package)
    assert set(about.instructions) <= processor()
    check_processor(about, package, processor())
    with pytest.raises(
        IncompatibleBundleError, match=r"for a processor with amx_9, which this one lacks; build"
    ):
        check_processor(replace(about, instructions=("amx_9",)), package, processor())
    with pytest.raises(IncompatibleBundleError, match="compiled for riscv64, and this is"):
        check_processor(replace(about, machine="riscv64"), package, processor())
    with pytest.raises(
        IncompatibleBundleError, match=r'compiled by torch 1\.2\.3 .* pip install "torch==1\.2\.\*"'
    ):
        check_torch(replace(about, torch="1.2.3"), package)
    monkeypatch.setattr("rt.backends.inductor.processor", frozenset)
    with pytest.raises(IncompatibleBundleError, match="which this one lacks"):
        get("inductor-cpu").load(package, INPUTS, OUTPUTS, dtype=DType.FP32, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "library"])
def test_a_damaged_package(damage, package, tmp_path):
    broken = tmp_path / package.name
    (tmp_path / "unet.weights").write_bytes(package.with_name("unet.weights").read_bytes())
    if damage == "cut":
        broken.write_bytes(package.read_bytes()[:1000])
    else:
        with zipfile.ZipFile(package) as old, zipfile.ZipFile(broken, "w") as new:
            for name in old.namelist():
                new.writestr(name, b"" if name.endswith(".so") else old.read(name))
    with pytest.raises(BackendError, match=r"^inductor cannot load .*block\.inductor-cpu\.pt2: "):
        get("inductor-cpu").load(broken, INPUTS, OUTPUTS, dtype=DType.FP32, threads=1)


def test_kernels_of_another_gpu(tmp_path):
    class Hopper:
        name, capability = "H100", 90

    about = About(torch="2", machine="", instructions=(), capability=80, file="", weights={})
    with pytest.raises(IncompatibleBundleError, match="capability 80, and H100 has 90; build it again"):
        check_gpu(about, tmp_path, Hopper())
    check_gpu(replace(about, capability=90), tmp_path, Hopper())
    assert json.loads(about.to_json())["capability"] == 80


def test_a_build_for_a_gpu_needs_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="on the GPU that will run them, and torch finds none; build on"):
        check_options(get("inductor"), request(tmp_path))


def test_max_autotune_is_ours_alone(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^--max-autotune is for inductor, and this build is for openvino; leave"
    ):
        check_options(get("openvino"), request(tmp_path, max_autotune=True))


def test_fp8_needs_a_gpu_that_multiplies_it(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("rt.export.inductor._capability", lambda: (8, 0))
    with pytest.raises(
        ConfigError, match=r"^--fp8 needs compute capability 8\.9, and this GPU has 8\.0; use --fp16"
    ):
        check_options(get("inductor"), request(tmp_path, dtype=DType.FP8))
    monkeypatch.setattr("rt.export.toolchain.cuda_home", lambda: tmp_path)
    check_options(get("inductor"), request(tmp_path, dtype=DType.FP16))


class Made(nn.Module):
    """Makes a tensor on the device of the trace; has a weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.down.weight = self.up.weight
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.down(self.up(x)) + x.new_ones(4, device=x.device) + self.offset,)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch copies a graph by a class that it deprecates
def test_a_copy_is_on_the_device_and_shares_nothing():
    module = trace_program("made", Component.UNET, None, Made(), {"x": torch.randn(2, 4)}, ("y",)).module
    before, code = placed(module), module.code
    copy = _copy(module, "meta")
    devices = {weight.device.type for weight in copy.state_dict(keep_vars=True).values()}
    assert devices == {"meta"} and "cpu" in code and "cpu" not in copy.code
    assert copy(x=torch.empty(2, 4, device="meta"))[0].device.type == "meta"
    assert placed(module) == before and module.code == code
    here = _copy(module, "cpu")
    assert not {pointer for _, pointer, *_ in placed(here)} & {pointer for _, pointer, *_ in before}
    assert len({id(weight) for weight in here.parameters()}) == len(
        {id(weight) for weight in module.parameters()}
    )
    assert here.state_dict().keys() == module.state_dict().keys()


def test_fp32_is_compiled_without_tf32(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    try:
        others = cudnn.enabled, cudnn.benchmark
        with _exact():
            assert not cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
            assert (cudnn.enabled, cudnn.benchmark) == others
        assert cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_it_refuses_and_what_is_missing(monkeypatch):
    backend = get("inductor-cpu")
    assert [d for d in DType if backend.refuses(d)] == [DType.INT8]
    assert "no int8 products; use" in backend.refuses(DType.INT8)

    def missing(package):
        raise __import__("importlib.metadata").metadata.PackageNotFoundError(package)

    monkeypatch.setattr("rt.backends.inductor.version", missing)
    assert backend.available().problem.startswith('torch is not installed; run: pip install "torch>=2.9"')


@pytest.mark.parametrize(
    ("cuda", "problem"),
    [
        (None, "this torch is built without CUDA; install one with it"),
        (
            "13.0",
            "the driver is older than this torch needs, which is built for CUDA 13.0; update the driver, or ",
        ),
    ],
)
def test_a_torch_that_does_not_use_the_gpu(monkeypatch, cuda, problem):
    monkeypatch.setattr(backend_module, "gpu_problem", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    availability = get("inductor").available()
    assert availability.version and availability.problem.startswith(problem)


@pytest.fixture
def gpu_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A package for a GPU without code, and what happens, in order, when it is loaded."""
    happened: list[str] = []

    class Loader:
        def __init__(self, *arguments: Any) -> None: ...

        def get_constant_fqns(self) -> list[str]:
            return ["filter", "matrix"]

        def load_constants(self, weights: dict[str, Any], *how: bool) -> None:
            happened.append("load_constants")

    class Stream:
        def synchronize(self) -> None:
            happened.append("synchronize")

    weight = Weight(offset=0, dtype="float32", shape=(1,), stride=(1,))
    about = About(
        torch=torch.__version__,
        machine=platform.machine(),
        instructions=(),
        capability=90,
        file="unet.weights",
        weights={"filter": weight, "matrix": weight},
    )
    path = tmp_path / "block.inductor.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("block/rt.json", about.to_json())
    path.with_name(about.file).write_bytes(bytes(64))
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    monkeypatch.setattr(
        backend_module._Weights, "get", lambda self, weight: happened.append("upload"), raising=True
    )
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return path, happened


def test_uploads_are_waited_for_once(gpu_package):
    path, happened = gpu_package
    backend_module._Program(path, About.read(path), "cuda")
    assert happened == ["upload", "upload", "load_constants", "synchronize"]
    happened.clear()
    backend_module._Program(path, About.read(path), "cpu")
    assert "synchronize" not in happened


@pytest.mark.parametrize("memory", [64 * 32 * 4, None], ids=["no room", "torch fails"])
def test_an_engine_that_does_not_load_gives_everything_back(gpu_package, memory, monkeypatch):
    def fails(*array: Any, **options: Any) -> None:
        raise MemoryError("torch")

    monkeypatch.setattr(torch, "as_tensor", fails)
    device = HostDevice(memory=memory)
    with pytest.raises(MemoryError, match="full" if memory else "torch"):
        Inductor(lambda: device).load(gpu_package[0], INPUTS, OUTPUTS, dtype=DType.FP16, threads=1)
    assert device.in_use == 0 and device.calls[-1].name == "close"
    assert "free" in [call.name for call in device.calls]


@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16])
def test_on_a_gpu_fp32_is_not_tf32(gpu_package, dtype, monkeypatch):
    ran, emptied = [], []
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: array)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: "pool")
    for name in ("stream", "use_mem_pool"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "ExternalStream", int)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(
        backend_module._Program,
        "run",
        lambda *arguments: ran.append(
            (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark)
        ),
    )
    device = HostDevice()
    engine = Inductor().load_on(device, gpu_package[0], INPUTS, OUTPUTS, dtype=dtype)
    assert isinstance(engine, InductorDeviceEngine)
    program, before = weakref.ref(engine._program), torch.backends.cudnn.conv.fp32_precision
    assert before == "tf32", "torch's default"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as somebody else in the process wants it
    engine.enqueue(device.create_stream())
    assert ran == [("ieee" if dtype is DType.FP32 else before, False)]
    assert torch.backends.cudnn.conv.fp32_precision == before and torch.backends.cudnn.benchmark
    for _ in range(2):
        engine.close()
    gc.collect()
    assert device.allocated == 0 and emptied and program() is None


def test_precision_is_put_back_after_an_error():
    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(LookupError), convolutions(exact=True):
        raise LookupError
    assert torch.backends.cudnn.conv.fp32_precision == before != "ieee"


def test_a_file_of_weights_is_mapped_once(tmp_path, monkeypatch):
    path, maps, memmap = tmp_path / "unet.weights", [], np.memmap
    path.write_bytes(bytes(64))
    monkeypatch.setattr(np, "memmap", lambda *how, **mode: maps.append(1) or memmap(*how, **mode))
    first, second = (backend_module._Weights.of(path, "cpu") for _ in range(2))
    assert first is second and len(maps) == 1
    assert backend_module._Weights.of(path, "cuda") is not first and len(maps) == 2


def test_auto_leaves_the_processor_to_faster_engines():
    from rt.backends import BACKENDS

    names = [*BACKENDS]
    assert names.index("inductor-cpu") > max(names.index("openvino"), names.index("onnxruntime"))
    assert names.index("inductor") < names.index("openvino")


@pytest.mark.slow
def test_two_packages_of_a_program_are_equal(program, package, tmp_path):
    (tmp_path / "engines").mkdir()
    compile = WRITERS["inductor-cpu"].compile
    assert compile is not None
    with WeightFile(tmp_path / "engines" / "unet.weights") as weights:
        compile(program, program.module, weights, request(tmp_path))
    assert (tmp_path / "engines" / package.name).read_bytes() == package.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [DType.FP16, DType.BF16])
def test_it_compiles_the_fused_program_which_is_lowered_for_our_kernels_alone(
    write_folder, tmp_path, monkeypatch, dtype
):
    compiled = {}

    def compile(program, module, weights, request):
        compiled[program.component] = {node.target for node in program.module.graph.nodes}
        return {}

    writer = replace(WRITERS["inductor-cpu"], compile=compile)
    monkeypatch.setattr("rt.export.build.writer", lambda backend: writer)
    monkeypatch.setattr("rt.export.build._verified", lambda record, stage, backend: record)
    write_folder(tmp_path / "model", SMALL)
    config = BuildConfig(profiles=(ShapeProfile(16, 16),), backend="inductor-cpu", dtype=dtype)
    bundle = build(open_checkpoint(str(tmp_path / "model")), tmp_path / "bundle", config, quiet=True)
    for record in bundle.manifest.engines:
        fused = ops.group_norm.default in compiled[record.component]
        assert fused == (record.component in (Component.UNET, Component.VAE_DECODER, Component.VAE_ENCODER))
        assert [*record.forms] == ["onnx", *["fused.onnx"] * (fused and dtype is DType.BF16)]


@pytest.mark.slow
def test_the_cache_of_a_user_is_kept_and_not_named(program, tmp_path, monkeypatch):
    cache = tmp_path / "a-private-cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    compile = WRITERS["inductor-cpu"].compile
    assert compile is not None
    made = []
    for name in ("first", "second"):
        (tmp_path / name / "engines").mkdir(parents=True)
        with WeightFile(tmp_path / name / "engines" / "unet.weights") as weights:
            [path] = compile(program, program.module, weights, request(tmp_path / name)).values()
        with zipfile.ZipFile(tmp_path / name / path) as archive:
            made.append([archive.read(each) for each in archive.namelist()])
    assert made[0] == made[1]
    assert not any(b"a-private-cache" in part for part in made[0])
    assert [*(cache / "rt" / "block").rglob("*.so")]


SMALL = Architecture(
    Family.SD1,
    unet((32,), 32, 8, 2, depths=(1,), layers_per_block=1),
    vae((32,), 16, layers=1),
    (clip(32, 1, 1, act="quick_gelu", vocab=514, tokens=12),),
)


@pytest.mark.slow
def test_a_bundle_draws_the_picture_of_openvino(write_folder, tmp_path):
    from rt import Pipeline

    write_folder(tmp_path / "model", SMALL)
    config = BuildConfig(profiles=(ShapeProfile(16, 16),), backend="inductor-cpu")
    bundle = build(open_checkpoint(str(tmp_path / "model")), tmp_path / "bundle", config, quiet=True)
    for record in bundle.manifest.engines:
        assert [*record.forms] == ["onnx", "inductor-cpu.pt2"]
        assert max(record.error.values()) < 1e-5 and record.verified_with == "inductor-cpu f32"
    pictures = [
        np.asarray(
            Pipeline.from_bundle(bundle.path, backend=backend)("a", num_inference_steps=2, seed=1).images[0]
        ).astype(int)
        for backend in ("inductor-cpu", "openvino")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


@pytest.mark.slow
def test_in_a_child_of_a_process_that_used_it_it_says_so(package):
    """OpenMP's threads stay in the parent, and a child that computes would wait for them for ever."""
    get("inductor-cpu").load(package, INPUTS, OUTPUTS, dtype=DType.FP32, threads=2)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            with pytest.raises(
                BackendError, match="cannot run here: it was used before this process was forked"
            ):
                get("inductor-cpu").load(package, INPUTS, OUTPUTS, dtype=DType.FP32, threads=2)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_torch_knows_the_buffers_of_its_code_by_methods_that_last(monkeypatch):
    """Two bound methods of one buffer are one, and those of two buffers never share an address."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    seen: list[Any] = []
    monkeypatch.setattr(
        CppWrapperCpu,
        "codegen_int_array_var",
        lambda self, array, writeline, graph=None: seen.append(id(writeline)),
    )

    class Buffer:
        def writeline(self) -> None:
            pass

    buffers = [Buffer(), Buffer()]
    with _writers_kept():
        for buffer in (*buffers, *buffers):
            CppWrapperCpu.codegen_int_array_var(None, "{1}", buffer.writeline, graph=None)  # type: ignore[arg-type]
    assert seen[:2] == seen[2:] and seen[0] != seen[1]
    seen.clear()
    CppWrapperCpu.codegen_int_array_var(None, "{1}", print)  # type: ignore[arg-type]
    assert seen == [id(print)]
