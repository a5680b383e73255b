"""The U-Net's programs: together they give what the whole gives, and the step computes nothing that could leave it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from rt.export import unet as unet_module
from rt.export.checkpoint import open_checkpoint
from rt.export.operators import ops
from rt.export.passes.cost import cost
from rt.export.passes.fuse import fuse
from rt.export.passes.hoist import inputs_of
from rt.export.passes.layout import channels_last
from rt.export.passes.shapes import value
from rt.export.passes.sink import repeated, sink
from rt.export.program import Program
from rt.export.trace import trace
from rt.export.unet import split_context, split_step, split_time, trace_step
from rt.export.weights import build_empty
from rt.model import Component, Family
from rt.shapes import ShapeProfile

aten = torch.ops.aten
VIEWS = {aten.permute.default, aten.transpose.int, aten.view.default}
ATTENTION = aten.scaled_dot_product_attention.default


def run(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(zip(program.outputs, program.module(**inputs), strict=True))


def far(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize(("batch", "guided"), [(1, True), (2, False), (2, True)])
def test_each_split_gives_what_the_whole_gave(
    folder: Callable[[Family], Path], family: Family, batch: int, guided: bool
) -> None:
    """On inputs that the trace has not seen, in fp32."""
    checkpoint = open_checkpoint(str(folder(family)))
    side = checkpoint.spec.sample_size * checkpoint.spec.vae_scale_factor
    module = checkpoint.load(Component.UNET)
    whole = trace_step(module, checkpoint.spec, ShapeProfile(side, side, batch), {}, guided=guided)
    inputs = {name: torch.randn(example.shape) for name, example in whole.inputs.items()}
    expected = run(whole, inputs)["prediction"]
    sunk = whole.rewritten("sink", sink)
    assert far(run(sunk, inputs)["prediction"], expected) < 1e-5
    context, step = split_context(sunk)
    time, step = split_time(step)
    for early in (context, time):
        inputs |= run(early, {name: inputs[name] for name in early.inputs})
    assert far(run(step, {name: inputs[name] for name in step.inputs})["prediction"], expected) < 1e-5
    full, shallow = split_step(step)
    made = run(full, {name: inputs[name] for name in full.inputs})
    assert far(made["prediction"], expected) < 1e-5
    inputs["deep"] = made["deep"]
    assert far(run(shallow, {name: inputs[name] for name in shallow.inputs})["prediction"], expected) < 1e-5
    for program in (context, time, step, full, shallow):
        for name, example in program.inputs.items():
            assert torch.isfinite(example).all(), name
        assert [n.target for n in program.module.graph.nodes if n.op == "placeholder"] == list(program.inputs)
    other = run(shallow, {name: inputs[name] + (name == "latents") for name in shallow.inputs})
    assert far(other["prediction"], expected) > 1e-3, "a shallow step sees its own latents"


Programs = dict[tuple[Component, bool], Program]


@pytest.fixture(scope="module")
def real() -> Callable[[str, int], Programs]:
    """The programs of an architecture in its real shape, without data: `real("sd15", batch_size)`."""
    known: dict[tuple[str, int], Programs] = {}

    def programs(name: str, batch_size: int) -> Programs:
        if (name, batch_size) not in known:
            sizes = [size for other, size in REAL if other == name]  # which share what all sizes have
            checkpoint = open_checkpoint(f"synthetic:{name}")
            module = build_empty(Component.UNET, checkpoint.configs["unet"]).eval()
            side = checkpoint.spec.sample_size * checkpoint.spec.vae_scale_factor
            examples = unet_module._inputs
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    unet_module,
                    "_inputs",
                    lambda *given: {k: v.to("meta") for k, v in examples(*given).items()},
                )
                traced = trace(
                    Component.UNET,
                    module,
                    checkpoint.spec,
                    tuple(ShapeProfile(side, side, size) for size in sizes),
                    step_cache=True,
                )
                for program in traced:
                    for size in sizes if program.profile is None else [program.profile.batch_size]:
                        known.setdefault((name, size), {})[program.component, program.guided] = program
        return known[name, batch_size]

    return programs


def calls(program: Program) -> list[fx.Node]:
    return [node for node in program.module.graph.nodes if node.op == "call_function"]


REAL = [("sd15", 1), ("sd15", 2), ("sdxl", 1)]  # SD 2.1 is laid out as 1.5, with the linear layers of XL


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), REAL)
def test_the_step_computes_nothing_that_depends_on_text_or_time_alone(
    real: Callable[[str, int], Programs], name: str, batch: int
) -> None:
    """Nor on both without latents, but for views of keys and values.

    Only a time that both halves of several pictures share is repeated there.
    """
    for (component, guided), program in real(name, batch).items():
        if component in (Component.UNET, Component.UNET_SHALLOW):
            reads = inputs_of(program.module)
            early = [
                node
                for node in calls(program)
                if not reads[node] & {"latents", "deep"} and node.target not in VIEWS
            ]
            if guided and batch > 1:
                early = [node for node in early if repeated(node) is None]
            assert early == [], f"{program.name} computes {early}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("sd15", 16), ("sdxl", 70)])
def test_text_and_time_are_computed_once(
    real: Callable[[str, int], Programs], name: str, layers: int
) -> None:
    programs = real(name, 1)
    context, time = programs[Component.UNET_CONTEXT, False], programs[Component.UNET_TIME, False]
    assert len(context.outputs) == 2 * layers, "keys and values of each cross-attention"
    assert [node.target for node in calls(context)].count(aten.linear.default) == 2 * layers
    assert [*time.inputs] == ["timestep", *(["pooled", "sizes"] if name == "sdxl" else [])]
    for guided in (False, True):
        step = programs[Component.UNET, guided]
        assert {*step.inputs} == {"latents", *time.outputs, *context.outputs}
        for early in (context, time):
            for output, node in zip(early.outputs, _results(early), strict=True):
                assert tuple(value(node).shape[1:]) == tuple(step.inputs[output].shape[1:])


def _results(program: Program) -> list[fx.Node]:
    (output,) = (node for node in program.module.graph.nodes if node.op == "output")
    return list(output.args[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), REAL)
def test_what_comes_before_the_text_runs_at_half_batch(
    real: Callable[[str, int], Programs], name: str, batch: int
) -> None:
    """SD: up to the first self-attention. XL mixes pooled text into the first residual block: up to there."""
    step = real(name, batch)[Component.UNET, True]
    rows = {
        target: [len(value(n)) for n in calls(step) if n.target is target]
        for target in (aten.conv2d.default, ATTENTION)
    }
    halves = sum(count == batch for count in rows[aten.conv2d.default])
    assert rows[aten.conv2d.default][:halves] == [batch] * halves
    assert set(rows[aten.conv2d.default][halves:]) == {2 * batch}
    if name == "sdxl":
        assert halves == 2 and set(rows[ATTENTION]) == {2}
        assert all(len(example) == 2 for key, example in step.inputs.items() if key.startswith("time_"))
    else:
        assert halves >= 3, "conv_in and the first residual block"
        assert rows[ATTENTION][0] == batch and set(rows[ATTENTION][1:]) == {2 * batch}
        assert all(len(example) == batch for key, example in step.inputs.items() if key.startswith("time_"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("sd15", 0.1), ("sdxl", 0.02)])
def test_a_shallow_step_is_a_small_part_of_a_full_one(
    real: Callable[[str, int], Programs], name: str, most: float
) -> None:
    for guided in (False, True):
        full, shallow = (real(name, 1)[part, guided] for part in (Component.UNET, Component.UNET_SHALLOW))
        assert cost(shallow.module).flops < most * cost(full.module).flops
        assert tuple(shallow.inputs["deep"].shape) == tuple(value(_results(full)[1]).shape)
        assert {*shallow.inputs} <= {*full.inputs, "deep"}


@pytest.mark.slow
def test_every_pass_says_what_it_saved(real: Callable[[str, int], Programs]) -> None:
    step = real("sd15", 1)[Component.UNET, True]
    saved = {record.name: record for record in step.passes}
    assert [*saved] == ["simplify", "fold", "early bias", "sink", "hoist context", "hoist time"]
    assert saved["sink"].flops[1] < 0.98 * saved["sink"].flops[0], "a fortieth of all work"
    for one, next_one in zip(step.passes, step.passes[1:], strict=False):
        assert (one.nodes[1], one.flops[1], one.bytes[1]) == (
            next_one.nodes[0],
            next_one.flops[0],
            next_one.bytes[0],
        )
    assert str(saved["sink"]) == "sink: 1,068 nodes, 1607 → 1565 GFLOP, 13.1 → 12.9 GB"


@pytest.mark.parametrize(("name", "layers"), [("sd15", 16), ("sdxl", 70)])
def test_each_layer_is_fused_in_its_real_shape(real, name: str, layers: int) -> None:  # type: ignore[no-untyped-def]
    step = real(name, 1)[Component.UNET, True]
    program = step.rewritten("layout", channels_last).rewritten("fuse", fuse)
    targets = [node.target for node in program.module.graph.nodes]
    assert targets.count(ops.attention.default) == 2 * layers
    assert targets.count(ops.geglu.default) == layers
    assert not {aten.group_norm.default, aten.silu.default, ATTENTION} & {*targets}
    # Into and out of the first and the last convolution, and of those that halve; heads of the text's K and V.
    assert targets.count(aten.permute.default) <= 2 * (2 + 3)
    assert targets.count(aten.transpose.int) <= 2 * layers
