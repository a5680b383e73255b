"""Rewrites of a traced graph keep its result: exactly, or as far as the format goes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from rt.config import DType
from rt.errors import BuildError, NumericsError
from rt.export.lower import WeightFile, lower
from rt.export.observe import Observation, norm_loss, observe
from rt.export.passes.cast import cast, in_range
from rt.export.passes.cost import cost, moved
from rt.export.passes.fold import fold
from rt.export.passes.hoist import hoist
from rt.export.passes.rescale import rescale
from rt.export.passes.shallow import split_shallow
from rt.export.passes.shapes import value
from rt.export.passes.simplify import simplify
from rt.export.passes.sink import repeated, sink
from rt.export.program import Program
from rt.model import Component

aten = torch.ops.aten


def program(net: nn.Module, **inputs: Tensor) -> Program:
    exported = torch.export.export(net.eval(), (), inputs, strict=False)
    return Program(
        name="net",
        component=Component.UNET,
        profile=None,
        guided=False,
        module=exported.module(check_guards=False),  # type: ignore[arg-type]
        inputs=inputs,
        outputs=("y",),
    )


def targets(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


class Leftovers(nn.Module):
    """Everything that `simplify` drops, and beside each something that it must keep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h = self.dropout(self.linear(x).to(torch.float32)).contiguous().clone()
        h = h + x.to(torch.float64).to(torch.float32) + torch.ops.aten.alias(x).transpose(0, 1).contiguous()
        unused = h * 3  # noqa: F841
        return (h.to(device="cpu"),)


def test_simplify_is_exact_and_drops_what_it_says() -> None:
    x = torch.randn(8, 8)
    before = program(Leftovers(), x=x)
    dropped = {
        aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
        aten._assert_tensor_metadata.default,
    }  # fmt: skip
    assert {aten.dropout.default, aten.clone.default, aten._assert_tensor_metadata.default} < {
        *targets(before.module)
    }
    for fresh in (x, torch.randn(8, 8)):
        expected = before.module(x=fresh)[0]
        after = simplify(torch.export.export(Leftovers().eval(), (), {"x": fresh}).module(check_guards=False))
        after.load_state_dict(before.module.state_dict())
        assert torch.equal(after(x=fresh)[0], expected)
    assert not dropped & {*targets(after)}
    casts = [node for node in after.graph.nodes if node.target is aten._to_copy.default]
    assert [node.meta["val"].dtype for node in casts] == [torch.float64, torch.float32], "real casts stay"
    assert not any(not node.users and node.op == "call_function" for node in after.graph.nodes), (
        "dead code is gone"
    )
    assert len(targets(after)) < len(targets(before.module))


class Placed(nn.Module):
    """Casts that name a device, as SDXL's second text encoder makes one of its tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = torch.device("cpu")
        return x.to(device, torch.int32) + 1, x.to(device=device, dtype=torch.float64), x.to(device) * 2


def test_simplify_leaves_no_cast_with_a_device() -> None:
    x = torch.randn(8, 8) * 5
    before = program(Placed(), x=x).module
    assert aten.to.device in targets(before) and "cpu" in before.code
    expected = before(x=x)
    after = simplify(before)
    assert targets(after) == [aten._to_copy.default, aten.add.Tensor, aten._to_copy.default, aten.mul.Tensor]
    assert "cpu" not in after.code
    for got, wanted in zip(after(x=x), expected, strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype


class Loud(nn.Module):
    """Goes beyond fp16 in the middle (about 1e6) and comes back to about 1; linear, silu and mul around it."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(32, 32), nn.Linear(32, 32)
        with torch.no_grad():
            self.rise.weight.mul_(3e5)
            self.fall.weight.mul_(1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.fall(self.rise(x) * 2),)


class HeavyWeight(nn.Module):
    """A weight beyond fp16 that meets small inputs, so that every activation is in range."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        with torch.no_grad():
            self.linear.weight.mul_(1e7)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.linear(x * 1e-6),)


class Peaked(nn.Module):
    """Attention whose products of query and key leave fp16 while all of its inputs and outputs are small."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q = (x * 400).reshape(1, 1, -1, 8)
        return (nn.functional.scaled_dot_product_attention(q, q, x.reshape(1, 1, -1, 8)).reshape(x.shape),)


