"""What the U-Net sees while it draws, and which of its products can do with eight bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from rt.backends import Array
from rt.conditioning import Conditioning, contexts
from rt.export.checkpoint import Checkpoint
from rt.export.passes.quantize import INT8, Bits, Range, products, quantize
from rt.export.passes.shapes import value
from rt.export.program import Program
from rt.export.trace import TextEncoder
from rt.model import Component, Family
from rt.noise import Generator
from rt.samplers import Scheduler
from rt.step import Step
from rt.time_table import TimeTable
from rt.trajectory import Trajectory

PROMPTS = (
    "a red heart on a blue background",
    "a fox left of a sunflower",
    "a photograph of an old house by a lake, evening light",
    "portrait of a woman with a hat, oil painting",
)
STEPS, GUIDANCE = 4, 5.0
# A product stays in floats when it makes no more of the work than this, and more of the squared error than that.
_LITTLE_WORK, _MUCH_ERROR = 0.005, 0.02
# Each runs the network twice; enough for one product of a thousand that stands out, or for two of a hundred.
_SPLITS = 16


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `quantize` needs, by the name of a product's weight, equal for every shape of a network.

    Attributes:
        bits: The format.
        ranges: Of the input of each product.
        kept: The products that stay in floats, each with its share of the squared error.
    """

    bits: Bits
    ranges: Mapping[str, Range]
    kept: Mapping[str, float]

    @property
    def chosen(self) -> frozenset[str]:
        """The products that go to eight bits."""
        return frozenset(self.ranges.keys() - self.kept.keys())

    def islands(self, module: fx.GraphModule) -> tuple[str, ...]:
        """What of `module` stays in floats, in words."""
        nodes = products(module, self.bits)
        work = {name: _work(node) for name, node in nodes.items()}
        kept = [name for name in nodes if name in self.kept]
        if not kept:
            return ()
        error = sum(self.kept[name] for name in kept)
        share = sum(work[name] for name in kept) / sum(work.values())
        return (
            f"{len(kept)} of {len(nodes)} products: {error:.0%} of its squared error, {share:.1%} of the work",
        )


