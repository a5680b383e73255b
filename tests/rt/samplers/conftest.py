"""The basis-vector probe: what a scheduler of diffusers does to every one of its inputs, step by step.

A sampler is linear, so it is known by its action on a basis. Run it in the vector space R^(1 + 2N) with the
initial sample e_0, the network output of row i e_{1+i}, and the noise of row i e_{1+N+i}: after each row the
sample is the vector of coefficients of all that went in. Two samplers are the same if these vectors are.

diffusers computes its coefficients in float32. To tell its rounding from an error of ours, the probe has it
go on in float64 from what it rounds to float32 on purpose: ᾱ and the noise levels.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rt.samplers import Schedule

BASE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Probe:
    """What one run did: row by row, and the vector of coefficients of the sample after each."""

    timesteps: NDArray[np.float64]
    c_in: NDArray[np.float64]
    init_noise_sigma: float
    drawn: set[int]
    samples: NDArray[np.float64]

    def difference(self, other: Probe) -> float:
        """The largest difference of two coefficients after the same row, relative to that row's largest."""
        gap = np.abs(self.samples - other.samples).max(axis=1)
        return float((gap / np.abs(other.samples).max(axis=1)).max())


class _TorchIn64:
    """torch, where float32 is float64: for noise levels that come from numpy, and samples that are cast."""

    float32 = torch.float64

    @staticmethod
    def from_numpy(array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.double() if tensor.is_floating_point() else tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@functools.lru_cache(maxsize=8)
def _scheduler(class_name: str, config: str) -> Any:
    kind = _class(class_name)
    lay_out = kind.set_timesteps
    # Some constructors lay out all training timesteps, which is slow, and nothing that a run keeps.
    with _patched(kind, set_timesteps=lambda self, _, *more: lay_out(self, 1, *more)):
        return kind.from_config(json.loads(config))


def _class(name: str) -> Any:
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    # Its module wants torchsde, for a noise that it is not given here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler


class _Brownian:
    """A path W in place of torchsde's: on from level to level by the noises of the rows, each of unit variance."""

    def __init__(self, noise: Callable[[], torch.Tensor]) -> None:
        self._noise = noise
        self._start, self._lengths, self._draws = None, [], []

    def __call__(self, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """(W(start) − W(stop))/√(start − stop), where calls repeat their start or begin at the last stop."""
        start, stop = float(start), float(stop)
        if self._start is None or not np.isclose(start, self._start, rtol=1e-6):
            self._start, self._lengths, self._draws = start, [], []
        self._lengths.append(start - stop - sum(self._lengths))
        self._draws.append(self._noise())
        steps = zip(self._lengths, self._draws, strict=True)
        return sum(length**0.5 * draw for length, draw in steps) / (start - stop) ** 0.5


@contextmanager
def _patched(module: Any, **attributes: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's and torch's, about how diffusers calls them
        for name, value in attributes.items():
            patch.setattr(module, name, value, raising=False)
        yield


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The first sample, and outputs and noises of all rows."""


def run_diffusers(
    class_name: str,
    config: Mapping[str, Any],
    steps: int,
    inputs: Callable[[int], Inputs],
    *,
    promote: bool = True,
    timesteps: list[int] | None = None,
    alphas_cumprod: NDArray[np.float32] | None = None,
    changes: Mapping[int, Callable[[Any], Any]] | None = None,
    **step: Any,
) -> Probe:
    """Run the scheduler of diffusers that `class_name` and `config` say, on the `inputs` for a number of rows.

    `changes` say what a caller makes of the sample after a row; `alphas_cumprod` take the place of its own.
    """
    scheduler = copy.deepcopy(_scheduler(class_name, json.dumps(config)))
    if alphas_cumprod is not None:
        # An ulp of torch's float32 square root is magnified the more, the less noise there was to rescale.
        if not np.allclose(scheduler.alphas_cumprod.numpy(), alphas_cumprod, rtol=0, atol=1e-4):
            pytest.fail(f"another noise schedule: {alphas_cumprod}, not {scheduler.alphas_cumprod}")
        scheduler.alphas_cumprod = torch.from_numpy(alphas_cumprod.copy())
        if getattr(scheduler, "final_alpha_cumprod", 1) != 1:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    module = importlib.import_module(type(scheduler).__module__)
    replaced = {"torch": _TorchIn64()} if promote else {}
    with _patched(module, **replaced):
        scheduler.set_timesteps(
            **({"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps})
        )
    init_noise_sigma = float(scheduler.init_noise_sigma)
    x, outputs, noises = inputs(len(scheduler.timesteps))
    if promote:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        if hasattr(scheduler, "final_alpha_cumprod"):
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    if class_name == "LMSDiscreteScheduler":  # its quadrature is slow on tensors
        scheduler.sigmas = [float(sigma) for sigma in scheduler.sigmas]

    c_in, samples, drawn, row = [], [x[0].double().numpy()], set(), 0

    def noise(*_: Any, **__: Any) -> torch.Tensor:
        if row in drawn:
            pytest.fail("two draws in one row")
        drawn.add(row)
        return noises[row : row + 1]

    scheduler.noise_sampler = _Brownian(noise)
    with _patched(module, randn_tensor=noise, **replaced):
        for row, t in enumerate(scheduler.timesteps):
            c_in.append(float(scheduler.scale_model_input(torch.ones(1, 1, dtype=torch.float64), t)))
            x = scheduler.step(outputs[row : row + 1], t, x, return_dict=False, **step)[0]
            if changes is not None and row in changes:
                x = changes[row](x)
            samples.append(x[0].double().numpy())
    return Probe(
        scheduler.timesteps.double().numpy(), np.array(c_in), init_noise_sigma, drawn, np.array(samples)
    )


def probe_diffusers(class_name: str, config: Mapping[str, Any], steps: int, **options: Any) -> Probe:
    """Probe the scheduler of diffusers that `class_name` and `config` say; the rest is that of `run_diffusers`."""

    def basis(n: int) -> Inputs:
        vectors = torch.eye(1 + 2 * n, dtype=torch.float64)
        return vectors[:1], vectors[1 : 1 + n], vectors[1 + n :]

    return run_diffusers(class_name, config, steps, basis, **options)


def run_table(
    schedule: Schedule, x: NDArray[Any], outputs: NDArray[Any], noises: NDArray[Any], dtype: type = np.float64
) -> NDArray[Any]:
    """Every sample of a run, (N + 1, …), by the formula of `Schedule`, with the arithmetic in `dtype`."""
    a, b = schedule.a.astype(dtype), schedule.b.astype(dtype)
    p, q, n = (column.astype(dtype) for column in (schedule.p, schedule.q, schedule.n))
    xs, hs = [x.astype(dtype)], []
    for i in range(len(schedule)):
        hs.append(p[i] * xs[i] + q[i] * outputs[i].astype(dtype))
        x = n[i] * noises[i].astype(dtype)
        for k in range(min(i + 1, a.shape[1])):
            x = x + a[i, k] * xs[i - k]
        for k in range(min(i + 1, b.shape[1])):
            x = x + b[i, k] * hs[i - k]
        xs.append(x)
    return np.array(xs)


def probe_table(schedule: Schedule) -> Probe:
    """Probe a table of ours."""
    n = len(schedule)
    basis = np.eye(1 + 2 * n)
    samples = run_table(schedule, basis[0], basis[1 : 1 + n], basis[1 + n :])
    return Probe(
        schedule.timesteps.astype(np.float64),
        schedule.c_in.astype(np.float64),
        schedule.init_noise_sigma,
        set(np.flatnonzero(schedule.noisy).tolist()),
        samples,
    )


@pytest.fixture
def base_config() -> dict[str, Any]:
    """The noise schedule of Stable Diffusion, as its scheduler_config.json has it, less the class."""
    return dict(BASE)


@pytest.fixture
def diffusers_probe() -> Callable[..., Probe]:
    """`(class_name, config, steps, **step_arguments)` → Probe."""
    return probe_diffusers


@pytest.fixture
def diffusers_run() -> Callable[..., Probe]:
    """`(class_name, config, steps, inputs, **options)` → Probe, see `run_diffusers`."""
    return run_diffusers


@pytest.fixture
def table_probe() -> Callable[[Schedule], Probe]:
    """`(schedule)` → Probe."""
    return probe_table


@pytest.fixture
def table_run() -> Callable[..., NDArray[Any]]:
    """`(schedule, x, outputs, noises, dtype)` → all samples."""
    return run_table