def run_in_onnxruntime(program: Program, module: nn.Module, folder: Path, x: Tensor) -> np.ndarray:
    folder.mkdir()
    with WeightFile(folder / "net.weights") as store:
        lower(program, module, store, folder / "net.onnx")
    session = onnxruntime.InferenceSession(folder / "net.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("net", [Loud(), HeavyWeight(), Peaked()], ids=lambda net: type(net).__name__)
def test_what_leaves_fp16_is_an_island_and_right_where_a_naive_cast_is_not(
    net: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(32, 32)
    traced = program(net, x=x)
    seen = observe(traced, torch.float16)
    blind = Observation(outputs=seen.outputs, magnitudes={}, logits={})
    naive, none = cast(traced.module, DType.FP16, blind)
    ours, islands = cast(traced.module, DType.FP16, seen)
    assert none == () and islands
    assert all("format ends at 6.6e+04" in island for island in islands)
    assert distance(run_in_onnxruntime(traced, ours, tmp_path / "ours", x), seen.outputs["y"]) < 5e-3
    # In torch: onnxruntime keeps fp32 between operators without an fp16 kernel (and torch does inside attention).
    if not isinstance(net, Peaked):
        assert not naive(x=x)[0].isfinite().all()


def test_an_island_says_how_many_of_what_and_why() -> None:
    traced = program(Loud(), x=torch.randn(32, 32))
    _, islands = cast(traced.module, DType.FP16, observe(traced, torch.float16))
    assert [island.partition(": reach ")[0] for island in islands] == ["2 linear", "1 mul"]


class Normed(nn.Module):
    """With `offset`, what the norm reads is far from zero and hardly varies."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.table = nn.Linear(32, 32), nn.LayerNorm(32), nn.Embedding(10, 32)
        with torch.no_grad():
            self.linear.bias += offset

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor]:
        return (nn.functional.silu(self.norm(self.linear(x))) + self.table(tokens),)


@pytest.mark.parametrize(("dtype", "half"), [(DType.FP16, torch.float16), (DType.BF16, torch.bfloat16)])
def test_products_and_norms_are_half_and_the_outside_is_fp32(dtype: DType, half: torch.dtype) -> None:
    inputs = {"x": torch.randn(32, 32), "tokens": torch.randint(10, (32,))}
    traced = program(Normed(), **inputs)
    module, islands = cast(traced.module, dtype, observe(traced, half))
    assert islands == ()
    assert {weight.dtype for weight in module.parameters()} == {half}
    made = formats(module, inputs)
    for op in (aten.linear, aten.embedding, aten.silu, aten.layer_norm):
        assert made[op.default] == half
    result = module(**inputs)[0]
    assert result.dtype == torch.float32
    error = distance(result.detach().numpy(), traced.module(**inputs)[0].detach().numpy())
    assert 1e-5 < error < (3e-3 if dtype is DType.FP16 else 2e-2)


@pytest.mark.parametrize(("dtype", "half"), [(DType.FP16, torch.float16), (DType.BF16, torch.bfloat16)])
def test_a_norm_that_would_lose_too_much_is_an_island(dtype: DType, half: torch.dtype) -> None:
    inputs = {"x": torch.randn(32, 32), "tokens": torch.randint(10, (32,))}
    traced = program(Normed(offset=100.0), **inputs)
    module, (island,) = cast(traced.module, dtype, observe(traced, half))
    assert re.fullmatch(r"1 layer_norm: would lose up to [0-9.e+-]+", island)
    kept = {name: weight.dtype for name, weight in module.named_parameters()}
    assert {name for name, kind in kept.items() if kind == torch.float32} == {
        name for name in kept if "norm" in name
    }
    made = formats(module, inputs)
    assert made[aten.layer_norm.default] == torch.float32 and made[aten.silu.default] == half


def formats(module: nn.Module, inputs: dict[str, Tensor]) -> dict[object, torch.dtype]:
    graph = torch.export.export(module, (), inputs, strict=False).graph
    return {n.target: n.meta["val"].dtype for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_norm_loses_more_far_from_zero_and_all_where_squares_overflow(half: torch.dtype) -> None:
    rows = torch.randn(8, 4096)
    eps = torch.finfo(half).eps
    near, far = (norm_loss(rows + offset, 1e-5, half) for offset in (0.0, 101.7))
    assert 0.1 * eps < near < eps < 3 * eps < far
    loud = norm_loss(rows * 1e3, 1e-5, half)
    assert loud == math.inf if half is torch.float16 else loud < eps
    assert norm_loss(torch.zeros(2, 64), 1e-5, half) == 0.0


def test_a_norm_is_measured_over_what_it_normalizes() -> None:
    x = torch.randn(2, 8, 6, 6)
    x[1, 4:] += 300.0
    group, layer = (
        observe(program(net, x=x), torch.float16).losses.popitem()[1]  # type: ignore[attr-defined]
        for net in (OneOutput(nn.GroupNorm(2, 8)), OneOutput(nn.LayerNorm([6, 6])))
    )
    apart = [norm_loss(rows, 1e-5, torch.float16) for rows in (x.reshape(4, -1), x.reshape(16, -1))]
    assert [group, layer] == pytest.approx(apart)


class OneOutput(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


class Timed(nn.Module):
    """A sinusoid of the timestep, as U-Nets begin."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, t: Tensor) -> tuple[Tensor]:
        return (self.linear(torch.sin(t[:, None] * torch.exp(-torch.arange(32) / 4))),)


def test_the_sinusoid_of_the_timestep_stays_exact_up_to_the_first_product() -> None:
    t = torch.arange(900.0, 1000.0)
    traced = program(Timed(), t=t)
    module, _ = cast(traced.module, DType.BF16, observe(traced))
    expected = traced.module(t=t)[0].detach().numpy()
    assert distance(module(t=t)[0].detach().numpy(), expected) < 1e-2
    rounded = traced.module(t=t.bfloat16().float())[0].detach().numpy()
    assert distance(rounded, expected) > 0.1, "a timestep in bf16 is another one"


def test_the_module_that_is_cast_is_not_changed() -> None:
    inputs = {"x": torch.randn(32, 32), "tokens": torch.randint(10, (32,))}
    traced = program(Normed(), **inputs)
    before, code = traced.module(**inputs)[0], traced.module.code
    cast(traced.module, DType.FP16, observe(traced))
    assert torch.equal(traced.module(**inputs)[0], before) and traced.module.code == code
    assert {weight.dtype for weight in traced.module.parameters()} == {torch.float32}


def test_observe_gives_torchs_outputs_and_every_magnitude() -> None:
    x = torch.randn(32, 32)
    net = Loud()
    traced = program(net, x=x)
    seen = observe(traced)
    with torch.no_grad():
        assert np.array_equal(seen.outputs["y"], net(x)[0].numpy())
        assert float((net.rise(x) * 2).abs().max()) in seen.magnitudes.values()
        assert float(x.abs().max()) in seen.magnitudes.values()
        assert float(net.rise.weight.detach().abs().max()) in seen.magnitudes.values()


def test_the_bound_of_attention_holds_and_is_not_far_off() -> None:
    x = torch.randn(32, 32)
    (bound,) = observe(program(Peaked(), x=x)).logits.values()
    q = (x * 400).reshape(-1, 8)
    largest = float((q @ q.T).abs().max()) / 8**0.5
    assert largest <= bound * 1.0001 < 1.5 * largest


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.exp(x * 1000),)


def test_an_output_that_is_not_finite_in_torch_is_an_error() -> None:
    with pytest.raises(NumericsError, match=r"^unet: output 'y' is not finite in torch in fp32"):
        observe(program(Overflow(), x=torch.ones(2)))


class Blocks(nn.Module):
    """Two blocks that each add a projection of a sinusoid of the timestep, as a U-Net's do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(6, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 3)])
        self.mix = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        phase = timestep[:, None] * torch.arange(1, 4)
        time = nn.functional.silu(self.mlp(torch.cat([phase.sin(), phase.cos()], dim=1)))
        first, second = (block(time) for block in self.blocks)
        return (self.mix(x + first) + second,)


def test_hoist_splits_by_data_dependence_alone() -> None:
    module, x, timestep = Blocks().eval(), torch.randn(3, 4), torch.rand(3) * 999
    with torch.no_grad():
        exported = torch.export.export(module, (), {"x": x, "timestep": timestep}, strict=False)
        early, late = hoist(exported.module(check_guards=False), ["timestep"], "time")
        time = early(timestep)
        (got,) = late(x, *time)
        (expected,) = module(x, timestep)
        (other,) = late(x, *early(timestep + 1))
    assert [value.shape for value in time] == [(3, 4), (3, 3)], "both projections"
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(other, expected)
    assert [n.target for n in late.graph.nodes if n.op == "placeholder"] == ["x", "time_0", "time_1"]
    assert {name for name, _ in late.named_parameters()} == {"mix.weight", "mix.bias"}
    assert not {"sin", "cos", "silu"} & {
        str(n.target).split(".")[1] for n in late.graph.nodes if "aten" in str(n.target)
    }


def rewritten(net: nn.Module, rewrite: Any, **inputs: Tensor) -> fx.GraphModule:
    """The module after a pass, which gives what it gave before, on fresh inputs, too."""
    with torch.no_grad():
        module = rewrite(program(net, **inputs).module)
        for given in (inputs, {name: torch.randn_like(value) for name, value in inputs.items()}):
            torch.testing.assert_close(module(**given), net(**given), rtol=1e-5, atol=1e-5)
    for node in module.graph.nodes:
        assert node.op in ("output", "get_attr") or "val" in node.meta, f"{node} has no shape"
    return module


class Constants(nn.Module):
    """A table of constants, and arithmetic that changes nothing beside some that looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        table = torch.exp(torch.arange(4) / 4)
        nothing = ((x / 1.0) * 1 + 0).reshape(3, 4).expand(3, 4) - 0
        return self.linear(nothing * table + 1) / 2, whole / 1.0


def test_fold_computes_constants_and_drops_what_changes_nothing() -> None:
    x, whole = torch.randn(3, 4), torch.randint(9, (3,))
    net = Constants()
    after = fold(program(net, x=x, whole=whole).module)
    names = [str(target).split(".")[1] for target in targets(after)]
    assert names == ["mul", "add", "linear", "div", "div"], "a whole number divided is a float"
    with torch.no_grad():
        for got, expected in zip(after(x=x, whole=whole), net(x, whole), strict=True):
            assert torch.equal(got, expected) and got.dtype == expected.dtype


class Halves(nn.Module):
    """Repeats its input as guidance does, then treats rows alike, then mixes in a text, with a skip connection."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.norm, self.q, self.k = nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.change = change

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor]:
        skip = self.conv_in(torch.cat([x, x]))
        h = self.change(nn.functional.silu(self.norm(skip)))
        rows = self.q(h.permute(0, 2, 3, 1).reshape(len(h), 36, 8)).view(-1, 36, 2, 4).transpose(1, 2)
        keys = self.k(text).view(-1, 5, 2, 4).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(rows, keys, keys)
        h = skip + mixed.transpose(1, 2).reshape(len(h), 6, 6, 8).permute(0, 3, 1, 2)
        return (self.conv_out(torch.cat([h, skip], dim=1)),)


def rows_of(module: fx.GraphModule, target: Any) -> list[int]:
    return [len(value(node)) for node in module.graph.nodes if node.target is target]


@pytest.mark.parametrize("batch", [1, 3])
def test_sink_moves_the_repeat_to_where_the_text_comes_in(batch: int) -> None:
    x, text = torch.randn(batch, 4, 6, 6), torch.randn(2 * batch, 5, 8)
    module = rewritten(Halves(), sink, x=x, text=text)
    assert rows_of(module, aten.conv2d.default) == [batch, 2 * batch]
    assert rows_of(module, aten.group_norm.default) == rows_of(module, aten.silu.default) == [batch]
    assert rows_of(module, aten.linear.default) == [batch, 2 * batch]
    nodes = [*module.graph.nodes]
    queries, skip = [node for node in nodes if repeated(node) is not None]
    attention = next(n for n in nodes if n.target is aten.scaled_dot_product_attention.default)
    assert attention.args[0] is queries
    assert nodes.index(attention) < nodes.index(skip), "late"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.flip(0),
        lambda h: h.softmax(0),
        lambda h: h - h.mean(0, keepdim=True) * 2,
        lambda h: h + torch.arange(6.0)[:, None, None, None],
        lambda h: h.transpose(0, 1).reshape(h.shape),
        lambda h: torch.cat([h[1:], h[:1]]),
        lambda h: h * h.flatten(1).sum(),
        lambda h: h.permute(1, 0, 2, 3).reshape(h.shape),
        lambda h: torch.cat([h.chunk(2)[1] * 3, h.chunk(2)[0]]),
        lambda h: nn.functional.layer_norm(h, h.shape),
    ],
)
def test_sink_stops_where_rows_meet(change: Callable[[Tensor], Tensor]) -> None:
    """Ops that mix or tell apart the rows of a batch see all of them."""
    rewritten(Halves(change), sink, x=torch.randn(3, 4, 6, 6), text=torch.randn(6, 5, 8))


def test_sink_without_a_repeat_changes_nothing() -> None:
    before = program(Blocks(), x=torch.randn(3, 4), timestep=torch.rand(3))
    assert targets(sink(before.module)) == targets(before.module)


class Skips(nn.Module):
    """Two levels with skip connections: the outer one costs little."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 32, 3, padding=1)])
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(64, 8, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)])

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        outer = self.down[0](latents)
        inner = self.down[1](outer)
        h = self.up[0](torch.cat([self.middle(inner), inner], dim=1))
        return (self.up[1](torch.cat([h, outer], dim=1)),)


