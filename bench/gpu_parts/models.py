"""A model: its U-Net, its decoder and whole pictures, ours against diffusers and torch.compile in the same minutes.

Weights are random; all candidates have the same. Errors are relative L2 distances from diffusers in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rt.backends.inductor import convolutions
from rt.bench.gpu_parts.compiled import Compiled
from rt.bench.gpu_parts.eager import Eager
from rt.bench.gpu_parts.model import Model, Peer
from rt.bench.gpu_parts.ours import Ours, model_bundle
from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import Place, find, relative_error
from rt.bench.gpu_parts.settings import COMPILED, DIFFUSERS, OURS, OURS_FP8, PICTURE, SETTINGS, UNET, VAE
from rt.bench.gpu_parts.trace import observe
from rt.bench.timing import Samples, interleave
from rt.config import DType

ROUNDS, PICTURES = 9, 5
_BUILDS = {OURS: DType.FP16, OURS_FP8: DType.FP8}
_LOADED: Mapping[str, Callable[[Model, Path], Peer]] = {
    DIFFUSERS: lambda model, scratch: Eager(model),
    OURS: lambda model, scratch: Ours(model, scratch, _BUILDS[OURS]),
    OURS_FP8: lambda model, scratch: Ours(model, scratch, _BUILDS[OURS_FP8]),
    COMPILED: lambda model, scratch: Compiled(model),
}


def run(context: Context, setting: str, candidates: Sequence[str]) -> Iterator[Figures]:
    """See the module.

    Args:
        context: Of the run.
        setting: Its name.
        candidates: In the order in which they are prepared; names in `_LOADED`.

    Raises:
        ConfigError: A bundle of ours was not built.
    """
    place = find(context)
    wanted = SETTINGS[setting]
    model = Model(setting=wanted.tiny() if context.dry else wanted, place=place, seed=context.seed)
    for name in {OURS, OURS_FP8}.intersection(candidates):
        _ = model_bundle(model, context.scratch, _BUILDS[name]).seconds  # or it ends here
    reference, work = _reference(model)
    peers: dict[str, Peer] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in candidates:
        peer, row = _ready(partial(_LOADED[name], model, context.scratch), model, reference)
        peers[peer.name], rows[peer.name] = peer, row
        for measure, samples in _compare(peers, model).items():
            for which, each in samples.items():
                rows[which].setdefault("measures", {})[measure] = each.to_json()
        traces = context.scratch / "traces"
        stem = f"{setting}-{peer.name.replace(' ', '-')}"
        row["trace"] = observe(partial(peer.picture, max(model.setting.steps)), traces / f"{stem}.json")
        if isinstance(peer, Ours):
            row["loop"] = _loops(peer, model, traces / f"{stem}-loop.json")
        yield {
            "model": model.checkpoint.name,
            "side": model.setting.side,
            "guided": model.setting.guided,
            "dtype": str(model.dtype).removeprefix("torch."),
            "flops": work,
            "bars_ms": dict(model.setting.bars_ms),
            "candidates": rows,
        }


def _reference(model: Model) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Outputs in fp32 without tf32, and the FLOPs of products in each."""
    peer = Eager(model, torch.float32)
    outputs: dict[str, Tensor] = {}
    flops: dict[str, int] = {}
    for measure, call in ((UNET, peer.unet), (VAE, peer.vae)):
        with FlopCounterMode(display=False) as counter, convolutions(exact=True):
            outputs[measure] = call().cpu()
        flops[measure] = counter.get_total_flops()
    return outputs, flops


def _ready(
    load: Callable[[], Peer], model: Model, reference: Mapping[str, Tensor]
) -> tuple[Peer, dict[str, Any]]:
    """A candidate that has done everything once: seconds until then, those of its build apart,
    the memory that it holds, and its errors."""
    before, started = model.place.used_gib(), time.perf_counter()
    peer = load()
    errors = {}
    for measure, call in ((UNET, peer.unet), (VAE, peer.vae)):
        errors[measure] = relative_error(call().cpu(), reference[measure])
    for steps in model.setting.steps:
        peer.picture(steps)
    model.place.wait()
    ready_s = time.perf_counter() - started
    row: dict[str, Any] = {"ready_s": ready_s, "held_gib": model.place.used_gib() - before, "errors": errors}
    return peer, {**row, "build_s": peer.built.seconds} if isinstance(peer, Ours) else row


def _compare(peers: Mapping[str, Peer], model: Model) -> dict[str, dict[str, Samples]]:
    """Measure → candidate → times: of the device for the networks, of the host's clock for pictures."""
    place = model.place
    found = {
        UNET: place.compare({name: peer.unet for name, peer in peers.items()}, ROUNDS),
        VAE: place.compare({name: peer.vae for name, peer in peers.items()}, ROUNDS),
    }
    for steps in model.setting.steps:
        found[f"{PICTURE} {steps}"] = _pictures(place, [*peers.items()], steps)
    return found


def _loops(ours: Ours, model: Model, file: Path) -> dict[str, Any]:
    """Way of launching the loop → seconds of a step with all that belongs to it, and what the GPU did meanwhile."""
    steps = max(model.setting.steps)
    loops = ours.loops(steps)
    for run in loops.values():
        run()
    calls = {name: partial(model.place.walled, run) for name, run in loops.items()}
    found = interleave(calls, 1 if model.place.dry else PICTURES)
    return {
        name: {
            "step": Samples(tuple(seconds / steps for seconds in samples.seconds)).to_json(),
            "trace": observe(loops[name], file.with_stem(f"{file.stem}-{name.replace(' ', '-')}")),
        }
        for name, samples in found.items()
    }


def _pictures(place: Place, peers: Sequence[tuple[str, Peer]], steps: int) -> dict[str, Samples]:
    calls = {name: partial(place.walled, partial(peer.picture, steps)) for name, peer in peers}
    return interleave(calls, 1 if place.dry else PICTURES)
