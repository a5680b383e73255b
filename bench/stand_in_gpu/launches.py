"""What a compiled program launches, read from its code, and the bytes that its kernels read and write.

A library's convolution or product counts as one launch, though some are two.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch._inductor.graph import GraphLowering
from torch._inductor.ir import UserDefinedTritonKernel

_CALL = re.compile(r"^\s+(?:AOTI_TORCH_ERROR_CODE_CHECK\()?(call_|aoti_torch_cuda_)(\w+?)\(", re.MULTILINE)
_LIBRARY = {
    "convolution": "convolution",
    "mm": "product",
    "addmm": "product",
    "bmm": "product",
    "baddbmm": "product",
    "scaled_mm": "product",
}
_WITH_WEIGHTS = {"geglu_linear", "geglu_linear_tma", "query_attention"}
"""Kernels of ours that read the weights of a linear layer."""
_TRITON = {
    "triton_poi": "elementwise",
    "triton_per": "reduction",
    "triton_red": "reduction",
    "triton_tem": "product",
}


@dataclass
class Counted:
    """Of one program.

    Attributes:
        launches: By kind: those of a library ("product", "convolution"), of inductor's own kernels ("elementwise",
            "reduction"), and of each of ours by its name.
        mib: Read and written by each kind, each operand once; kernels of ours that read weights are "product", too.
    """

    launches: Counter[str] = field(default_factory=Counter)
    mib: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> int:
        """Of launches."""
        return sum(self.launches.values())


def launches(code: str) -> Counter[str]:
    """In the C++ of AOTInductor, see `Counted`."""
    found: Counter[str] = Counter()
    for prefix, name in _CALL.findall(code):
        found[_kind(name, ours=prefix == "call_")] += 1
    return found


def _kind(name: str, *, ours: bool) -> str:
    if ours:
        return next(
            (kind for start, kind in _TRITON.items() if name.startswith(start)), re.sub(r"_\d+$", "", name)
        )
    bare = name.strip("_").removesuffix("_out").removesuffix("_v2")
    return _LIBRARY.get(bare, bare)


@contextmanager
def counting() -> Iterator[Counted]:
    """Of what is compiled meanwhile."""
    counted = Counted()
    generate: Any = GraphLowering.codegen_with_cpp_wrapper

    def generate_and_count(graph: Any) -> Any:
        result = generate(graph)
        code = result[0]
        counted.launches += launches(getattr(code, "value", code))
        for node in graph.scheduler.nodes:
            counted.mib[_kind_of(node)] += _bytes(node) / 2**20
        return result

    lowering: Any = GraphLowering
    lowering.codegen_with_cpp_wrapper = generate_and_count
    try:
        yield counted
    finally:
        lowering.codegen_with_cpp_wrapper = generate


def _kind_of(node: Any) -> str:
    """Of a node of inductor's scheduler."""
    if not node.is_extern():
        return "reduction" if node.is_reduction() else "elementwise"
    if isinstance(node.node, UserDefinedTritonKernel):
        kernel: Any = node.node.get_kernel_and_metadata()[0]
        while hasattr(kernel, "fn"):
            kernel = kernel.fn
        name = str(kernel.__name__)
        return "product" if name in _WITH_WEIGHTS else name
    name = getattr(node.node, "python_kernel_name", None) or type(node.node).__name__
    bare = name.removesuffix(".default").rpartition(".")[2].strip("_")
    return _LIBRARY.get(bare, bare)


def _bytes(node: Any) -> int:
    """Read and written; of a kernel of ours each argument once, where inductor takes its output for an input, too."""
    if node.is_extern() and isinstance(node.node, UserDefinedTritonKernel):
        given: Any = node.node.inputs
        tensors = {each.get_name(): each for each in given}
        return sum(
            int(math.prod(map(int, each.get_size()))) * each.get_dtype().itemsize for each in tensors.values()
        )
    return int(node.get_read_write_buffers_sizes())
