"""A program as a package of AOTInductor: C++ and, for a GPU, Triton kernels, compiled for the machine of the build.

https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html

Weights stay in the file of the component, untransformed: without freezing, inductor reads the matrix of a linear layer
as a transposed view, so ONNX graphs and packages share its bytes, but for those that `rt.export.passes.merge` makes of
several, which lie beside them. Filters are channels last in memory, and so are
moved when a package loads; the file has them once. The compiler folds no tensor of a size that would matter.

A build that was killed goes on where it was if TORCHINDUCTOR_CACHE_DIR names a folder, in which inductor then works.

On a processor each operator `rt::…` is compiled from its reference; on a GPU some are our Triton kernels, see
`rt.export.gpu_operators`.
"""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from rt.backends import Form
from rt.backends.inductor import ABOUT, About, Inductor, InductorCpu, Weight
from rt.config import DType
from rt.errors import ConfigError
from rt.export import toolchain
from rt.export.candidates import Choose, Fastest, first
from rt.export.forms import Request, Writer
from rt.export.lower import WeightFile
from rt.export.operators import REFERENCES
from rt.export.program import Program

_OPTIONS: Mapping[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    # Line numbers name the files of the build machine.
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.embed_kernel_binary": True,
    # Threads are chosen at run time, not on the machine of the build.
    "cpp.dynamic_threads": True,
    # Nothing but the instructions that the vectors need, which are then asked for when the package loads.
    "cpp.march": "",
    # Kernels alone: the host code only calls them.
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
_GPU_OPTIONS: Mapping[str, Any] = {
    # Two instances of a kernel may have the same code. By default they have one name, too, and are linked twice.
    "triton.unique_user_kernel_names": True,
    # Our graphs are channels last: inductor would take (N, H, W, C) for (N, C, H, W), and turn it once more.
    "layout_optimization": False,
}
_PROCESSOR_NAMES = {
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-fp16": "amx_fp16",
}
"""Where Linux spells an instruction set in another way than the compiler."""


def _check_cpu(request: Request) -> None:
    """Raises BackendUnavailableError without a compiler, ConfigError where torch cannot name its instructions."""
    toolchain.check_compiler()
    if "cpp.march" not in _known_options():
        raise ConfigError(
            f"torch {torch.__version__} compiles for its own processor alone; "
            f'run: pip install "torch>=2.13", or use --backend openvino'
        )


def _check_gpu(request: Request) -> None:
    """Raises ConfigError without a GPU that has what is asked for: inductor compiles on the one that will run.

    And BackendUnavailableError without a compiler or CUDA's headers.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "inductor compiles kernels on the GPU that will run them, and torch finds none; "
            "build on that machine, or use --backend inductor-cpu"
        )
    if request.config.dtype is DType.FP8 and _capability() < (8, 9):
        raise ConfigError(
            f"--fp8 needs compute capability 8.9, and this GPU has {'.'.join(map(str, _capability()))}; use --fp16"
        )
    toolchain.check_compiler()
    toolchain.cuda_home()


def compile_for(
    device: str, form: Form, program: Program, module: nn.Module, weights: WeightFile, request: Request
) -> Mapping[Form, str]:
    """Write the package of `program` for "cpu" or "cuda".

    Args:
        device: Where it will run.
        form: What it is called in the bundle.
        program: Names, example inputs.
        module: What computes it, in its final precision; it is not changed.
        weights: Takes the tensors.
        request: The build.
    """
    path = f"engines/{program.name}.{form.value}"
    write_package(
        request.stage / path,
        device,
        program,
        module,
        file=weights.path.name,
        place=lambda tensor: weights.place(_bytes(tensor)),
        choose=_fastest() if request.config.max_autotune else first,
        max_autotune=request.config.max_autotune,
    )
    weights.flush()
    return {form: path}


def write_package(
    path: Path,
    device: str,
    program: Program,
    module: nn.Module,
    *,
    file: str,
    place: Callable[[Tensor], int],
    choose: Choose = first,
    max_autotune: bool = False,
) -> None:
    """See `compile_for`.

    Args:
        path: Of the package.
        device: Where it will run.
        program: Names, example inputs.
        module: What computes it.
        file: The name of the component's weights, beside the package.
        place: A tensor of `module` to its offset there.
        choose: Which of several kernels for the GPU is taken.
        max_autotune: Whether products are timed in every way that inductor knows.
    """
    inputs = {name: value.to(device) for name, value in program.inputs.items()}
    with (
        torch.no_grad(),
        _quiet(),
        _exact(),
        _writers_kept(),
        _Operators(REFERENCES if device == "cpu" else {**REFERENCES, **_gpu_operators(choose)}),
    ):
        exported = torch.export.export(_copy(module, device), (), inputs, strict=False)
        compiled = exported.module(check_guards=False)
        for tensor in _tensors(compiled).values():
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        with toolchain.cuda() if device == "cuda" else nullcontext(), _folder(program.name) as folder:
            files: Any = torch._inductor.aot_compile(
                compiled, (), inputs, options=_options(device, max_autotune)
            )
            # From where they are: a way to the GPU and back would be in vain.
            host = _tensors(module)
            offsets = {name: place(host.get(name, tensor)) for name, tensor in _tensors(compiled).items()}
            about = _about(compiled, file, offsets, device)
            _package(path, [Path(str(file)) for file in files], about, folder)


@cache
def _fastest() -> Fastest:
    """What is known of this GPU by now, for all programs and builds of the process."""
    return Fastest()


def _gpu_operators(choose: Choose) -> Mapping[Any, Callable[..., Tensor]]:
    from rt.export.gpu_operators import gpu_operators  # needs Triton, which a processor does without

    return gpu_operators(choose)


def _copy(module: nn.Module, device: str) -> nn.Module:
    """`module` on `device`, with weights of its own: other programs of the component read the same ones."""
    memo: dict[int, Any] = {}
    for weight in [*module.parameters(), *module.buffers()]:
        moved = weight.detach().to(device, copy=True)
        memo[id(weight)] = nn.Parameter(moved, False) if isinstance(weight, nn.Parameter) else moved
    moved_module = copy.deepcopy(module, memo)
    for graph_module in moved_module.modules():
        if isinstance(graph_module, fx.GraphModule):
            _place(graph_module, torch.device(device))
    return moved_module


def _place(module: fx.GraphModule, device: torch.device) -> None:
    """Tracing writes down the device on which a graph makes its tensors; let it be `device`."""
    for node in module.graph.nodes:
        args, kwargs = tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs = args, kwargs
    module.recompile()


def _options(device: str, max_autotune: bool) -> dict[str, Any]:
    """Those for the device that this release has, and that asked for."""
    known = _known_options()
    wanted = {**_OPTIONS, **(_GPU_OPTIONS if device == "cuda" else {}), "max_autotune": max_autotune}
    return {key: value for key, value in wanted.items() if key in known}


def _known_options() -> Mapping[str, Any]:
    from torch._inductor import config

    known: Mapping[str, Any] = config.get_config_copy()
    return known


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _about(module: nn.Module, file: str, offsets: Mapping[str, int], device: str) -> About:
    """What the package says of itself."""
    return About(
        torch=torch.__version__,
        machine=platform.machine(),
        instructions=_instructions(),  # a GPU's package has host code, too
        capability=0 if device == "cpu" else 10 * _capability()[0] + _capability()[1],
        file=file,
        weights={
            name: Weight(
                offset=offsets[name],
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                stride=tensor.stride(),
            )
            for name, tensor in _tensors(module).items()
        },
    )


def _bytes(tensor: Tensor) -> Any:
    """The elements in the order of the shape; numpy has no bfloat16, so as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _instructions() -> tuple[str, ...]:
    """What the code is compiled with, as /proc/cpuinfo names it."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    flags = pick_vec_isa().build_arch_flags().split()
    names = [flag.removeprefix("-m") for flag in flags if not flag.startswith("-march")]
    return tuple(dict.fromkeys(_PROCESSOR_NAMES.get(name, name) for name in names))


def _package(path: Path, files: list[Path], about: About, folder: Path) -> None:
    """The library, what torch says of it, and `about`; sources and command lines stay behind."""
    from torch.export.pt2_archive._package import package_pt2

    built = next(file for file in files if file.suffix == ".so")
    kept = [file for file in files if file.name == f"{built.stem}_metadata.json"]
    kept += [file for file in files if file.suffix in (".cubin", ".fatbin")]
    with tempfile.TemporaryDirectory() as clean:
        library = Path(clean, built.name)
        # Symbols and the build's id differ from build to build, by the name of the folder.
        drop = ["--strip-all", "--remove-section=.note.gnu.build-id"]
        subprocess.run(["strip", *drop, "-o", str(library), str(built)], check=True)
        library.write_bytes(_anonymous(library.read_bytes(), folder))
        package_pt2(
            str(path),
            aoti_files={"model": [str(file) for file in (library, *kept)]},
            extra_files={ABOUT: about.to_json()},
        )


def _anonymous(code: bytes, folder: Path) -> bytes:
    """Without the paths that messages of torch's headers carry: overwritten, so that nothing moves."""
    installed = Path(str(torch.__file__)).parents[1]
    for private in (folder, installed):
        path = str(private).encode()
        code = code.replace(path, b"/" * len(path))
    return code


@contextmanager
def _folder(program: str) -> Iterator[Path]:
    """Where inductor works: a folder of the program where the user keeps caches, or one that is removed afterwards."""
    from torch._inductor.utils import fresh_cache

    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    failure: Exception | None = None
    with fresh_cache():  # what is cached in memory has the paths of another folder
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        if kept:
            folder = Path(kept).absolute() / "rt" / program
            folder.mkdir(parents=True, exist_ok=True)
        with toolchain.environment(
            TORCHINDUCTOR_CACHE_DIR=str(folder), TRITON_CACHE_DIR=str(folder / "triton")
        ):
            try:
                yield folder
            except Exception as error:  # of which torch is not told, or it would keep what it has so far
                failure = error
    if failure is not None:
        raise failure


@contextmanager
def _exact() -> Iterator[None]:
    """fp32 is fp32: kernels are chosen and compiled without TF32, which cuDNN takes by default.

    `torch.backends.cudnn.flags` would also switch cuDNN off.
    """
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _writers_kept() -> Iterator[None]:
    """Let inductor tell the buffers apart into which it writes code.

    Before torch 2.13 it knows them by the address of a bound method, which ends after the call: another one may get the
    same address, and then code uses an array of sizes before it is declared. So each method is kept, once a buffer.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    wrapper: Any = CppWrapperCpu
    before = wrapper.codegen_int_array_var
    kept: dict[int, Any] = {}

    def declare(self: Any, int_array: str, writeline: Any, *args: Any, **kwargs: Any) -> Any:
        same = kept.setdefault(id(getattr(writeline, "__self__", writeline)), writeline)
        return before(self, int_array, same, *args, **kwargs)

    wrapper.codegen_int_array_var = declare
    try:
        yield
    finally:
        wrapper.codegen_int_array_var = before


class _Operators(TorchFunctionMode):
    """Operators `rt::…` replaced by what computes them, while a program is traced."""

    def __init__(self, bodies: Mapping[Any, Callable[..., Tensor]]) -> None:
        super().__init__()
        self._bodies = bodies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._bodies.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Inductor warns of its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


WRITERS: Mapping[str, Writer] = {
    InductorCpu.name: Writer(
        check=_check_cpu, compile=partial(compile_for, "cpu", InductorCpu.form), fuses=True
    ),
    Inductor.name: Writer(check=_check_gpu, compile=partial(compile_for, "cuda", Inductor.form), fuses=True),
}
"""By the name of the backend."""
