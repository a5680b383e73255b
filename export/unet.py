"""A U-Net to its programs: what depends on the text, what depends on the timestep, and the step that is left."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rt.export.passes.early_bias import early_bias
from rt.export.passes.hoist import hoist
from rt.export.passes.shallow import split_shallow
from rt.export.passes.sink import sink
from rt.export.program import Program, trace_program
from rt.model import Component, ModelSpec
from rt.shapes import ShapeProfile

TRAIN_TIMESTEPS = 1000
_CONTEXT = "context"
TIME_ROWS = 16
"""Timesteps at once: reading the weights takes as long as multiplying so many rows by them."""


class UNet(nn.Module):
    """Latents (B, C, h, w), timestep (B,) and context (R, T, D) → prediction (R, C, h, w).

    With guidance R = 2B: the first B rows are unconditional, the last B conditional. Latents and timesteps are
    repeated in here, so that a pass can move the repeat to where the halves first differ.
    SDXL also takes pooled (R, P) and sizes (R, 6); an inpainting model mask (B, 1, h, w) and around (B, C, h, w), the
    latents of what the mask leaves.
    """

    def __init__(self, unet: nn.Module, *, guided: bool) -> None:
        super().__init__()
        self.unet = unet
        self.guided = guided

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        mask: Tensor | None = None,
        around: Tensor | None = None,
    ) -> tuple[Tensor]:
        """See the class."""
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        if mask is not None and around is not None:
            latents = torch.cat([latents, mask, around], dim=1)
        if self.guided:
            latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
        prediction: tuple[Tensor] = self.unet(
            latents, timestep, context, added_cond_kwargs=added, return_dict=False
        )
        return prediction


def trace_unet(
    module: nn.Module,
    spec: ModelSpec,
    profiles: tuple[ShapeProfile, ...],
    text: Mapping[str, Tensor],
    *,
    step_cache: bool,
) -> Iterator[Program]:
    """The part of the timestep and that of the text, then for each profile the step with guidance and without.

    With `step_cache`, each step is followed by its shallow one. See `rt.export.trace.trace` for the arguments.
    """
    size = min(profiles, key=lambda profile: profile.height * profile.width)
    times = trace_step(module, spec, replace(size, batch_size=TIME_ROWS), text)
    yield split_time(times)[0]
    context, alone = split_context(trace_step(module, spec, replace(size, batch_size=1), text))
    yield context
    for profile, guided in itertools.product(profiles, (True, False)):
        if (profile, guided) == (alone.profile, alone.guided):  # traced already
            step = split_time(alone)[1]
        else:
            step = trace_loop_step(module, spec, profile, text, guided=guided)
        yield from split_step(step) if step_cache else (step,)


def trace_loop_step(
    module: nn.Module,
    spec: ModelSpec,
    profile: ShapeProfile,
    text: Mapping[str, Tensor],
    *,
    guided: bool,
) -> Program:
    """What the loop runs at each step: the U-Net but for what depends on the text or on the timestep alone."""
    step = trace_step(module, spec, profile, text, guided=guided)
    step = split_context(step.rewritten("sink", sink) if guided else step)[1]
    return split_time(step)[1]


def trace_step(
    module: nn.Module,
    spec: ModelSpec,
    profile: ShapeProfile,
    text: Mapping[str, Tensor],
    *,
    guided: bool = False,
) -> Program:
    """The whole U-Net, with everything that it depends on as an input."""
    step = trace_program(
        _name(Component.UNET, profile, guided),
        Component.UNET,
        profile,
        UNet(module, guided=guided),
        _inputs(spec, profile, guided, text),
        ("prediction",),
        guided=guided,
    )
    return step.rewritten("early bias", early_bias)


def split_context(step: Program) -> tuple[Program, Program]:
    """What depends on the text states alone, as outputs `context_0` …, and the rest, which reads them."""
    return _split(step, ("context",), Component.UNET_CONTEXT, _CONTEXT)


def of_text(program: Program) -> frozenset[str]:
    """What `split_context` made of it: inputs of a step, outputs of the part of the text."""
    return frozenset(name for name in (*program.inputs, *program.outputs) if name.startswith(f"{_CONTEXT}_"))


def split_time(step: Program) -> tuple[Program, Program]:
    """What depends on the timestep, and in XL on pooled text and sizes, as outputs `time_0` …, and the rest."""
    sources = [name for name in ("timestep", "pooled", "sizes") if name in step.inputs]
    return _split(step, sources, Component.UNET_TIME, "time")


def split_step(step: Program) -> tuple[Program, Program]:
    """The step with its `deep` features as a second output, and the shallow step that reads them."""
    full, shallow = split_shallow(step.module, "latents", "deep")
    with torch.no_grad():
        deep = full(**step.inputs)[-1]
    reads = [str(node.target) for node in shallow.graph.nodes if node.op == "placeholder"]
    assert step.profile is not None
    return (
        replace(step, module=full, outputs=(*step.outputs, "deep")),
        replace(
            replace(step, passes=()).rewritten("shallow", lambda module: shallow),
            name=_name(Component.UNET_SHALLOW, step.profile, step.guided),
            component=Component.UNET_SHALLOW,
            inputs={name: {**step.inputs, "deep": deep}[name] for name in reads},
        ),
    )


def _split(
    step: Program, sources: tuple[str, ...] | list[str], component: Component, name: str
) -> tuple[Program, Program]:
    early, late = hoist(step.module, sources, name)
    inputs = {source: step.inputs[source] for source in sources}
    with torch.no_grad():
        crossing = {f"{name}_{index}": value for index, value in enumerate(early(**inputs))}
    reads = [str(node.target) for node in late.graph.nodes if node.op == "placeholder"]
    return (
        replace(
            step,
            name=component.value,
            component=component,
            profile=None,
            guided=False,
            module=early,
            inputs=inputs,
            outputs=tuple(crossing),
            passes=(),
        ),
        replace(
            step.rewritten(f"hoist {name}", lambda module: late),
            inputs={read: {**step.inputs, **crossing}[read] for read in reads},
        ),
    )


def _name(component: Component, profile: ShapeProfile, guided: bool) -> str:
    shape = f"{profile.batch_size}x{profile.height}x{profile.width}"
    return f"{component.value}-{shape}" + ("-guided" if guided else "")


def _inputs(
    spec: ModelSpec, profile: ShapeProfile, guided: bool, text: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    pictures, rows = profile.batch_size, profile.batch_size * (2 if guided else 1)
    generator = torch.Generator().manual_seed(0)
    shape = spec.latent_shape(profile.height, profile.width)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def of_text(name: str, *shape: int) -> Tensor:
        """(rows, *shape): the given text, rolled by a place a row so that no two rows are alike."""
        return (
            torch.cat([text[name].roll(row, 1) for row in range(rows)])
            if name in text
            else randn(rows, *shape)
        )

    inputs = {
        "latents": randn(pictures, *shape),
        "timestep": torch.randint(1, TRAIN_TIMESTEPS, (pictures,), generator=generator).float(),
        "context": of_text("context", spec.max_tokens, spec.context_size),
    }
    if spec.pooled_size is not None:
        size = [profile.height, profile.width]
        inputs["pooled"] = of_text("pooled", spec.pooled_size)
        inputs["sizes"] = torch.tensor([[*size, 0, 0, *size]] * rows, dtype=torch.float32)
    if spec.inpainting:
        inputs["mask"] = (randn(pictures, 1, *shape[1:]) > 0).float()
        inputs["around"] = randn(pictures, *shape)
    return inputs
