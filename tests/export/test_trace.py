"""Programs against the networks they were traced from, on inputs that the trace has not seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rt.export.checkpoint import Checkpoint, open_checkpoint
from rt.export.program import Program
from rt.export.trace import trace
from rt.model import Component, Family
from rt.shapes import ShapeProfile

# Of the largest value. Tracing reorders nothing, so what is left is the rounding of other kernels.
TOLERANCE = 1e-5

FAMILIES = tuple(Family)


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


@pytest.fixture
def opened(folder: Callable[[Family], Path]) -> Callable[[Family], Checkpoint]:
    return lambda family: open_checkpoint(str(folder(family)))


def programs(
    checkpoint: Checkpoint, component: Component, *profiles: ShapeProfile
) -> tuple[Any, list[Program]]:
    module = checkpoint.load(component)
    return module, list(trace(component, module, checkpoint.spec, profiles))


def square(checkpoint: Checkpoint, batch_size: int = 1) -> ShapeProfile:
    side = checkpoint.spec.sample_size * checkpoint.spec.vae_scale_factor
    return ShapeProfile(side, side, batch_size)


def run(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = program.module(**inputs)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return dict(zip(program.outputs, outputs, strict=True))


def fresh(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs like the example's, of other values."""
    return {name: torch.randn(value.shape, generator=generator) for name, value in program.inputs.items()}


