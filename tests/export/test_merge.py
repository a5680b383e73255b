"""Merged graphs compute what they did before, and with fewer operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rt.config import DType
from rt.export.checkpoint import open_checkpoint
from rt.export.observe import observe
from rt.export.operators import ops
from rt.export.passes.cast import cast
from rt.export.passes.early_bias import early_bias
from rt.export.passes.fuse import fuse
from rt.export.passes.layout import channels_last
from rt.export.passes.merge import merge
from rt.export.passes.quantize import FP8, Range, products, quantize
from rt.export.passes.shapes import attribute
from rt.export.passes.sink import sink
from rt.export.program import Program, trace_program
from rt.export.trace import trace
from rt.export.unet import split_context, split_time, trace_step
from rt.model import Component, Family
from rt.shapes import ShapeProfile

aten = torch.ops.aten


def outputs(program: Program, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [*program.module(**inputs)]


def far(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(got, expected, strict=True))


def operators(program: Program) -> Counter[Any]:
    return Counter(node.target for node in program.module.graph.nodes if node.op == "call_function")


def fused(program: Program) -> Program:
    return program.rewritten("layout", channels_last).rewritten("fuse", fuse)


def fresh(program: Program) -> dict[str, Tensor]:
    return {name: torch.randn(value.shape) for name, value in program.inputs.items()}


@pytest.mark.parametrize("family", Family)
def test_a_step_is_the_same_with_fewer_operators(folder: Callable[[Family], Path], family: Family) -> None:
    checkpoint = open_checkpoint(str(folder(family)))
    side = checkpoint.spec.sample_size * checkpoint.spec.vae_scale_factor  # type: ignore[operator]
    network = checkpoint.load(Component.UNET)
    step = trace_step(network, checkpoint.spec, ShapeProfile(side, side), {}, guided=True)
    before = fused(split_time(split_context(step.rewritten("sink", sink))[1])[1])
    inputs = fresh(before)
    expected, counted = outputs(before, inputs), operators(before)
    # The passes change graphs in place.
    after = before.rewritten("merge", merge)
    assert far(outputs(after, inputs), expected) < 1e-5
    merged = operators(after)
    attentions = [merged[ops.self_attention.default], merged[ops.query_attention.default]]
    # The query of the first block that meets the text is that of both sides, and comes repeated, but in SDXL.
    assert sum(attentions) + merged[ops.attention.default] == counted[ops.attention.default]
    half = counted[ops.attention.default] // 2
    assert attentions == [half, half - (family is not Family.SDXL)]
    assert merged[ops.geglu_linear.default] == counted[ops.geglu.default] > 0
    assert ops.geglu.default not in merged
    # Of each block less: two of three products, the query's, GEGLU's; of each transformer the last but one.
    transformers = sum(name.endswith(".proj_out") for name, _ in network.named_modules())
    less = 2 * attentions[0] + attentions[1] + merged[ops.geglu_linear.default] + transformers
    assert counted[aten.linear.default] - merged[aten.linear.default] == less
    norms = [node for node in after.module.graph.nodes if node.target is ops.group_norm.default]
    assert norms and all(len(norm.args) == 7 for norm in norms)
    # Every residual block adds its timestep in a norm, but for the one of SDXL whose timestep takes the sides apart.
    added = [norm for norm in norms if norm.args[6].op != "get_attr"]
    blocks = sum(name.endswith(".time_emb_proj") for name, _ in network.named_modules())
    assert len(added) == blocks - (family is Family.SDXL)


def test_the_bias_of_a_convolution_moves_to_the_timestep(folder: Callable[[Family], Path]) -> None:
    checkpoint = open_checkpoint(str(folder(Family.SD1)))
    side = checkpoint.spec.sample_size * checkpoint.spec.vae_scale_factor  # type: ignore[operator]
    network = checkpoint.load(Component.UNET)
    parameters = {name: value.clone() for name, value in network.named_parameters()}
    step = trace_step(network, checkpoint.spec, ShapeProfile(side, side), {})
    assert [record.name for record in step.passes][-1] == "early bias"
    blocks = sum(name.endswith(".time_emb_proj") for name, _ in network.named_modules())
    without = [
        node
        for node in step.module.graph.nodes
        if node.target is aten.conv2d.default and (len(node.args) < 3 or node.args[2] is None)
    ]
    assert len(without) == blocks > 0
    inputs = fresh(step) | {"timestep": torch.tensor([321.0])}
    expected = network(inputs["latents"], inputs["timestep"], inputs["context"]).sample
    assert far(outputs(step, inputs), [expected]) < 1e-5
    assert all(torch.equal(value, parameters[name]) for name, value in network.named_parameters())


def test_a_decoder_is_the_same_merged(folder: Callable[[Family], Path]) -> None:
    checkpoint = open_checkpoint(str(folder(Family.SD1)))
    network = checkpoint.load(Component.VAE_DECODER)
    [program] = trace(Component.VAE_DECODER, network, checkpoint.spec, (ShapeProfile(32, 48),))
    before = fused(program)
    inputs = fresh(before)
    expected = outputs(before, inputs)
    after = before.rewritten("merge", merge)
    assert far(outputs(after, inputs), expected) < 1e-5
    assert operators(after)[ops.self_attention.default] == 1


class Composed(nn.Module):
    """Two linear layers with a sum between; what is between them may be read by somebody else, or be a product."""

    def __init__(
        self, *, wide: int = 8, between: Callable[[Tensor], Tensor] = lambda x: x, bias: bool = True
    ) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 8, bias=bias), nn.Linear(8, wide, bias=bias)
        self.between = between

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (self.outer(self.between(y + self.inner(x))),)


class Twice(Composed):
    """What is between is read twice."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        total = y + self.inner(x)
        return (self.outer(total) * total,)


