"""The guided step of SD 1.5 alone, ours beside diffusers under `torch.compile` in the same minutes: a first ratio.

Weights are random, and not the same: times only. The compiler's mode is reduce-overhead, which replays CUDA graphs and
is ready in a fifth of the time that max-autotune takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rt.bench.gpu_parts.compiled import Compiled
from rt.bench.gpu_parts.model import Model
from rt.bench.gpu_parts.package import Package, write
from rt.bench.gpu_parts.packages import folder_of, step_of
from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import Call, Place, find
from rt.bench.gpu_parts.settings import OURS, OURS_TUNED, REDUCED, SETTINGS, STEP
from rt.bench.record import commit

_ROUNDS = 9


def _elsewhere(context: Context, place: Place) -> Call:
    """The package that was compiled elsewhere."""
    return Package(folder_of(context, place) / STEP, place, context.seed).graph()


def _tuned(context: Context, place: Place) -> Call:
    """Compiled here, its products timed in every way; kept for another run at this commit."""
    folder = context.scratch / "packages" / (STEP if place.dry else f"{STEP}-tuned-{commit() or 'no-commit'}")
    write(folder, *step_of(context, place), place, max_autotune=not place.dry)
    return Package(folder, place, context.seed).graph()


def _reduced(context: Context, place: Place) -> Call:
    setting = SETTINGS["sd15"].tiny() if place.dry else SETTINGS["sd15"]
    return Compiled(Model(setting=setting, place=place, seed=context.seed), mode="reduce-overhead").unet


_LOADED: Mapping[str, Callable[[Context, Place], Call]] = {
    OURS: _elsewhere,
    OURS_TUNED: _tuned,
    REDUCED: _reduced,
}


def run(context: Context, candidates: Sequence[str]) -> Iterator[Figures]:
    """See the module. `candidates`, by name, all timed again whenever there is one more.

    Args:
        context: Of the run.
        candidates: In the order in which they are prepared; names in `_LOADED`.
    """
    place = find(context)
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in candidates:
        started = time.perf_counter()
        calls[name] = _LOADED[name](context, place)
        calls[name]()
        place.wait()
        rows[name] = {"ready_s": time.perf_counter() - started}
        for which, samples in place.compare(calls, _ROUNDS).items():
            rows[which]["time"] = samples.to_json()
        yield {"dtype": "float32" if place.dry else "float16", "candidates": rows}
