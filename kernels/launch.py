"""Run a kernel on torch tensors, on a GPU or in Triton's interpreter, and hold it to its reference.

Outputs start as NaN, or as the largest integer, and each tensor lies between guards. Those of inputs are NaN, too, so
that a value read from beyond the end shows; those of outputs are numbers that no kernel writes, so that NaN shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from rt.errors import ConfigError
from rt.expression import evaluate
from rt.kernels.interpreter import widen_products
from rt.kernels.spec import Case, KernelSpec

GUARD = 4096
"""Bytes before and after each tensor, a multiple of the 16 that kernels may rely on."""
UNLIKELY = 0xA5
"""A byte; a number of them is tiny, and finite in every format."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A kernel's output beside the reference's.

    Attributes:
        error: Largest absolute difference relative to the reference's largest value; NaN where something is NaN.
        tolerance: What the spec allows.
        broken: Tensors that were written beyond their ends.
    """

    error: float
    tolerance: float
    broken: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the kernel is right."""
        return self.error <= self.tolerance and not self.broken


def run(spec: KernelSpec, case: Case, tensors: Mapping[str, Tensor]) -> None:
    """Launch `case` on `tensors`, all inputs and outputs by name; returns before a GPU has finished.

    A GPU runs what is compiled for it, the interpreter the spec as it is.
    """
    if knobs.runtime.interpret:
        widen_products()
    if next(iter(tensors.values())).is_cuda:
        major, minor = torch.cuda.get_device_capability()
        spec = spec.on(10 * major + minor)
    config = spec.config(case)
    scalars = [int(evaluate(text, case.sizes)) for text in spec.scalars.values()]
    given: dict[str, Any] = dict(tensors)
    for name in spec.descriptors:
        given[name] = TensorDescriptor.from_tensor(tensors[name], spec.block(name, case))
    inputs, outputs = ([given[argument.name] for argument in group] for group in (spec.inputs, spec.outputs))
    options = {"num_warps": config.warps, "num_stages": config.stages}
    spec.kernel[spec.blocks(case)](*inputs, *scalars, *outputs, **spec.constants(case), **options)


def draw(spec: KernelSpec, case: Case, seed: int) -> dict[str, Tensor]:
    """A value for everything that the kernel reads, in its format, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for argument in spec.read:
        dtype = getattr(torch, spec.dtype(argument, case))
        if argument.name in spec.examples:
            value = spec.examples[argument.name](case, generator)
        elif dtype.is_floating_point:
            value = torch.randn(spec.extent(argument, case), generator=generator)
        else:
            raise ConfigError(
                f"{spec.name}: {argument.name} is {argument.dtype} and has no example; add one to SPEC.examples"
            )
        if value.shape != spec.extent(argument, case):
            raise ConfigError(
                f"{spec.name}: the example of {argument.name} is {tuple(value.shape)}, its shape "
                f"{spec.extent(argument, case)} for {case}"
            )
        drawn[argument.name] = value.to(dtype)
    return drawn


def try_case(spec: KernelSpec, case: Case, seed: int, device: str) -> Outcome:
    """Run `case` on values drawn with `seed` and compare; `device` is cuda, or cpu in the interpreter."""
    drawn = draw(spec, case, seed)
    guarded = {
        argument.name: _Guarded(
            spec.extent(argument, case), spec.dtype(argument, case), device, read=argument in spec.read
        )
        for argument in (*spec.inputs, *spec.outputs)
    }
    for name, value in drawn.items():
        guarded[name].tensor.copy_(value)
    run(spec, case, {name: one.tensor for name, one in guarded.items()})
    operands = [_exact(value) for value in drawn.values()]
    expected = spec.reference(*operands, **case.attributes)
    if len(expected) != len(spec.outputs):
        raise ConfigError(
            f"{spec.name}: the reference has {len(expected)} results, the kernel {len(spec.outputs)}"
        )
    errors = []
    for argument, value in zip(spec.outputs, expected, strict=True):
        result = guarded[argument.name].tensor
        if result.shape != value.shape:
            raise ConfigError(
                f"{spec.name}: the reference gave {tuple(value.shape)} for {tuple(result.shape)} of {argument.name}"
            )
        errors.append(_difference(result, value))
    return Outcome(
        error=max(errors, key=lambda error: (error != error, error)),
        tolerance=spec.tolerance[case.dtype],
        broken=tuple(name for name, one in guarded.items() if not one.intact()),
    )


class _Guarded:
    """A poisoned tensor between guards, in one allocation."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str, *, read: bool) -> None:
        kind: torch.dtype = getattr(torch, dtype)
        poison = float("nan") if kind.is_floating_point else torch.iinfo(kind).max
        guard, count = GUARD // kind.itemsize, torch.Size(shape).numel()
        memory = torch.full((count + 2 * guard,), poison, dtype=kind, device=device)
        self.tensor = memory[guard : guard + count].view(shape)
        self.guards = [end.view(torch.uint8) for end in (memory[:guard], memory[-guard:])]
        if not read:
            for end in self.guards:
                end.fill_(UNLIKELY)
        self.before = [end.clone() for end in self.guards]

    def intact(self) -> bool:
        return all(map(torch.equal, self.guards, self.before))


def _exact(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _difference(result: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest value expected, or over 1 where all are 0."""
    result, expected = result.cpu().double(), expected.double()
    return float((result - expected).abs().max() / (expected.abs().max() or 1))