def test_the_shallow_step_is_what_costs_least_of_those_that_see_the_latents() -> None:
    latents, net = torch.randn(2, 4, 6, 6), Skips()
    full, shallow = split_shallow(program(net, latents=latents).module, "latents", "deep")
    with torch.no_grad():
        prediction, deep = full(latents)
        assert torch.equal(prediction, net(latents)[0])
        assert torch.equal(shallow(latents, deep)[0], prediction), "exact on the latents of the full step"
        assert not torch.equal(shallow(latents + 1, deep)[0], prediction)
    assert deep.shape == (2, 8, 6, 6)
    assert {name for name, _ in shallow.named_parameters()} == {
        f"{conv}.{kind}" for conv in ("down.0", "up.1") for kind in ("weight", "bias")
    }


def test_a_network_without_skip_connections_has_no_shallow_step() -> None:
    module = program(Normed(), x=torch.randn(4, 32), tokens=torch.randint(10, (4,))).module
    with pytest.raises(BuildError, match=r"no skip connection to cut at.*build without --step-cache"):
        split_shallow(module, "x", "deep")


def test_cost_counts_products_and_what_moves() -> None:
    x, text = torch.randn(1, 4, 6, 6), torch.randn(2, 5, 8)
    module = simplify(program(Halves(), x=x, text=text).module)
    convolutions = 2 * (2 * 8 * 36) * (4 * 9) + 2 * (2 * 4 * 36) * (16 * 9)
    linears = 2 * (2 * 36 * 8) * 8 + 2 * (2 * 5 * 8) * 8
    attention = 2 * 2 * (2 * 2 * 36 * 5 * 4)
    assert cost(module).flops == convolutions + linears + attention
    assert cost(module).nodes == len(targets(module))
    silu = next(node for node in module.graph.nodes if node.target is aten.silu.default)
    assert moved(silu) == 2 * (2 * 8 * 36) * 4
    view = next(node for node in module.graph.nodes if node.target is aten.view.default)
    assert moved(view) == 0


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h = self.linear(self.conv(x).flatten(2).transpose(1, 2))
        return (torch.bmm(h, h.transpose(1, 2)) @ h,)