def calibrate(programs: Mapping[Component, Program], checkpoint: Checkpoint, bits: Bits) -> Calibration:
    """Draw `PROMPTS` with the programs of a U-Net in fp32 and watch.

    Args:
        programs: Those of the timestep and of the text, and a step with guidance or without.
        checkpoint: For its text encoders and its noise levels.
        bits: The format to calibrate for.

    Raises:
        NumericsError: When a weight makes NaN or Inf of them.
    """
    step = programs[Component.UNET]
    recorder = _Recorder(step.module, bits)
    with torch.inference_mode():
        recorder.run(*step.inputs.values())
        _draw(recorder, programs, checkpoint)
        kept = costly(step.module, recorder.ranges, step.inputs, bits)
    return Calibration(bits=bits, ranges=recorder.ranges, kept=kept)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the range of what each of its products reads."""

    def __init__(self, module: fx.GraphModule, bits: Bits) -> None:
        super().__init__(module)
        self.ranges: dict[str, Range] = {}
        self._names = {node: name for name, node in products(module, bits).items()}

    def run_node(self, n: fx.Node) -> Any:
        if n in self._names:
            name, seen = self._names[n], Range.of(self.env[n.all_input_nodes[0]])
            self.ranges[name] = self.ranges.get(name, seen) | seen
        return super().run_node(n)


class _Torch:
    """A program as an `Engine`."""

    def __init__(self, program: Program, run: Callable[..., Any]) -> None:
        self._tensors = [tensor.clone() for tensor in program.inputs.values()]
        self._run = run
        self.inputs: dict[str, Array] = {
            name: tensor.numpy() for name, tensor in zip(program.inputs, self._tensors, strict=True)
        }
        self.outputs: dict[str, Array] = {
            name: value.numpy().copy()
            for name, value in zip(program.outputs, run(*self._tensors), strict=True)
        }

    def enqueue(self) -> None:
        """Run once."""
        for array, result in zip(self.outputs.values(), self._run(*self._tensors), strict=True):
            np.copyto(array, result.numpy())


def _draw(unet: _Recorder, programs: Mapping[Component, Program], checkpoint: Checkpoint) -> None:
    """Draw each of `PROMPTS`; the rows of a batch begin from different noise."""
    spec, program = checkpoint.spec, programs[Component.UNET]
    assert program.profile is not None
    time, context = (
        _Torch(programs[early], programs[early].module)
        for early in (Component.UNET_TIME, Component.UNET_CONTEXT)
    )
    step = Step(_Torch(program, unet.run))
    table = TimeTable(time, (program.profile.height, program.profile.width))
    negative, *conds = _encode(checkpoint, ("", *PROMPTS))
    if spec.zero_negative:  # as the pipeline has it
        negative = negative.zeros()
    texts = contexts(context, {negative, *conds})
    # One that every checkpoint's noise levels allow, whatever its own sampler is.
    schedule = Scheduler.from_config(spec.scheduler, "ddim").schedule(STEPS)
    trajectories = [Trajectory(latents.shape) for latents in step.latents]
    for cond in conds:
        sides = [negative, cond] if program.guided else [cond]
        table.prepare((timestep, side) for timestep in schedule.timesteps for side in sides)
        for row, trajectory in enumerate(trajectories):
            step.write_context(row, [texts[side] for side in sides])
            trajectory.start(schedule, noise=Generator(row), guidance_scale=GUIDANCE, guidance_rescale=0.0)
        while not trajectories[0].done:
            for row, trajectory in enumerate(trajectories):
                trajectory.feed(step.latents[row])
                step.write_time(row, [table[trajectory.timestep, side] for side in sides])
            step.run()
            for row, trajectory in enumerate(trajectories):
                trajectory.guide_and_step(*step.prediction(row))


def _encode(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[Conditioning]:
    spec = checkpoint.spec
    given: list[list[tuple[Tensor, ...]]] = []
    for component in spec.text_encoders:
        encoder = TextEncoder(checkpoint.load(component).eval(), penultimate=spec.family is Family.SDXL)
        tokenizer = checkpoint.tokenizer(component)
        given.append([encoder(torch.from_numpy(tokenizer(prompt).ids)[None]) for prompt in prompts])
    return [
        Conditioning(
            states=np.concatenate([states[0].numpy() for states, *_ in outputs], axis=-1),
            pooled=None if spec.pooled_size is None else outputs[-1][1][0].numpy(),
        )
        for outputs in zip(*given, strict=True)
    ]


def costly(
    module: fx.GraphModule, ranges: Mapping[str, Range], inputs: Mapping[str, Tensor], bits: Bits = INT8
) -> dict[str, float]:
    """The products that cost much in error and save little in work, each with its share of the squared error.

    Squared errors of products add up (measured on the demo model: 0.0207 from 120 parts, 0.0212 of the whole), so the
    search halves the group with the largest error, measured with that group alone quantized, until single products are
    left, or it has measured often enough.
    """
    nodes = products(module, bits)
    exact: Tensor = module(**inputs)[0]

    def error(names: Sequence[str]) -> float:
        """Squared."""
        return float((quantize(module, ranges, names, bits)(**inputs)[0] - exact).square().sum())

    whole = max(error([*nodes]), 1e-30)
    work = {name: _work(node) for name, node in nodes.items()}
    little = _LITTLE_WORK * sum(work.values())
    cheap = [name for name in nodes if work[name] <= little]
    groups = [(error(cheap) / whole, cheap)]
    found: dict[str, float] = {}
    for _ in range(_SPLITS):
        share, names = groups.pop(groups.index(max(groups))) if groups else (0.0, [])
        if share <= _MUCH_ERROR or not names:
            break
        if len(names) == 1:
            found[names[0]] = share
            continue
        half = len(names) // 2
        groups += [(error(part) / whole, part) for part in (names[:half], names[half:])]
    return found


def _work(node: fx.Node) -> int:
    """Multiplications."""
    weight: Tensor = value(node.all_input_nodes[1])
    return int(value(node).numel() * weight[0].numel())
