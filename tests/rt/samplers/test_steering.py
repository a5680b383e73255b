"""A callback that changes the latents on the way: what becomes of it is what becomes of it in diffusers.

Some of its schedulers go on from a sample that they keep, and not from the one that they are given: both runs here
are given the same outputs, noise and changes, at random steps, several a run. `RT_STEERING_SEED` sets the seed, which
a failure prints.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rt.samplers import SAMPLERS, Schedule, Scheduler
from rt.samplers.names import CLASSES
from rt.trajectory import Trajectory

SEED = int(os.environ.get("RT_STEERING_SEED", random.SystemRandom().getrandbits(32)))
SHAPE = (1, 2, 3)
TOLERANCE = 1e-4  # of the largest value
UNIPC: tuple[dict[str, Any], ...] = (
    {"solver_order": 1},
    {"solver_order": 3},
    {"solver_order": 3, "disable_corrector": [0, 2, 5]},
    {"solver_order": 2, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True},
)
CASES = [
    *((name, {}) for name in SAMPLERS if name != "dpmpp-2s-a"),  # not in diffusers
    *(("UniPCMultistepScheduler", options) for options in UNIPC),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
]

Float32 = NDArray[np.float32]
Changes = dict[int, Callable[[Any], Any]]


class Listed:
    """Noise that is listed."""

    def __init__(self, draws: Iterator[Float32]) -> None:
        self._draws = draws

    def randn(self, shape: Any, out: Float32) -> None:
        np.copyto(out, next(self._draws))


def changes_of(rng: np.random.Generator, rows: int) -> Changes:
    """At three steps or fewer: another sample, noise on top of it, or a part of it."""
    other = rng.standard_normal(SHAPE).astype(np.float32)
    ways = [lambda x: 0 * x + other, lambda x: x + 0.5 * other, lambda x: 0.7 * x]
    steps = rng.permutation(rows)[: len(ways)]
    return {int(step): ways[k] for k, step in enumerate(rng.permutation(steps))}


def begun(schedule: Schedule, x: Float32, noises: Float32) -> Trajectory:
    trajectory = Trajectory(SHAPE)
    noise = Listed(noises[i] for i in np.flatnonzero(schedule.noisy))
    trajectory.start(schedule, noise=noise, guidance_scale=1.0, latents=x)
    return trajectory


def run_ours(
    schedule: Schedule, x: Float32, outputs: Float32, noises: Float32, changes: Changes
) -> list[Float32]:
    """Every sample that the network sees, and the result."""
    trajectory = begun(schedule, x, noises)
    samples = []
    for i, output in enumerate(outputs):
        trajectory.guide_and_step(output, None)
        if i in changes:
            trajectory.latents = trajectory.latents + 1  # what is assigned last counts
            trajectory.latents = changes[i](trajectory.latents - 1)
        samples.append(trajectory.latents.copy())
    return samples


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value).replace("'", ""))
def test_a_change_goes_as_far_as_in_diffusers(
    name: str,
    options: dict[str, Any],
    prediction_type: str,
    base_config: dict[str, Any],
    diffusers_run: Callable[..., Any],
) -> None:
    rng = np.random.default_rng(SEED)
    scheduler = Scheduler.from_config(base_config | options | {"prediction_type": prediction_type}, name)
    sampler = scheduler.sampler
    config = {option.name: getattr(sampler, option.name) for option in sampler.options()}
    step = {"eta": float(rng.uniform(0.1, 1))} if name in ("ddim", "tcd") else {}
    for steps in (1, 2, 3, *rng.integers(4, 25, 3).tolist()):
        schedule = scheduler.schedule(steps, **step)
        rows = len(schedule)
        x, outputs, noises = (
            rng.standard_normal(shape).astype(np.float32) for shape in (SHAPE, (rows, *SHAPE), (rows, *SHAPE))
        )
        changes = changes_of(rng, rows)
        inputs = [
            torch.from_numpy(array.astype(np.float64))
            for array in (schedule.init_noise_sigma * x[None], outputs, noises)
        ]
        in_torch = {
            i: lambda x, change=change: torch.from_numpy(change(x.numpy())) for i, change in changes.items()
        }
        class_name = next(name for name, kind in CLASSES.items() if kind is type(sampler))
        reference = diffusers_run(
            class_name, config, steps, lambda n, inputs=inputs: inputs, changes=in_torch, **step
        )
        got = run_ours(schedule, x, outputs, noises, changes)
        for i, (ours, theirs) in enumerate(zip(got, reference.samples[1:], strict=True)):
            gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
            assert gap < TOLERANCE, (
                f"RT_STEERING_SEED={SEED}: row {i} of {rows}, changed after {sorted(changes)}: {gap:.1e}"
            )


@pytest.mark.parametrize("name", SAMPLERS)
def test_looking_changes_nothing(name: str, base_config: dict[str, Any]) -> None:
    """Not a bit of the result; and what is shown cannot be written into, which would go unseen."""
    rng = np.random.default_rng(SEED)
    schedule = Scheduler.from_config(base_config, name).schedule(9)
    rows = len(schedule)
    x, outputs, noises = (
        rng.standard_normal(shape).astype(np.float32) for shape in (SHAPE, (rows, *SHAPE), (rows, *SHAPE))
    )
    left, watched = (begun(schedule, x, noises) for _ in range(2))
    for output in outputs:
        seen = watched.latents
        with pytest.raises(ValueError, match="read-only"):
            seen += 1
        for trajectory in (left, watched):
            trajectory.guide_and_step(output, None)
    np.testing.assert_array_equal(left.latents, watched.latents, f"RT_STEERING_SEED={SEED}")


def test_what_a_caller_is_shown_is_what_it_has_put_there(base_config: dict[str, Any]) -> None:
    schedule = Scheduler.from_config(base_config, "unipc").schedule(6)
    trajectory = Trajectory(SHAPE)
    trajectory.start(
        schedule, noise=Listed(iter(())), guidance_scale=1.0, latents=np.zeros(SHAPE, np.float32)
    )
    for i in range(6):
        trajectory.guide_and_step(np.ones(SHAPE, np.float32), None)
        trajectory.latents = np.full(SHAPE, i, np.float32)
        assert (trajectory.latents == i).all()
        if i < 5:
            trajectory.feed(seen := np.empty(SHAPE, np.float32))
            assert (seen == i).all()