def test_flops_are_those_that_torch_counts() -> None:
    x, net = torch.randn(2, 4, 9, 9), Products()
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert cost(program(net, x=x).module).flops == counter.get_total_flops()


class Stream(nn.Module):
    """A residual stream far beyond fp16 between norms, as in an autoencoder's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, 32), nn.GroupNorm(8, 32), nn.GroupNorm(8, 16)])
        self.inner, self.outer = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.narrow = nn.Conv2d(32, 16, 1, bias=False)
        self.query, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        with torch.no_grad():
            for layer in (self.enter, self.inner, self.outer, self.out):
                layer.weight.mul_(1e5)
                layer.bias.mul_(1e5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.enter(x)
        x = x + self.outer(
            nn.functional.silu(self.norms[1](self.inner(nn.functional.silu(self.norms[0](x)))))
        )
        tokens = self.norms[0](x).flatten(2).transpose(1, 2)
        x = x + self.out(torch.softmax(self.query(tokens), -1)).transpose(1, 2).reshape(x.shape)
        x = self.narrow(nn.functional.interpolate(x, scale_factor=2.0)) / 2
        return (self.leave(nn.functional.silu(self.norms[2](x))),)


@pytest.mark.parametrize("net", [Stream(), Loud()], ids=["stream", "loud"])
def test_rescale_is_exact_and_leaves_fp16_no_island_for_its_range(net: nn.Module) -> None:
    x = torch.randn(2, 4, 8, 8) if isinstance(net, Stream) else torch.randn(8, 32)
    before = program(net, x=x)
    seen = observe(before, torch.float16)
    expected = before.module(x=x)[0]
    limit = in_range(torch.float16)
    assert max(seen.magnitudes.values()) > 1e5
    _, islands = cast(program(net, x=x).module, DType.FP16, seen)
    assert any("reach" in island for island in islands)

    after = rescale(before.module, seen, limit)
    assert torch.equal(after(x=x)[0], expected), "a power of two changes no digit"
    fresh = torch.randn_like(x)
    torch.testing.assert_close(after(x=fresh)[0], net(fresh)[0], rtol=1e-5, atol=1e-5)
    scaled = observe(replace(before, module=after), torch.float16)
    assert max(scaled.magnitudes.values()) <= limit
    module, islands = cast(after, DType.FP16, scaled)
    assert not any("reach" in island for island in islands)
    got = module(x=x)[0]
    assert got.isfinite().all()
    assert (got - expected).norm() < 5e-3 * expected.norm()
    assert torch.equal(net(x)[0], expected), "the network's own weights stay as they were"


class Mixed(nn.Module):
    """Beyond fp16 where no scale can pass: an activation, a product of two, weights that are computed, the output."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Linear(32, 32)
        with torch.no_grad():
            self.rise.weight.mul_(3e5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h = self.rise(x)
        weight, bias = self.rise(x), self.rise(x[0])
        computed = nn.functional.linear(x, weight) + nn.functional.linear(x, self.rise.weight, bias)
        return (nn.functional.silu(h) + self.rise(x) * x + computed,)


def test_rescale_touches_nothing_where_a_scale_cannot_pass() -> None:
    before = program(Mixed(), x=torch.randn(32, 32))
    code = before.module.code
    after = rescale(before.module, observe(before), in_range(torch.float16))
    assert after is before.module and after.code == code


class Faint(nn.Module):
    """A stream beyond fp16 to which a layer with weights of size `weight` adds."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.rise, self.add, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)
        with torch.no_grad():
            self.rise.weight.mul_(3e5)
            self.add.weight.normal_(std=weight)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.norm(self.rise(x) + self.add(x)),)


@pytest.mark.parametrize(("weight", "scaled"), [(3e-2, True), (3e-4, False)])
def test_rescale_leaves_weights_that_would_lose_their_digits(weight: float, scaled: bool) -> None:
    before = program(Faint(weight), x=torch.randn(32, 32))
    seen = observe(before, torch.float16)
    after = rescale(before.module, seen, in_range(torch.float16))
    assert (after is not before.module) == scaled
    if scaled:
        for name, tensor in after.named_parameters():
            if name.startswith("rescaled") and tensor.dim() == 2:
                assert (tensor.half() - tensor).norm() < 2**-11 * tensor.norm()
    module, islands = cast(after, DType.FP16, observe(replace(before, module=after), torch.float16))
    assert any("reach" in island for island in islands) != scaled
    expected = torch.from_numpy(seen.outputs["y"])
    assert (module(**before.inputs)[0] - expected).norm() < 5e-3 * expected.norm()


def test_rescale_touches_nothing_that_is_in_range() -> None:
    before = program(Stream(), x=torch.randn(2, 4, 8, 8) * 0)
    assert rescale(before.module, observe(before), 1e9) is before.module
