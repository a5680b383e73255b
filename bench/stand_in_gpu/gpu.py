"""A GPU that is not there: torch, inductor and Triton compile for it, and nothing can run on it.

Tensors "on" it are fake, their shapes and strides alone exist: https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html.
Kernels are compiled to machine code and never loaded; where several configurations could be timed the first is taken.
Everything else, C++ and its linker included, is as on a machine with a GPU. Works with a torch that is built with CUDA
and with one that is not, from 2.11 on.

`install` changes libraries for good, so it belongs into a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_HERE = Path(__file__).parent
_DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What compilers ask of a GPU, under the names that `cudaDeviceProp` and torch have for it.

    https://docs.nvidia.com/cuda/cuda-runtime-api/structcudaDeviceProp.html
    """

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    L2_cache_size: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block: int = 48 * 1024
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    is_integrated: bool = False
    gcnArchName: str = ""

    @property
    def capability(self) -> int:
        """Such as 90."""
        return 10 * self.major + self.minor


H200 = Model(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    L2_cache_size=60 << 20,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
)


def install(model: Model = H200) -> FakeTensorMode:
    """Let this process see `model`, and give the mode to which its tensors belong."""
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    _register_patterns()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=_shapes())
    _load_guard()
    _be_built_with_cuda()
    _answer_for_cuda(model)
    _move_to(mode)
    _drive_triton(model)
    _compile_without_running()
    if cache is None:  # when it is imported, torch writes down there which folder it takes by default
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    return mode


def _register_patterns() -> None:
    """Inductor traces its patterns on values before it looks for them: on the processor, while it sees nothing else."""
    from torch._inductor.fx_passes import joint_graph, post_grad

    patterns: Any
    for patterns in (joint_graph, post_grad):
        patterns.lazy_init()
        patterns.lazy_init = _nothing


def _shapes() -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv(tracked_fakes=[])


