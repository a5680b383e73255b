"""What the U-Net sees while it draws, and which of its products can do with int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rt.export.checkpoint import Checkpoint
from rt.export.passes.quantize import Range, products, quantize
from rt.export.trace import Program, TextEncoder
from rt.model import Family, ModelSpec
from rt.noise import Generator
from rt.samplers import Scheduler
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
        ranges: Of the input of each product.
        chosen: The products that go to int8.
        islands: The others, in words: how many, and their share of the squared error and of the work.
    """

    ranges: Mapping[str, Range]
    chosen: frozenset[str]
    islands: tuple[str, ...]


def calibrate(step: Program, time: Program, checkpoint: Checkpoint) -> Calibration:
    """Draw `PROMPTS` with the programs of a U-Net in fp32 and watch.

    Args:
        step: A step, with guidance or without.
        time: What it reads of a timestep.
        checkpoint: For its text encoders and its noise levels.

    Raises:
        NumericsError: When a weight makes NaN or Inf of them.
    """
    recorder = _Recorder(step.module)
    with torch.inference_mode():
        recorder.run(*step.inputs.values())
        _draw(recorder, step, time, checkpoint)
        chosen, islands = choose(step.module, recorder.ranges, step.inputs)
    return Calibration(ranges=recorder.ranges, chosen=chosen, islands=islands)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the range of what each of its products reads."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.ranges: dict[str, Range] = {}
        self._names = {node: name for name, node in products(module).items()}

    def run_node(self, n: fx.Node) -> Any:
        if n in self._names:
            name, seen = self._names[n], Range.of(self.env[n.all_input_nodes[0]])
            self.ranges[name] = self.ranges.get(name, seen) | seen
        return super().run_node(n)


def _draw(unet: _Recorder, step: Program, time: Program, checkpoint: Checkpoint) -> None:
    """Draw each of `PROMPTS`; the rows of a batch begin from different noise."""
    spec = checkpoint.spec
    negative, *conds = _encode(checkpoint, ("", *PROMPTS))
    # One that every checkpoint's noise levels allow, whatever its own sampler is.
    schedule = Scheduler.from_config(spec.scheduler, "ddim").schedule(STEPS)
    inputs = {name: value.clone() for name, value in step.inputs.items()}
    latents, rows = inputs["latents"].numpy(), len(inputs["latents"])
    trajectories = [Trajectory(latents.shape[1:]) for _ in range(rows)]
    for cond in conds:
        for key, value in cond.items():
            both = [negative[key]] * rows * step.guided + [value] * rows
            inputs[key].copy_(torch.cat(both))
        for seed, trajectory in enumerate(trajectories):
            trajectory.start(schedule, noise=Generator(seed), guidance_scale=GUIDANCE, guidance_rescale=0.0)
        while not trajectories[0].done:
            for trajectory, row in zip(trajectories, latents, strict=True):
                trajectory.feed(row)
            timestep = torch.full_like(time.inputs["timestep"], trajectories[0].timestep)
            inputs["time"].copy_(time.module(timestep)[0][:1].expand_as(inputs["time"]))
            prediction = unet.run(*inputs.values())[0].numpy().reshape(-1, *latents.shape)
            for row, trajectory in enumerate(trajectories):
                trajectory.guide_and_step(prediction[-1][row], prediction[0][row] if step.guided else None)


def _encode(checkpoint: Checkpoint, prompts: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """Of each prompt `context` (1, T, D), and `pooled` (1, P) where the model has it."""
    spec = checkpoint.spec
    given: list[list[tuple[Tensor, ...]]] = []
    for component in spec.text_encoders:
        encoder = TextEncoder(checkpoint.load(component).eval(), penultimate=spec.family is Family.SDXL)
        tokenizer = checkpoint.tokenizer(component)
        given.append([encoder(torch.from_numpy(tokenizer(prompt).ids)[None]) for prompt in prompts])
    return [_conditioning(outputs, spec) for outputs in zip(*given, strict=True)]


def _conditioning(outputs: tuple[tuple[Tensor, ...], ...], spec: ModelSpec) -> dict[str, Tensor]:
    context = {"context": torch.cat([states for states, *_ in outputs], dim=-1)}
    return context if spec.pooled_size is None else {**context, "pooled": outputs[-1][1]}


def choose(
    module: fx.GraphModule, ranges: Mapping[str, Range], inputs: Mapping[str, Tensor]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """All products but those that cost much in error and save little in work, and those in words.

    Squared errors of products add up (measured on the demo model: 0.0207 from 120 parts, 0.0212 of the whole), so the
    search halves the group with the largest error, measured with that group alone in int8, until single products are
    left.
    """
    nodes = products(module)
    exact: Tensor = module(**inputs)[0]

    def error(names: Sequence[str]) -> float:
        """Squared."""
        return float((quantize(module, ranges, names)(**inputs)[0] - exact).square().sum())

    whole = max(error([*nodes]), 1e-30)
    work = {name: _work(node) for name, node in nodes.items()}
    total = sum(work.values())
    groups = [(1.0, [name for name in nodes if work[name] <= _LITTLE_WORK * total])]
    kept: dict[str, float] = {}
    for _ in range(_SPLITS):
        share, names = groups.pop(groups.index(max(groups))) if groups else (0.0, [])
        if share <= _MUCH_ERROR:
            break
        if len(names) == 1:
            kept[names[0]] = share
            continue
        half = len(names) // 2
        groups += [(error(part) / whole, part) for part in (names[:half], names[half:]) if part]
    if not kept:
        return frozenset(nodes), ()
    words = (
        f"{len(kept)} of {len(nodes)} products: {sum(kept.values()):.0%} of its squared error, "
        f"{sum(work[name] for name in kept) / total:.1%} of the work"
    )
    return frozenset(nodes) - kept.keys(), (words,)


def _work(node: fx.Node) -> int:
    """Multiplications."""
    weight: Tensor = node.args[1].meta["val"]  # type: ignore[union-attr]
    result: Tensor = node.meta["val"]
    return result.numel() * weight[0].numel()
