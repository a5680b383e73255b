"""A kernel compiled for one GPU architecture, and how to launch it: no Python and no Triton needed any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rt.decode import decode
from rt.expression import evaluate

Constant = int | float | bool | str
"""A compile-time argument of a kernel."""


def integers(constants: Mapping[str, Constant]) -> dict[str, int]:
    """What formulas may name of the compile-time constants."""
    return {name: value for name, value in constants.items() if isinstance(value, int)}


@dataclass(frozen=True, kw_only=True)
class TensorArgument:
    """A pointer that a kernel takes.

    Attributes:
        name: Of the parameter.
        shape: A formula (`rt.expression`) a dimension, over the sizes and integer constants of the kernel; contiguous,
            the last fastest. Starts at a multiple of 16 bytes.
        dtype: Its numpy or ml_dtypes name, such as float16, bfloat16, uint8.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str

    def extent(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for `sizes`."""
        return tuple(int(evaluate(text, sizes)) for text in self.shape)


@dataclass(frozen=True, kw_only=True)
class KernelImage:
    """One kernel's code, good for one set of compile-time constants and any sizes it does not fix.

    The arguments are, in this order: a pointer an input, a 32-bit integer a scalar, a pointer an output.

    Attributes:
        kernel: Name of the `KernelSpec`.
        name: Unique in a bundle or library; says kernel, formats, constants and architecture.
        symbol: The entry point.
        capability: Compute capability it was compiled for, such as 90; see `runs_on`.
        file: Path of the code, inside a bundle or relative to the list that holds this record: a cubin, or PTX where
            the name ends so.
        sizes: Sizes that were fixed when it was compiled, such as the width of a head.
        constants: What else was fixed: attributes and tile sizes.
        inputs: Pointers that are read.
        scalars: Parameter to formula over the sizes.
        outputs: Pointers that are written; those that are read before, too, stand here.
        grid: Formulas over sizes and constants, one to three.
        threads: In a block.
        shared_bytes: Dynamic shared memory.
        registers: Of a thread.
    """

    kernel: str
    name: str
    symbol: str
    capability: int
    file: str
    sizes: Mapping[str, int]
    constants: Mapping[str, Constant]
    inputs: tuple[TensorArgument, ...]
    scalars: Mapping[str, str]
    outputs: tuple[TensorArgument, ...]
    grid: tuple[str, ...]
    threads: int
    shared_bytes: int
    registers: int

    @property
    def is_ptx(self) -> bool:
        """Whether the driver compiles it when it loads."""
        return self.file.endswith(".ptx")

    def runs_on(self, capability: int) -> bool:
        """Whether a GPU of that compute capability executes it.

        A cubin holds for one major version, upwards, and PTX for all that came later.
        https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#application-compatibility
        """
        same = capability // 10 == self.capability // 10
        return capability >= self.capability and (same or self.is_ptx)

    def launch_grid(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """Blocks in x, y and z for `sizes`."""
        names = {**integers(self.constants), **self.sizes, **sizes}
        blocks = [int(evaluate(text, names)) for text in self.grid]
        x, y, z = [*blocks, 1, 1][:3]
        return x, y, z

    def scalar_values(self, sizes: Mapping[str, int]) -> list[int]:
        """The 32-bit integers for `sizes`, in order."""
        return [int(evaluate(text, {**self.sizes, **sizes})) for text in self.scalars.values()]

    def extent(self, argument: TensorArgument, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one of its arguments for `sizes`."""
        return argument.extent({**integers(self.constants), **self.sizes, **sizes})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KernelImage:
        """From what `to_json` gave; raises as `decode`."""
        return decode(cls, data, "kernel")
