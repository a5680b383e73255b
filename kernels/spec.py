"""`KernelSpec`: everything that is known of a kernel besides its code.

A kernel's parameters are, in this order: a pointer an input, an int32 a scalar, a pointer an output, then compile-time
constants. That is the order of TensorRT's quickly deployable plugins, so one compiled kernel serves TensorRT, our own
loop and C++ hosts alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rt.expression import evaluate
from rt.kernel_image import Constant, TensorArgument, integers

if TYPE_CHECKING:
    import torch

BYTES = {"float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint8": 1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One instance of an op.

    Attributes:
        sizes: A value for every size that the spec's shapes are written in.
        dtype: What the type variable "T" of its arguments stands for.
        attributes: What changes the result besides the tensors: eps, activation.
    """

    sizes: Mapping[str, int]
    dtype: str = "float16"
    attributes: Mapping[str, Constant] = field(default_factory=dict)

    def __str__(self) -> str:
        """`float16 batch=2 pixels=4096 eps=1e-05`, for test names and reports."""
        parts = {**self.sizes, **self.attributes}
        return " ".join([self.dtype, *(f"{name}={value}" for name, value in parts.items())])


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a case is compiled: tile sizes and other constants that do not change the result, warps, pipeline stages."""

    constants: Mapping[str, int]
    warps: int
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that the compiled kernel may need, on every architecture of its spec; spills are never allowed."""

    registers: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One op.

    Attributes:
        name: Of the op, the file and the entry point.
        kernel: The Triton function.
        inputs: Pointers that are read, their dtype a name or the type variable "T".
        outputs: Pointers that are written.
        inplace: Which outputs are read first.
        scalars: int32 parameter to formula over the sizes.
        fixed: Sizes that are compile-time constants of the kernel, by the parameter's own name.
        config: The compiled form for a case.
        grid: Formulas over sizes and constants, one to three.
        bounds: Formulas over sizes and constants, of what the kernel works out in 32 bits beyond its scalars. The C
            library refuses a launch where one is not below 2³¹.
        reference: (inputs and in-place outputs as fp32 or integer tensors, attributes by name) → outputs, in torch.
        cases: For tests: every branch, ragged sizes.
        workloads: Name to case: what the models run, for benchmarks and the compiled library.
        flops: Of a case, two a multiply-add; 0 for what only moves data.
        tolerance: Largest allowed absolute error relative to the reference's largest value, by "T".
        budget: See `Budget`.
        examples: Input or in-place output to how tests draw it; floats without an entry are standard normal, and
            integers must have one.
        alternatives: Name to a torch function with the reference's arguments in "T": what else a user could run.
        hopper: The same op with the tiles, the cases that reach them and the budget of a GPU of capability 9.0, which
            has 227 KiB of shared memory for a block and products of 64 by 256; None where they are the same.
        descriptors: Inputs and outputs that the kernel takes as TMA descriptors, to the block that is moved at once, as
            formulas over the constants. They are 128 bytes that CUDA's driver makes of a pointer, and neither TensorRT
            nor our launcher passes any: such a kernel is for Triton's launcher and inductor, from capability 9.0 on.
    """

    name: str
    kernel: Any
    inputs: tuple[TensorArgument, ...]
    outputs: tuple[TensorArgument, ...]
    config: Callable[[Case], Config]
    grid: tuple[str, ...]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    cases: tuple[Case, ...]
    workloads: Mapping[str, Case]
    tolerance: Mapping[str, float]
    budget: Budget
    inplace: frozenset[str] = frozenset()
    scalars: Mapping[str, str] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()
    flops: Callable[[Case], int] = lambda case: 0
    examples: Mapping[str, Callable[[Case, torch.Generator], torch.Tensor]] = field(default_factory=dict)
    alternatives: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    hopper: KernelSpec | None = None
    descriptors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def on(self, capability: int) -> KernelSpec:
        """As it is compiled for GPUs of `capability`."""
        return self if self.hopper is None or capability != 90 else self.hopper

    @property
    def read(self) -> tuple[TensorArgument, ...]:
        """The arguments of the reference: inputs, then the outputs that are read first."""
        return (*self.inputs, *(argument for argument in self.outputs if argument.name in self.inplace))

    def extent(self, argument: TensorArgument, case: Case) -> tuple[int, ...]:
        """The shape of `argument`; its formulas may name integer constants, too, such as the pixels of a chunk."""
        return argument.extent({**case.sizes, **integers(self.constants(case))})

    def dtype(self, argument: TensorArgument, case: Case) -> str:
        """The format of `argument`."""
        return case.dtype if argument.dtype == "T" else argument.dtype

    def bytes(self, case: Case) -> int:
        """What the case reads and writes at the least."""
        return sum(
            math.prod(self.extent(argument, case)) * BYTES[self.dtype(argument, case)]
            for argument in (*self.read, *self.outputs)
        )

    def constants(self, case: Case) -> dict[str, Constant]:
        """Every compile-time argument of the kernel, by name."""
        fixed = {name: case.sizes[name] for name in self.fixed}
        return {**fixed, **case.attributes, **self.config(case).constants}

    def block(self, argument: str, case: Case) -> list[int]:
        """What the descriptor of `argument` moves at once."""
        names = integers(self.constants(case))
        return [int(evaluate(text, names)) for text in self.descriptors[argument]]

    def blocks(self, case: Case) -> tuple[int, ...]:
        """The grid of the case."""
        names = {**case.sizes, **integers(self.constants(case))}
        return tuple(int(evaluate(text, names)) for text in self.grid)
