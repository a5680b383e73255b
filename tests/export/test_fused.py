"""Channels last and fused: the same function, and what it is made of."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from rt.export import operators
from rt.export.build import default_profiles
from rt.export.checkpoint import open_checkpoint
from rt.export.lower import WeightFile, lower
from rt.export.passes.fuse import fuse
from rt.export.passes.layout import channels_last
from rt.export.program import Program, trace_program
from rt.export.trace import trace
from rt.model import Component

aten = torch.ops.aten


def fused(program: Program) -> Program:
    return program.rewritten("layout", channels_last).rewritten("fuse", fuse)


def operations(program: Program) -> Counter[object]:
    return Counter(node.target for node in program.module.graph.nodes if node.op == "call_function")


@pytest.fixture(scope="module", params=[Component.UNET, Component.VAE_DECODER, Component.VAE_ENCODER])
def programs(request: pytest.FixtureRequest) -> list[Program]:
    checkpoint = open_checkpoint("synthetic:tiny")
    module = checkpoint.load(request.param)
    made = trace(request.param, module, checkpoint.spec, default_profiles(checkpoint))
    return [program for program in made if program.profile is not None]


def test_the_same_function(programs: list[Program]) -> None:
    for program in programs:
        inputs = {name: torch.randn_like(value) for name, value in program.inputs.items()}
        with torch.inference_mode():
            before = program.module(**inputs)
            after = fused(program).module(**inputs)
        for expected, got in zip(before, after, strict=True):
            assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_what_is_fused(programs: list[Program]) -> None:
    for program in programs:
        before, after = operations(program), operations(fused(program))
        ops = operators.ops
        assert after[ops.attention.default] == before[aten.scaled_dot_product_attention.default] > 0
        assert after[ops.group_norm.default] == before[aten.group_norm.default] > 0
        assert after[ops.geglu.default] == before[aten.gelu.default]
        assert after[ops.convolution.default] > 0
        assert not after[aten.silu.default] and not after[aten.gelu.default]
        assert not after[aten.scaled_dot_product_attention.default] and not after[aten.group_norm.default]
        # In and out, around each convolution that stays as it was, and the shallow features.
        stayed = after[aten.conv2d.default]
        assert after[aten.permute.default] <= 2 * stayed + 2


def test_products_stay_the_same_work(programs: list[Program]) -> None:
    for program in programs:
        layout, fusion = fused(program).passes[-2:]
        assert layout.flops[0] == layout.flops[1] == fusion.flops[1]


def test_onnx_functions_compute_the_operators(programs: list[Program], tmp_path) -> None:
    program = fused(programs[0])
    inputs = {name: torch.randn_like(value) for name, value in program.inputs.items()}
    with torch.inference_mode():
        expected = program.module(**inputs)
    with WeightFile(tmp_path / "weights") as weights:
        lower(program, program.module, weights, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    for ours, theirs in zip(expected, got, strict=True):
        assert np.linalg.norm(theirs - ours.numpy()) <= 1e-4 * np.linalg.norm(ours.numpy())


class Awkward(nn.Module):
    """What the kernels do not take: strides, groups, few channels, a norm that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Conv2d(5, 32, 3, padding=1)
        self.strided = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(32, 48, 1)
        self.bare = nn.Conv2d(48, 32, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, 32)
        self.plain = nn.GroupNorm(4, 32, affine=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.plain(self.bare(self.pointwise(self.grouped(self.strided(self.few(x))))))
        x = self.norm(x)
        half, rest = x.chunk(2, 1)
        return nn.functional.silu(x), x.permute(0, 2, 3, 1), half * nn.functional.gelu(rest), x.mean(1)


def test_what_the_kernels_do_not_take_stays_as_it_was() -> None:
    x = torch.randn(2, 5, 12, 10)
    with torch.no_grad():
        program = trace_program(
            "awkward", Component.UNET, None, Awkward(), {"x": x}, ("silu", "moved", "gated", "mean")
        )
        after = fused(program)
        for expected, got in zip(program.module(x=x), after.module(x=x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    counted = operations(after)
    assert counted[aten.conv2d.default] == 4 and counted[operators.ops.convolution.default] == 0
    assert counted[operators.ops.geglu.default] == 0
    assert counted[aten.group_norm.default] == 1, "the one without weights"
    assert counted[aten.silu.default] == 1, "the norm has other readers, so that it cannot end in SiLU"


class Twice(nn.Module):
    """SiLU of SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (nn.functional.silu(nn.functional.silu(self.norm(x))),)


def test_a_norm_takes_one_silu() -> None:
    x = torch.randn(1, 32, 6, 6)
    with torch.no_grad():
        program = trace_program("twice", Component.UNET, None, Twice(), {"x": x}, ("y",))
        after = fused(program)
        torch.testing.assert_close(after.module(x=x)[0], program.module(x=x)[0], rtol=1e-5, atol=1e-5)
    assert operations(after)[aten.silu.default] == 1


class OneTensor(nn.Module):
    """Attention whose queries, keys and values are one tensor."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        heads = x.view(2, 10, 4, 8).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return (y.transpose(1, 2).reshape(2, 10, 32),)


def test_attention_of_one_tensor_with_itself() -> None:
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        program = trace_program("one", Component.UNET, None, OneTensor(), {"x": x}, ("y",))
        expected = program.module(x=x)
        after = fused(program)
        torch.testing.assert_close(after.module(x=x), expected, rtol=1e-5, atol=1e-5)
    assert operations(after)[operators.ops.attention.default] == 1
