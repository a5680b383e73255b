"""What a compiled program launches, read from its code, and the bytes that its kernels read and write.

A library's convolution or product counts as one launch, though some are two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch._inductor.graph import GraphLowering

_CALL = re.compile(r"^\s+(?:AOTI_TORCH_ERROR_CODE_CHECK\()?(call_|aoti_torch_cuda_)(\w+?)\(", re.MULTILINE)
_LIBRARY = {
    "convolution": "convolution",
    "mm": "product",
    "addmm": "product",
    "bmm": "product",
    "baddbmm": "product",
    "scaled_mm": "product",
}
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
        mib: Read and written by each kind, inductor's estimate: each operand once.
    """

    launches: Counter[str] = field(default_factory=Counter)
    mib: Counter[str] = field(default_factory=Counter)

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
            counted.mib[_kind_of(node)] += node.get_read_write_buffers_sizes() / 2**20
        return result

    lowering: Any = GraphLowering
    lowering.codegen_with_cpp_wrapper = generate_and_count
    try:
        yield counted
    finally:
        lowering.codegen_with_cpp_wrapper = generate


def _kind_of(node: Any) -> str:
    """Of a node of inductor's scheduler."""
    if node.is_extern():
        target = node.node
        kernel = getattr(target, "python_kernel_name", None) or type(target).__name__
        if type(target).__name__ == "UserDefinedTritonKernel":
            return "ours"
        return _LIBRARY.get(kernel.rpartition(".")[2], kernel)
    return "reduction" if node.is_reduction() else "elementwise"
