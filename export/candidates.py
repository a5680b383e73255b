"""Which of several ways to compute an operator is taken: the likely fastest, or the one that was."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

logger = logging.getLogger(__name__)
RUNS, REPEATS = 20, 7
"""Runs in one graph, and how often that is timed."""


class Choose(Protocol):
    """Gives the name of a candidate."""

    def __call__(
        self, operator: Any, arguments: Sequence[Any], candidates: Mapping[str, Callable[..., Tensor]]
    ) -> str:
        """Of `candidates`, the likely fastest first, for arguments like these."""


def first(operator: Any, arguments: Sequence[Any], candidates: Mapping[str, Callable[..., Tensor]]) -> str:
    """See `Choose`: what is likely the fastest."""
    return next(iter(candidates))


class Fastest:
    """See `Choose`: what was the fastest on this GPU, timed once a shape.

    Each candidate runs often in a CUDA graph, in turn with the others; operands are random. One that fails there is
    left out, and says so in the log.

    Args:
        time: Calls → microseconds a run; on the GPU if left out.
    """

    def __init__(self, time: Callable[[Sequence[Callable[[], Any]]], Sequence[float]] | None = None) -> None:
        self._time = time or time_graphs
        self._known: dict[str, str] = {}

    def __call__(
        self, operator: Any, arguments: Sequence[Any], candidates: Mapping[str, Callable[..., Tensor]]
    ) -> str:
        """See the class."""
        key = f"{operator} {' '.join(map(_described, arguments))}"
        if key not in self._known:
            self._known[key] = (
                next(iter(candidates)) if len(candidates) == 1 else self._measure(key, arguments, candidates)
            )
        return self._known[key]

    def _measure(
        self, key: str, arguments: Sequence[Any], candidates: Mapping[str, Callable[..., Tensor]]
    ) -> str:
        calls: dict[str, Callable[[], Any]] = {}
        # A program is being traced: what is timed must be real.
        with _disable_current_modes(), torch.no_grad():
            operands = [_real(argument) for argument in arguments]
            for name, candidate in candidates.items():
                try:
                    candidate(*operands)
                except Exception as error:  # of a compiler, a library or the GPU
                    logger.warning("%s: %s fails: %s", key, name, str(error).strip().partition("\n")[0])
                else:
                    calls[name] = lambda candidate=candidate: candidate(*operands)  # type: ignore[misc]
            if not calls:
                return next(iter(candidates))  # and the build says why
            taken = dict(zip(calls, self._time([*calls.values()]), strict=True))
        best = min(taken, key=taken.__getitem__)
        each = ", ".join(f"{name} {microseconds:.1f} µs" for name, microseconds in taken.items())
        logger.info("%s: %s; kept %s", key, each, best)
        return best


def time_graphs(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Microseconds a run of each on the GPU, without launch overhead: medians, in turn."""
    graphs = []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(RUNS):
                call()
        graphs.append(graph)
    taken: list[list[float]] = [[] for _ in graphs]
    for _ in range(REPEATS):
        for graph, times in zip(graphs, taken, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / RUNS)
    return [statistics.median(times) for times in taken]


def _real(argument: Any) -> Any:
    """Numbers for a tensor that has none."""
    if not isinstance(argument, Tensor):
        return argument
    return torch.randn(argument.shape, device=argument.device).to(argument.dtype)


def _described(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')}{[*argument.shape]}"
    return str(argument)
