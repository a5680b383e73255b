"""Whole schedules on the kernels of the loop beside `rt.trajectory`, in a process of its own.

Prints a JSON object of largest differences, relative to the largest value, and of faults.

The network is a table of random outputs, in fp32 so that nothing but the order of sums differs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rt.kernels import launch, registry
from rt.kernels.spec import Case
from rt.noise import Generator
from rt.samplers import Schedule, Scheduler, shorten
from rt.samplers.packed import COLUMNS, RING_H, RING_X, pack, set_apart
from rt.trajectory import Trajectory

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ROWS = (
    ("dpmpp-2m", 7, 7.5, 0.0),
    ("euler-a", 9, 5.0, 0.7),
    ("ddim", 4, 1.0, 0.0),
    ("lms", 8, 3.0, 0.0),
    ("deis", 6, 7.5, 0.3),
    ("pndm", 9, 2.0, 0.0),
    ("heun", 3, 7.5, 0.0),
    ("unipc", 5, 4.0, 0.0),
    ("lcm", 1, 1.5, 0.0),
    ("dpmpp-sde", 3, 3.0, 0.0),
)
"""Sampler, steps, guidance and rescale of each row."""
STEERED = ("heun", "unipc", "dpmpp-sde")
"""Those whose latents the host changes after every step."""
SHAPE = (1, 15, 20)
ELEMENTS = 300  # more than a block has, and no multiple


class Loop:
    """The buffers of a loop and its kernels; the network reads `latents` and `features` and writes `prediction`."""

    def __init__(self, rows: int, steps: int, sides: int, device: str) -> None:
        self.device = device
        self.sizes = {"rows": rows, "steps": steps, "sides": sides, "draws": steps, "elements": ELEMENTS}
        self.features_size = 2 * rows * 50  # two sides of 50 features
        owner = torch.arange(rows, dtype=torch.int32).repeat_interleave(50).repeat(2)
        integers = {
            name: torch.zeros(rows, dtype=torch.int32)
            for name in ("position", "upcoming", "length", "broken")
        }
        self.tensors: dict[str, Tensor] = {
            name: tensor.to(device)
            for name, tensor in {
                **integers,
                "owner": owner,
                "state": torch.full(
                    (rows, RING_X + RING_H, ELEMENTS), torch.nan
                ),  # of an earlier, broken run
                "prediction": torch.zeros(sides * rows, ELEMENTS),
                "factor": torch.ones(rows),
                "table": torch.zeros(rows, steps, COLUMNS.count),
                "noise": torch.full((rows, steps, ELEMENTS), torch.nan),
                "latents": torch.zeros(rows, ELEMENTS),
                "scale": torch.zeros(rows),
                "out": torch.zeros(self.features_size),
                "time_table": torch.arange(steps * self.features_size).reshape(steps, -1).float(),
            }.items()
        }

    def launch(self, name: str, **renamed: str) -> None:
        """One kernel; `renamed` says which buffer a parameter is where the names differ."""
        spec = registry.spec(name)
        sizes = {**self.sizes, **({"elements": self.features_size} if name == "select_rows" else {})}
        arguments = [argument.name for argument in (*spec.inputs, *spec.outputs)]
        tensors = {argument: self.tensors[renamed.get(argument, argument)] for argument in arguments}
        launch.run(spec, Case(sizes=sizes, dtype="float32"), tensors)

    def begin(self, row: int, table: NDArray[Any], length: int, x: NDArray[Any], scale: float) -> None:
        """What the host writes when a request joins; then `feed` is launched."""
        tensors = self.tensors
        tensors["table"][row] = torch.from_numpy(table)
        tensors["length"][row] = length
        tensors["scale"][row] = scale
        tensors["upcoming"][row] = 0
        tensors["broken"][row] = 0
        tensors["state"][row, 0] = torch.from_numpy(x.reshape(-1))

    def step(self, network: Any) -> None:
        """What a CUDA graph of a step holds."""
        self.launch("select_rows", table="time_table")
        network()
        self.launch("guidance_rescale")
        self.launch("guide_and_step")

    def numpy(self, name: str) -> NDArray[Any]:
        """A copy of a buffer."""
        return self.tensors[name].cpu().numpy().copy()


def schedule_of(name: str, steps: int) -> Schedule:
    """Of CONFIG; the second half of DEIS is not guided."""
    schedule = Scheduler.from_config(CONFIG, name).schedule(steps)
    return shorten(schedule, guidance_interval=(0.0, 0.5)) if name == "deis" else schedule


def gap(result: NDArray[Any], expected: NDArray[Any]) -> float:
    """Relative to the largest value; infinite where either is not finite."""
    if not np.isfinite(result).all() or not np.isfinite(expected).all():
        return float("inf")
    return float(np.abs(result.reshape(-1) - expected.reshape(-1)).max() / np.abs(expected).max())


class Rows:
    """The rows of `ROWS` on the kernels and as trajectories, row r `late[r]` steps behind."""

    def __init__(self, device: str, late: dict[int, int]) -> None:
        self.late = late
        self.schedules = [schedule_of(name, steps) for name, steps, _, _ in ROWS]
        guidance, rescale = [row[2] for row in ROWS], [row[3] for row in ROWS]
        self.packed = pack(self.schedules, guidance_scale=guidance, guidance_rescale=rescale)
        self.loop = Loop(len(ROWS), self.packed.table.shape[1], 2, device)
        self.trajectories = [Trajectory(SHAPE) for _ in ROWS]
        self.random = np.random.default_rng(0)
        self.gaps = {name: 0.0 for name, *_ in ROWS}
        self.faults: list[str] = []

    def join(self, row: int) -> None:
        """Row `row` begins, on both."""
        schedule, (_, _, guidance, rescale) = self.schedules[row], ROWS[row]
        self.trajectories[row].start(
            schedule, noise=Generator(row), guidance_scale=guidance, guidance_rescale=rescale
        )
        twin = Generator(row)
        x = twin.randn(SHAPE) * np.float32(schedule.init_noise_sigma)
        self.loop.begin(row, self.packed.table[row], len(schedule), x, float(self.packed.feed[row]))
        for i in np.flatnonzero(schedule.noisy):
            self.loop.tensors["noise"][row, i] = torch.from_numpy(twin.randn(SHAPE).reshape(-1))

    def run(self) -> None:
        """Until all are done."""
        last = max(len(schedule) + self.late.get(row, 0) for row, schedule in enumerate(self.schedules))
        for step in range(last + 1):  # one more than needed: nothing may move any more
            joining = [row for row in range(len(ROWS)) if self.late.get(row, 0) == step]
            for row in joining:
                self.join(row)
            if joining:
                self.loop.launch("feed", position="upcoming", out="latents")
                self.loop.tensors["scale"].zero_()
            self.step()

    def step(self) -> None:
        """One step on both."""
        loop = self.loop
        before = {name: loop.numpy(name) for name in ("latents", "state", "upcoming")}
        running = [
            row for row, one in enumerate(self.trajectories) if hasattr(one, "position") and not one.done
        ]
        outputs = self.random.standard_normal((2, len(ROWS), *SHAPE)).astype(np.float32)
        fed = np.empty(SHAPE, np.float32)
        for row in running:
            self.trajectories[row].feed(fed)
            self.note(row, gap(before["latents"][row], fed))

        def network() -> None:
            steps = np.minimum(loop.numpy("position"), loop.sizes["steps"] - 1)
            expected = steps[loop.numpy("owner")] * loop.features_size + np.arange(loop.features_size)
            if (loop.numpy("out") != expected).any():
                self.faults.append("features of another step")
            loop.tensors["prediction"].copy_(torch.from_numpy(outputs.reshape(2 * len(ROWS), -1)))

        loop.step(network)
        for row, trajectory in enumerate(self.trajectories):
            if row in running:
                uncond = outputs[0, row] if trajectory.guided else None
                trajectory.guide_and_step(outputs[1, row], uncond)
                place = trajectory.position % RING_X
                self.note(row, gap(loop.numpy("state")[row, place], trajectory.latents))
                if loop.numpy("upcoming")[row] != trajectory.position:
                    self.faults.append(f"row {row} at {loop.numpy('upcoming')[row]}")
                if ROWS[row][0] in STEERED and not trajectory.done:
                    self.steer(row)
            elif any(
                loop.numpy(name)[row].tobytes() != before[name][row].tobytes()
                for name in ("latents", "state", "upcoming")
            ):
                self.faults.append(f"row {row} moved")
        if loop.numpy("broken").any():  # although rows that have not joined are full of NaN
            self.faults.append("broken")

    def steer(self, row: int) -> None:
        """Put another sample in the place of a row's, on both, as a callback does."""
        trajectory, schedule, tensors = self.trajectories[row], self.schedules[row], self.loop.tensors
        position, state, table = trajectory.position, tensors["state"][row], self.packed.table[row].copy()
        if set_apart(schedule, table[:, COLUMNS.weights :], position):
            state[(position + 1) % RING_X] = state[position % RING_X]
            tensors["table"][row] = torch.from_numpy(table)
        new = self.random.standard_normal(SHAPE).astype(np.float32) * (1 + np.abs(trajectory.latents).max())
        trajectory.latents = new
        state[position % RING_X] = torch.from_numpy(new.reshape(-1))
        tensors["latents"][row] = state[position % RING_X] * schedule.c_in[position]

    def note(self, row: int, difference: float) -> None:
        """Keep the largest."""
        name = ROWS[row][0]
        self.gaps[name] = max(self.gaps[name], difference)


def broken_at(device: str, value: float) -> list[list[int]]:
    """`broken` after each of four steps of three rows, of which row 1 meets `value` in its second step."""
    schedule = schedule_of("dpmpp-2m", 4)
    packed = pack([schedule] * 3, guidance_scale=[2.0] * 3)
    loop = Loop(3, 4, 1, device)
    for row in range(3):
        loop.begin(row, packed.table[row], 4, Generator(row).randn(SHAPE), 1.0)
    found = []
    for step in range(4):

        def network(step: int = step) -> None:
            loop.tensors["prediction"].zero_()
            if step == 1:
                loop.tensors["prediction"][1, ELEMENTS - 1] = value

        loop.step(network)
        found.append(loop.numpy("broken").tolist())
    return found


def main() -> None:
    """Everything, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    together, late = Rows(device, {}), Rows(device, {1: 2, 4: 5})
    with np.errstate(all="raise"):
        together.run()
        late.run()
    results = {
        "together": {"gaps": together.gaps, "faults": together.faults},
        "late": {"gaps": late.gaps, "faults": late.faults},
        "broken": {str(value): broken_at(device, value) for value in (np.nan, np.inf, 1.0)},
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