def _load_guard() -> None:
    """See `guard.cpp`; it takes the place of CUDA's own, where torch has that."""
    base = Path(str(torch.__file__)).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "guard.so")
        flags = [
            "-O0",
            "-std=c++20",
            "-fPIC",
            "-shared",
            f"-I{base / 'include'}",
            f"-L{base / 'lib'}",
            "-lc10",
        ]
        subprocess.run(["g++", str(_HERE / "guard.cpp"), *flags, "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


def _be_built_with_cuda() -> None:
    """What a torch without CUDA lacks: a version of it, libraries to link with, and cuDNN's choice of layouts."""
    torch.version.cuda = torch.version.cuda or "13.0"
    _stub_libraries("torch_cuda", "cuda")
    library: Any = torch._C
    library._conv_determine_backend_memory_format = _layout


def _layout(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """Of what a convolution gives: channels last where an operand is."""
    last = torch.channels_last
    either = any(
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()
        for tensor in (x, weight)
    )
    return last if either else torch.contiguous_format


def _stub_libraries(*names: str) -> None:
    """Libraries without a symbol where the linker looks last, kept as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="rt-stand-in-"))
    for name in names:
        target = folder / f"lib{name}.so"
        subprocess.run(["g++", "-shared", "-x", "c++", os.devnull, "-o", str(target)], check=True)
    os.environ["LIBRARY_PATH"] = ":".join(filter(None, [os.environ.get("LIBRARY_PATH"), str(folder)]))


def _answer_for_cuda(model: Model) -> None:
    """What is asked of the GPU itself."""
    import torch._dynamo.device_interface as interfaces
    import torch._subclasses.fake_tensor as fake

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: model,
        "get_device_capability": lambda device=None: (model.major, model.minor),
        "get_device_name": lambda device=None: model.name,
        "mem_get_info": lambda device=None: (model.total_memory, model.total_memory),
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0, synchronize=lambda: None),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
        **dict.fromkeys(
            ("_lazy_init", "empty_cache", "set_device", "set_rng_state", "synchronize"), _nothing
        ),
        "device": _Guard,
        "_DeviceGuard": _Guard,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    raw = ("getCurrentRawStream", "getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice")
    for name in raw:
        setattr(torch._C, f"_cuda_{name}", lambda *_: 0)
    interface: Any = interfaces.CudaInterface
    for place in (interface, interface.Worker):
        place.get_device_properties = staticmethod(lambda device=None: model)
        place.current_device = staticmethod(lambda: 0)
    for name in ("exchange_device", "maybe_exchange_device", "get_raw_stream"):
        setattr(interface, name, staticmethod(lambda *_: 0))
    interface.is_available = staticmethod(lambda: True)
    interface.device_count = staticmethod(lambda: 1)
    interface.get_compute_capability = staticmethod(lambda device=None: model.capability)
    interface.set_device = interface.synchronize = staticmethod(_nothing)
    interface.device = _Guard
    fake.init_gpu_context = _nothing  # type: ignore[assignment]


def _nothing(*_: Any, **__: Any) -> None:
    """What is done on a GPU, and is not to be done here."""


class _Guard:
    """`torch.cuda.device`, with one device."""

    def __init__(self, *_: Any) -> None:
        self.idx = self.prev_idx = 0

    def __enter__(self) -> _Guard:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _move_to(mode: FakeTensorMode) -> None:
    """What is moved to the GPU becomes fake, and `torch.export` goes on in the same mode."""
    import torch._export.non_strict_utils

    to = Tensor.to
    tensor, tracing = cast(Any, Tensor), cast(Any, torch._export.non_strict_utils)

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args[:1], kwargs.get("device")]
        if isinstance(tensor, FakeTensor) or not any(_is_gpu(place) for place in given):
            return to(tensor, *args, **kwargs)
        with mode:
            return to(mode.from_tensor(tensor, static_shapes=True), *args, **kwargs)

    tensor.to = moved
    tracing.FakeTensorMode = lambda *_, **__: mode
    # What has few elements is written into the code, as are scales; values were never there.
    FakeTensor.__float__ = lambda tensor: 0.5  # type: ignore[method-assign]
    FakeTensor.tolist = lambda tensor: torch.full(tensor.shape, 0.5).numpy().tolist()  # type: ignore[assignment, method-assign]


def _is_gpu(place: object) -> bool:
    return isinstance(place, (str, torch.device)) and torch.device(place).type == "cuda"


class _Driver:
    """Triton's driver of the GPU: it says what the GPU is, and loads nothing.

    https://github.com/triton-lang/triton/blob/main/python/triton/backends/driver.py
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.utils = SimpleNamespace(
            get_device_properties=self._properties,
            load_binary=lambda *_: (0, 0, 0, 0, model.max_threads_per_block),
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._model.capability, self._model.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return _DEVICE

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return _nothing

    def _properties(self, *_: Any) -> dict[str, int]:
        return {
            "max_shared_mem": self._model.shared_memory_per_block_optin,
            "multiprocessor_count": self._model.multi_processor_count,
            "max_num_regs": self._model.regs_per_multiprocessor,
            "warpSize": self._model.warp_size,
        }


def _drive_triton(model: Model) -> None:
    """A compiled kernel keeps its code, and no handle of it on a GPU."""
    import torch._inductor.runtime.triton_helpers as helpers
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    active = _Driver(model)
    driver.set_active(active)
    helpers.set_driver_to_gpu = lambda: driver.set_active(active)
    make: Any = CompiledKernel.__init__

    def make_unloaded(kernel: Any, *args: Any, **kwargs: Any) -> None:
        make(kernel, *args, **kwargs)
        kernel.function = kernel.module = kernel.n_regs = kernel.n_spills = 0

    kernel: Any = CompiledKernel
    kernel.__init__ = make_unloaded
    kernel._init_handles = _nothing
    kernel.run = property(lambda _: _nothing)


def _compile_without_running() -> None:
    """Inductor runs each kernel once to choose and save its configuration; here it is compiled and saved."""
    import torch._inductor.config as config
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    config.use_static_cuda_launcher = False
    config.compile_threads = 1  # its workers would see no GPU
    config.shape_padding = False  # decided by timing
    config.joint_graph_constant_folding = False  # would compute on the GPU
    tuner: Any = CachingAutotuner
    precompile = tuner.precompile

    def precompile_first(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        kernel.configs = kernel.configs[:1]
        return precompile(kernel, *args, **kwargs)

    def compile_all(wrapper: Any) -> None:
        wrapper.kernel_autotune_defs.splice("async_compile.wait(globals())\ndel async_compile")
        scope: dict[str, Any] = {}
        exec(wrapper.kernel_autotune_defs.getvalue(), scope)
        for kernel in scope.values():
            if isinstance(kernel, tuner):
                if not kernel.compile_results:
                    kernel.precompile()
                kernel._make_launchers()
                kernel.save_gpu_kernel("stream", kernel.launchers[0])

    tuner.precompile = precompile_first
    writer: Any = PythonWrapperCodegen
    writer.generate_and_run_autotune_block = compile_all
