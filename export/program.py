"""`Program`: one traced graph, the IR that passes rewrite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from rt.bundle import PassRecord
from rt.export.passes.cost import cost
from rt.export.passes.fold import fold
from rt.export.passes.simplify import simplify
from rt.export.torch_rework import without_rework
from rt.model import Component
from rt.shapes import ShapeProfile


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A traced graph with example inputs that are also its test inputs.

    Attributes:
        name: Unique in a build, such as `unet-1x512x512-guided`.
        component: What was traced.
        profile: The shape it is for, None for text.
        guided: U-Net only: whether the batch is repeated inside for classifier-free guidance.
        module: The fx graph with its weights; parameters are shared with the component.
        inputs: Name to example, in the order of the graph.
        outputs: Names in the order of the graph.
        passes: What has rewritten it, and what that saved.
    """

    name: str
    component: Component
    profile: ShapeProfile | None
    guided: bool
    module: fx.GraphModule
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    passes: tuple[PassRecord, ...] = ()

    def rewritten(self, name: str, rewrite: Callable[[fx.GraphModule], fx.GraphModule]) -> Program:
        """The program after a pass, with a record of what it saved. The pass may change the graph in place."""
        before = cost(self.module)
        module = rewrite(self.module)
        after = cost(module)
        record = PassRecord(
            name=name,
            nodes=(before.nodes, after.nodes),
            flops=(before.flops, after.flops),
            bytes=(before.bytes, after.bytes),
        )
        return replace(self, module=module, passes=(*self.passes, record))


def narrowed(program: Program, names: Collection[str]) -> Program:
    """With those inputs in fp16, as they are read: to cast them would be a launch each, in every step."""
    inputs = {name: value.half() if name in names else value for name, value in program.inputs.items()}
    return replace(program, inputs=inputs)


def trace_program(
    name: str,
    component: Component,
    profile: ShapeProfile | None,
    wrapper: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    *,
    guided: bool = False,
) -> Program:
    """Trace `wrapper` on `inputs`, before decomposition, and drop what inference does not need."""
    with torch.no_grad(), without_rework():
        exported = torch.export.export(wrapper.eval(), (), dict(inputs), strict=False)
        program = Program(
            name=name,
            component=component,
            profile=profile,
            guided=guided,
            module=exported.module(check_guards=False),
            inputs=inputs,
            outputs=outputs,
        )
        return program.rewritten("simplify", simplify).rewritten("fold", fold)