@pytest.mark.parametrize(
    ("net", "linears"),
    [
        (Composed(), 1),
        (Composed(bias=False), 1),
        (Composed(wide=4), 1),
        (Composed(between=lambda x: x.view(1, 2, 3, 8)), 1),
        (Composed(wide=16), 2),  # would be more work
        (Composed(between=torch.relu), 2),
        (Twice(), 2),
    ],
    ids=["bias", "no bias", "narrow", "a view", "wide", "relu", "read twice"],
)
def test_linear_layers_with_a_sum_between_are_one(net: nn.Module, linears: int) -> None:
    inputs = {"x": torch.randn(1, 6, 32), "y": torch.randn(1, 6, 8)}
    program = trace_program("net", Component.UNET, None, net, inputs, ("z",))
    fresh_inputs = fresh(program)
    expected = outputs(program, fresh_inputs)
    after = replace(program, module=merge(program.module))
    assert operators(after)[aten.linear.default] == linears
    assert far(outputs(after, fresh_inputs), expected) < 1e-5


class Residual(nn.Module):
    """A convolution and what is added to it."""

    def __init__(self, early: nn.Module) -> None:
        super().__init__()
        self.late, self.early = nn.Conv2d(4, 4, 3, padding=1), early

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return (self.late(x) + self.early(t)[:, :, None, None],)


@pytest.mark.parametrize(
    ("early", "biases"),
    [(nn.Linear(8, 4), 1), (nn.Linear(8, 4, bias=False), 2)],
    ids=["moved", "no place for it"],
)
def test_a_bias_moves_where_there_is_one_to_join(early: nn.Module, biases: int) -> None:
    inputs = {"x": torch.randn(1, 4, 5, 5), "t": torch.randn(1, 8)}
    program = trace_program("net", Component.UNET, None, Residual(early), inputs, ("z",))
    expected = outputs(program, inputs)
    after = replace(program, module=early_bias(program.module))
    assert far(outputs(after, inputs), expected) < 1e-6
    convolution = next(n for n in after.module.graph.nodes if n.target is aten.conv2d.default)
    kept = convolution.args[2] is not None
    assert kept == (biases == 2)


def test_layers_in_eight_bits_read_their_scales_from_one_constant() -> None:
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 48))
    inputs = {"input": torch.randn(3, 32)}
    program = trace_program("net", Component.UNET, None, net, inputs, ("z",))
    ranges = {name: Range(-4.0, 3.0) for name in products(program.module, FP8)}
    before = replace(program, module=quantize(program.module, ranges, bits=FP8), outputs=())
    after = replace(before, module=merge(before.module))
    scales = after.module.get_buffer("scales")
    layers = [n for n in after.module.graph.nodes if n.target is ops.linear_fp8.default]
    assert len(layers) == 2 and len(scales) > 8, "or they would be written into the code, each by a kernel"
    for row, node in enumerate(layers):
        assert scales[row].tolist() == pytest.approx(node.args[3:5])
        assert (node.args[5].target, node.args[5].args[1:]) == (aten.select.int, (0, row))
    assert torch.equal(outputs(after, inputs)[0], outputs(before, inputs)[0])


class Gated(nn.Module):
    """GEGLU whose gate leaves fp16 while its result does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        with torch.no_grad():
            self.up.weight[8:] = -4000.0
            self.up.weight[:8] *= 0.1

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (ops.geglu(self.up(x)),)


def test_a_product_inside_an_operator_that_leaves_fp16_stays_in_fp32() -> None:
    program = trace_program("net", Component.UNET, None, Gated(), {"x": torch.rand(2, 3, 8) + 4}, ("z",))
    after = replace(program, module=merge(program.module))
    assert operators(after)[ops.geglu_linear.default] == 1
    half, islands = cast(after.module, DType.FP16, observe(after, torch.float16))
    assert len(islands) == 1 and "geglu_linear: reach" in islands[0]
    with torch.no_grad():
        assert all(value.isfinite().all() for value in half(**after.inputs))


class Ends(nn.Module):
    """A norm of a convolution that something else reads, too, and a convolution of few channels at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.first(x)
        return (self.last(x + self.norm(x)),)


def test_a_norm_adds_the_bias_of_the_convolution_before_it_and_short_biases_are_padded() -> None:
    program = trace_program("net", Component.UNET, None, Ends(), {"x": torch.randn(2, 4, 8, 8)}, ("z",))
    before = fused(program)
    inputs = fresh(before)
    expected = outputs(before, inputs)
    after = before.rewritten("merge", merge)
    assert far(outputs(after, inputs), expected) < 1e-5
    [norm] = [node for node in after.module.graph.nodes if node.target is ops.group_norm.default]
    bias = after.module.get_buffer(norm.args[6].target)
    assert torch.equal(bias, dict(after.module.named_parameters())["first.bias"][None])
    first, last = (node for node in after.module.graph.nodes if node.target is aten.conv2d.default)
    assert first.args[2] is None
    assert last.args[2].target is aten.slice.Tensor and len(attribute(last.args[2].args[0])) == 16
