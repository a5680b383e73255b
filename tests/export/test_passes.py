"""Rewrites of a traced graph keep its result: exactly, or as far as the format goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from rt.config import DType
from rt.errors import NumericsError
from rt.export.lower import WeightFile, lower
from rt.export.observe import Observation, observe
from rt.export.passes.cast import cast
from rt.export.passes.simplify import simplify
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
    casts = [node for node in after.graph.nodes if node.target in (aten.to.dtype, aten._to_copy.default)]
    assert [node.meta["val"].dtype for node in casts] == [torch.float64, torch.float32], "real casts stay"
    assert not any(not node.users and node.op == "call_function" for node in after.graph.nodes), (
        "dead code is gone"
    )
    assert len(targets(after)) < len(targets(before.module))


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
    seen = observe(traced)
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
    _, islands = cast(*(lambda p: (p.module, DType.FP16, observe(p)))(program(Loud(), x=torch.randn(32, 32))))
    assert [island.partition(": reach ")[0] for island in islands] == ["2 linear", "1 mul"]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.table = nn.Linear(32, 32), nn.LayerNorm(32), nn.Embedding(10, 32)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor]:
        return (nn.functional.silu(self.norm(self.linear(x))) + self.table(tokens),)


@pytest.mark.parametrize(("dtype", "half"), [(DType.FP16, torch.float16), (DType.BF16, torch.bfloat16)])
def test_products_are_half_norms_are_fp32_and_the_outside_is_fp32(dtype: DType, half: torch.dtype) -> None:
    inputs = {"x": torch.randn(32, 32), "tokens": torch.randint(10, (32,))}
    traced = program(Normed(), **inputs)
    module, islands = cast(traced.module, dtype, observe(traced))
    assert islands == ("1 layer_norm: sums over many elements",)
    kept = {name: weight.dtype for name, weight in module.named_parameters()}
    assert {name for name, kind in kept.items() if kind == torch.float32} == {
        name for name in kept if "norm" in name
    }
    graph = torch.export.export(module, (), inputs, strict=False).graph
    made = {n.target: n.meta["val"].dtype for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    assert made[aten.linear.default] == made[aten.embedding.default] == made[aten.silu.default] == half
    assert made[aten.layer_norm.default] == torch.float32
    result = module(**inputs)[0]
    assert result.dtype == torch.float32
    error = distance(result.detach().numpy(), traced.module(**inputs)[0].detach().numpy())
    assert 1e-5 < error < (3e-3 if dtype is DType.FP16 else 2e-2)


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
    from rt.export.passes.hoist import hoist

    module, x, timestep = Blocks().eval(), torch.randn(3, 4), torch.rand(3) * 999
    with torch.no_grad():
        exported = torch.export.export(module, (), {"x": x, "timestep": timestep}, strict=False)
        early, late = hoist(exported.module(check_guards=False), "timestep", "time")
        (time,) = early(timestep)
        (got,) = late(x, time)
        (expected,) = module(x, timestep)
        (other,) = late(x, early(timestep + 1)[0])
    assert time.shape == (3, 4 + 3), "both projections, side by side"
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(other, expected)
    assert {node.target for node in late.graph.nodes if node.op == "placeholder"} == {"x", "time"}
    assert {name for name, _ in late.named_parameters()} == {"mix.weight", "mix.bias"}
    assert not {"sin", "cos", "silu"} & {
        str(n.target).split(".")[1] for n in late.graph.nodes if "aten" in str(n.target)
    }