def close(got: Tensor, expected: Tensor) -> bool:
    assert got.shape == expected.shape
    return float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def check_form(program: Program) -> None:
    """Inputs in order, static shapes, plain tensors, and a test input that gives finite outputs."""
    placeholders = [node for node in program.module.graph.nodes if node.op == "placeholder"]
    assert [node.name for node in placeholders] == list(program.inputs)
    shapes = [v.shape for node in program.module.graph.nodes if isinstance(v := node.meta.get("val"), Tensor)]
    assert len(shapes) > len(placeholders)
    assert all(isinstance(size, int) for shape in shapes for size in shape)
    for name, output in run(program, dict(program.inputs)).items():
        assert torch.isfinite(output).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders(opened, family, generator):
    """States and pooled of token sequences that end at different places."""
    checkpoint = opened(family)
    for component in checkpoint.spec.text_encoders:
        module, (program,) = programs(checkpoint, component, square(checkpoint))
        check_form(program)
        assert (program.name, program.profile, program.guided) == (component.value, None, False)
        second = component is Component.TEXT_ENCODER_2
        assert program.outputs == (("states", "pooled") if second else ("states",))
        for end in (1, checkpoint.spec.max_tokens // 3, checkpoint.spec.max_tokens - 1):
            eos = module.config.eos_token_id
            tokens = torch.randint(0, eos, (1, checkpoint.spec.max_tokens), generator=generator)
            tokens[0, end] = eos
            with torch.no_grad():
                expected = module(tokens, output_hidden_states=True)
            got = run(program, {"tokens": tokens})
            *earlier, last = expected.hidden_states
            if family is Family.SDXL:
                rows = earlier[::-1]
            else:
                rows = [expected.last_hidden_state, *map(module.final_layer_norm, earlier[::-1])]
                assert close(rows[0], module.final_layer_norm(last))
            assert len(rows) == module.config.num_hidden_layers + (family is not Family.SDXL)
            assert close(got["states"], torch.cat(rows))
            assert got["states"].shape[1] == checkpoint.spec.max_tokens
            if second:
                assert close(got["pooled"], expected.text_embeds)
                assert got["pooled"].shape == (1, checkpoint.spec.pooled_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_unet(opened, family, generator):
    """With guidance, the unconditional rows come first and both halves see the same latents and timesteps."""
    checkpoint = opened(family)
    profile = square(checkpoint, batch_size=2)
    module, (time, context, *traced) = programs(checkpoint, Component.UNET, profile)
    assert [program.guided for program in traced] == [True, False]
    for program in traced:
        check_form(program)
        assert program.outputs == ("prediction",)
        inputs = fresh(program, generator)
        timestep = torch.rand(2, generator=generator) * 999
        assert len(inputs["latents"]) == 2
        repeat = 2 if program.guided else 1
        states = torch.randn(2 * repeat, *context.inputs["context"].shape[1:], generator=generator)
        each = [run(context, {"context": row[None]}) for row in states]
        inputs |= {name: torch.cat([row[name] for row in each]) for name in context.outputs}
        moments = {name: torch.randn(value.shape, generator=generator) for name, value in time.inputs.items()}
        moments["timestep"][: 2 * repeat] = timestep.repeat(repeat)
        inputs |= {name: made[: len(inputs[name])] for name, made in run(time, moments).items()}
        added = None
        if family is Family.SDXL:
            added = {
                "text_embeds": moments["pooled"][: 2 * repeat],
                "time_ids": moments["sizes"][: 2 * repeat],
            }
        assert len(inputs["time_0"]) == (2 * repeat if family is Family.SDXL else 2), "shared by both halves"
        with torch.no_grad():
            expected = module(
                inputs["latents"].repeat(repeat, 1, 1, 1),
                timestep.repeat(repeat),
                states,
                added_cond_kwargs=added,
            ).sample
        got = run(program, inputs)["prediction"]
        assert close(got, expected)
        for name in {name.partition("_")[0] for name in inputs}:
            changed = {k: torch.roll(v, 1) * 1.5 + 0.1 for k, v in inputs.items() if k.startswith(name)}
            other = {**inputs, **changed}
            assert not close(run(program, other)["prediction"], expected), f"{name} is not read"


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder(opened, family, generator):
    checkpoint = opened(family)
    module, (program,) = programs(checkpoint, Component.VAE_DECODER, square(checkpoint))
    check_form(program)
    latents = fresh(program, generator)["latents"]
    with torch.no_grad():
        expected = module.decode(latents / checkpoint.spec.scaling_factor).sample
    image = run(program, {"latents": latents})["image"]
    assert close(image, expected.permute(0, 2, 3, 1))
    side = square(checkpoint).height
    assert image.shape == (1, side, side, 3)


def test_one_program_a_shape(opened):
    """The decoder takes one picture at a time, so batch sizes share it; height and width are not swapped."""
    checkpoint = opened(Family.SD1)
    factor = checkpoint.spec.vae_scale_factor
    wide, tall = ShapeProfile(8 * factor, 12 * factor), ShapeProfile(12 * factor, 8 * factor, 2)
    many = (wide, ShapeProfile(wide.height, wide.width, 3), tall)
    _, decoders = programs(checkpoint, Component.VAE_DECODER, *many)
    assert [program.profile for program in decoders] == [wide, ShapeProfile(tall.height, tall.width)]
    _, (time, context, *unets) = programs(checkpoint, Component.UNET, wide, tall)
    assert (time.component, time.profile, len(time.inputs["timestep"])) == (Component.UNET_TIME, None, 16)
    assert (context.component, context.profile, len(context.inputs["context"])) == (
        Component.UNET_CONTEXT,
        None,
        1,
    )
    assert [(program.profile, program.guided) for program in unets] == [
        (wide, True),
        (wide, False),
        (tall, True),
        (tall, False),
    ]
    assert tuple(unets[0].inputs["latents"].shape) == (1, 4, 8, 12)
    assert tuple(unets[2].inputs["latents"].shape) == (2, 4, 12, 8)
    names = [program.name for program in (*decoders, *unets)]
    assert len(set(names)) == len(names)
    assert unets[2].name == f"unet-2x{tall.height}x{tall.width}-guided"


def test_weights_are_shared_and_inputs_are_the_same_each_time(opened):
    checkpoint = opened(Family.SDXL)
    module, first = programs(checkpoint, Component.UNET, square(checkpoint))
    again = list(trace(Component.UNET, module, checkpoint.spec, (square(checkpoint),)))
    own = {parameter.data_ptr() for parameter in module.parameters()}
    # Of a residual block, two biases are one of its own.
    sums = {
        p.data_ptr()
        for n, p in module.named_parameters()
        if n.endswith((".conv1.bias", ".time_emb_proj.bias"))
    }
    held = [{parameter.data_ptr() for parameter in program.module.parameters()} for program in first]
    time, context, *steps = held
    for step in steps:
        assert not (time & step or context & step or time & context)
        assert (time | context | step) & own == own - sums
        assert len(time - own) == len(sums) / 2 and not (context | step) - own
    for program, other in zip(first, again, strict=True):
        for name, value in program.inputs.items():
            assert torch.equal(value, other.inputs[name])
    profile = square(checkpoint)
    expected = [float(x) for x in (profile.height, profile.width, 0, 0, profile.height, profile.width)]
    assert first[0].inputs["sizes"].tolist() == [expected] * 16
