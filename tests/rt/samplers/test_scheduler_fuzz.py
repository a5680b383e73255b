"""Random configs of every class, with the options of all others, against diffusers on basis vectors.

`RT_FUZZ_SEED` sets the seed, `RT_FUZZ_CONFIGS` how many configs there are for all classes together. A failure prints
both and the config as one line.

Either both draw the same, or diffusers fails or gives what is not finite, or what we refuse is in `REFUSED`. Most
are compared to the end.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rt.errors import ConfigError
from rt.samplers import Scheduler
from rt.samplers.names import CLASSES

SEED = int(os.environ.get("RT_FUZZ_SEED", "20250111"))
CONFIGS = int(os.environ.get("RT_FUZZ_CONFIGS", "2000"))


def rarely(value: Any, *others: Any, chance: float = 0.06) -> Callable[[random.Random], Any]:
    """`value`, but now and then one of `others`."""
    return lambda rng: rng.choice(others) if rng.random() < chance else value


def one_of(*values: Any) -> Callable[[random.Random], Any]:
    """Any of them, all as likely."""
    return lambda rng: rng.choice(values)


OPTIONS: dict[str, Callable[[random.Random], Any]] = {
    "beta_start": lambda rng: 10 ** rng.uniform(-5, -2.3),
    "beta_end": lambda rng: 10 ** rng.uniform(-2.2, -1),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": one_of("epsilon", "v_prediction", "sample"),
    "timestep_spacing": one_of("leading", "linspace", "trailing"),
    "steps_offset": one_of(0, 1, 1, 2, 7),
    "clip_sample": rarely(False, True),
    "clip_sample_range": one_of(1.0, 2.0),
    "set_alpha_to_one": one_of(False, True),
    "thresholding": rarely(False, True, chance=0.02),
    "dynamic_thresholding_ratio": one_of(0.995, 0.9),
    "sample_max_value": one_of(1.0, 2.0),
    "rescale_betas_zero_snr": one_of(False, True),
    "variance_type": rarely(None, "fixed_small", "fixed_small_log", "fixed_large", "learned", chance=0.5),
    "skip_prk_steps": rarely(True, False, chance=0.02),
    "use_karras_sigmas": one_of(False, True),
    "use_exponential_sigmas": rarely(False, True, chance=0.4),
    "use_beta_sigmas": rarely(False, True, chance=0.03),
    "use_lu_lambdas": rarely(False, True, chance=0.3),
    "use_flow_sigmas": rarely(False, True, chance=0.02),
    "use_dynamic_shifting": rarely(False, True, chance=0.02),
    "flow_shift": one_of(1.0, 3.0),
    "sigma_min": lambda rng: rng.choice([None, rng.uniform(0.01, 0.3)]),
    "sigma_max": lambda rng: rng.choice([None, rng.uniform(2, 20)]),
    "final_sigmas_type": one_of("zero", "sigma_min"),
    "interpolation_type": rarely("linear", "log_linear", chance=0.02),
    "timestep_type": rarely("discrete", "continuous", chance=0.02),
    "algorithm_type": one_of(
        "dpmsolver++", "dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"
    ),
    "solver_order": one_of(1, 2, 2, 3),
    "solver_type": one_of("midpoint", "heun", "bh1", "bh2", "logrho"),
    "lower_order_final": one_of(False, True),
    "euler_at_final": one_of(False, True),
    "lambda_min_clipped": lambda rng: rng.choice([-float("inf"), rng.uniform(-6, -1), -5.1]),
    "disable_corrector": lambda rng: sorted(rng.sample(range(8), rng.randint(0, 4))),
    "predict_x0": rarely(True, False, chance=0.02),
    "solver_p": one_of(None),
    "shift_terminal": rarely(None, 0.1, chance=0.02),
    "original_inference_steps": one_of(50, 20, 7),
    "timestep_scaling": one_of(10.0, 1.0, 7.5),
    "noise_sampler_seed": rarely(None, 3, chance=0.02),
    "time_shift_type": one_of("exponential"),
    "some_other_option": one_of(1, "word", None),
}
"""What each option may be. Values that we are known to refuse are rare, for they end a run before it is compared."""


@dataclass(frozen=True)
class Run:
    """A config and how it is run."""

    config: dict[str, Any]
    steps: int
    timesteps: list[int] | None
    eta: float | None

    def __str__(self) -> str:
        return f"{json.dumps(self.config)}, {self.steps}, timesteps={self.timesteps}, eta={self.eta}"


def draw(rng: random.Random, class_name: str) -> Run:
    """Any options, about a third of all, at a few steps of mostly few training timesteps."""
    config: dict[str, Any] = {"_class_name": class_name}
    total = rng.choice([rng.randint(2, 40), rng.randint(20, 200), 100, 1000])
    if total != 1000 or rng.random() < 0.5:
        config["num_train_timesteps"] = total
    config |= {name: pick(rng) for name, pick in OPTIONS.items() if rng.random() < 0.35}
    for name, clipped in (("clip_sample", False), ("skip_prk_steps", True)):
        if rng.random() < 0.9:  # the default of some classes, which we refuse
            config.setdefault(name, clipped)
    # σ of a model that is in use stays below some hundreds; from a million on the table's float32 is not enough.
    highest = min(config.get("beta_end", 0.05), 20 / total)
    if "beta_end" in config:
        config["beta_end"] = highest
    if rng.random() < 0.1:
        config["trained_betas"] = sorted(rng.uniform(highest / 50, highest) for _ in range(total))
    for name in list(config)[1:]:
        if rng.random() < 0.02:
            config[name] = None
    if rng.random() < 0.1:
        config["_use_default_values"] = rng.sample(sorted(OPTIONS), 5)
    if config.get("num_train_timesteps", 0) is None:
        del config["num_train_timesteps"]
        config.pop("trained_betas", None)
        total = 1000
    steps = min(total, rng.choice([1, 2, 3, rng.randint(1, 9), rng.randint(1, 25)]))
    given = sorted(rng.sample(range(total), steps), reverse=True) if rng.random() < 0.15 else None
    if given is not None and config.get("timestep_spacing", "") is None:  # which diffusers then runs without
        del config["timestep_spacing"]
    eta = rng.choice([0.0, 1.0, rng.random()]) if class_name in ("DDIMScheduler", "TCDScheduler") else None
    return Run(config, steps, given, eta)


REFUSED: dict[str, str] = {
    "clip_sample got True": "clipping is not linear",
    "thresholding got True": "clipping is not linear",
    "variance_type got 'learned'": "no Stable Diffusion predicts its variance",
    "skip_prk_steps got False": "the steps after the warm-up read outputs from twelve evaluations before",
    "use_beta_sigmas got True": "needs scipy",
    "use_flow_sigmas got True": "for flow matching",
    "use_dynamic_shifting got True": "for flow matching",
    "shift_terminal got 0.1": "for flow matching",
    "interpolation_type got 'log_linear'": "not implemented",
    "timestep_type got 'continuous'": "for other models: the network is told the logarithm of the noise level",
    "predict_x0 got False": "not implemented",
    "noise_sampler_seed got 3": "the Brownian path of torchsde",
    "algorithm_type got 'sde-dpmsolver'": "not implemented",
    "in 'leading' spacing start at timestep": "diffusers tells the network of timesteps that there are not",
    "got lower_order_final=False, where its last step": "of such a config only a run of one step is finite",
}
"""What we refuse and diffusers runs: the option or words of our message, and why."""


def same_timesteps(scheduler: Scheduler, run: Run, ours: Any, reference: Any) -> bool:
    """Equal, except that one of both may round or truncate a level's fractional timestep the other way.

    That is where the level is within an ulp of the edge: torch's float32 square root is an ulp off now and then.
    """
    if len(ours) != len(reference):
        return False
    sampler = scheduler.sampler
    close = np.isclose(ours, reference, rtol=0, atol=1e-3)
    if close.all() or sampler.level_spacing is None:
        return bool(close.all())
    exact = sampler.noise.timestep_of(sampler.levels(run.steps, None)[1][:-1])  # type: ignore[attr-defined]
    edges = exact[np.isclose(2 * exact, np.round(2 * exact), rtol=0, atol=2e-3)]
    others = zip(ours[~close], reference[~close], strict=True)
    return all(abs(t - other) == 1 and (np.abs(edges - t) <= 1).any() for t, other in others)


class NothingToCompare(Exception):
    """A run that one of both does not do."""


def compare(run: Run, diffusers_probe: Any, table_probe: Any) -> str | None:
    """What is wrong, if anything is.

    Raises:
        NothingToCompare: See there.
    """
    options: dict[str, Any] = {} if run.eta is None else {"eta": run.eta}
    try:
        scheduler = Scheduler.from_config(run.config)
        ours = table_probe(scheduler.schedule(run.steps, timesteps=run.timesteps, **options))
        refusal = None
    except ConfigError as error:
        if any(words in str(error) for words in REFUSED):
            raise NothingToCompare from None
        refusal = f"refused: {error}"
    if refusal is None and scheduler.sampler.rescale_betas_zero_snr:
        options["alphas_cumprod"] = scheduler.sampler.noise.alphas_cumprod
    try:
        reference = diffusers_probe(
            run.config["_class_name"], run.config, run.steps, timesteps=run.timesteps, **options
        )
    except Exception:
        raise NothingToCompare from None
    if not np.isfinite(reference.samples).all():
        raise NothingToCompare
    if refusal is not None:
        return refusal
    n = len(reference.timesteps)
    if len(ours.timesteps) != n:
        if reference.timesteps[-1] == -1:
            raise NothingToCompare  # rounding gave diffusers' trailing spacing one step too many
        return f"{len(ours.timesteps)} rows, not {n}"
    if not same_timesteps(scheduler, run, ours.timesteps, reference.timesteps):
        return f"timesteps {ours.timesteps}, not {reference.timesteps}"
    for name in ("c_in", "init_noise_sigma"):
        got, expected = getattr(ours, name), getattr(reference, name)
        if not np.allclose(got, expected, rtol=1e-5, atol=0):
            return f"{name} {got}, not {expected}"
    # diffusers also draws noise that it multiplies by 0: after the last that counts, and where a step has no length.
    still = set(np.flatnonzero(ours.timesteps[1:] == ours.timesteps[:-1]).tolist())
    counted = {row for row in reference.drawn if row <= max(ours.drawn, default=-1)}
    if ours.drawn - still != counted - still:
        return f"draws at rows {ours.drawn}, not {reference.drawn}"
    gap = ours.difference(reference)
    # The table is float32, and some samplers' steps cancel from σ; no model begins beyond 1000.
    sigma = float(scheduler.sampler.noise.sigmas[int(ours.timesteps.max())])
    return f"samples differ by {gap:.1e}" if not gap < 2e-6 * np.clip(sigma, 50, 1000) else None


@pytest.mark.parametrize("class_name", CLASSES)
def test_random_configs(class_name: str, diffusers_probe: Any, table_probe: Any) -> None:
    rng = random.Random(f"{SEED} {class_name}")
    wrong, count, skipped = [], CONFIGS // len(CLASSES), 0
    for _ in range(count):
        run = draw(rng, class_name)
        try:
            with np.errstate(all="ignore"):
                fault = compare(run, diffusers_probe, table_probe)
        except NothingToCompare:
            skipped += 1
        else:
            wrong += [f"{fault}\n    {run}"] if fault else []
    assert not wrong, f"RT_FUZZ_SEED={SEED} RT_FUZZ_CONFIGS={CONFIGS}: {len(wrong)}\n" + "\n".join(wrong)
    assert skipped < 0.7 * count, f"only {count - skipped} of {count} were compared"
