"""Load the candidates of a group, call them in turn, and say how each compares."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from rt.bench.peers.candidate import ANCHOR, REFERENCE, Candidate
from rt.bench.peers.comparison import Figure, Result, Row
from rt.bench.peers.peer import MEASURES, PICTURE, Float32, Inputs, Setting
from rt.bench.peers.remote import Remote
from rt.bench.timing import Samples, gemm_gflops
from rt.errors import BackendError, NumericsError

Asker = Callable[[Candidate], Remote]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        turns: Of each measure, how many a candidate has.
        warm_steps: Of the picture that comes before the first turn.
        turn_s: A turn repeats its call until so many seconds have passed.
    """

    turns: dict[str, int]
    warm_steps: int = 1
    turn_s: float = 0.0


class Group:
    """Candidates that are loaded together. A context: leaving it ends their processes."""

    def __init__(self, number: int, start: Asker) -> None:
        self._number = number
        self._start = start
        self._remotes: dict[str, Remote] = {}
        self._rows: dict[str, Row] = {}
        self._measures: dict[str, list[str]] = {}
        self._seconds: dict[str, dict[str, list[float]]] = {}
        self._outputs: dict[str, dict[str, Float32]] = {}
        self.absent: dict[str, str] = {}
        self.gemm_gflops: list[float] = []

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        for remote in self._remotes.values():
            remote.close()

    def load(self, candidate: Candidate, setting: Setting, warm: Inputs, measures: Iterable[str]) -> None:
        """Start the candidate and call each measure once; one that cannot is left out with its reason."""
        name = candidate.name
        setting = replace(setting, options=candidate.options)
        try:
            if candidate.exports:
                self._export(candidate, setting)
            remote = self._remotes[name] = self._start(candidate)
            started = time.perf_counter()
            loaded = remote.ask("load", (candidate, setting))
            self._measures[name] = [each for each in measures if each in loaded["measures"]]
            for measure in self._measures[name]:
                remote.ask("run", (measure, warm, 0.0))
            ready_s = time.perf_counter() - started
            load_mib = max(loaded["peak_rss_mib"], remote.ask("peak"))
        except BackendError as error:
            self._drop(name, error)
            return
        self._seconds[name], self._outputs[name] = {}, {}
        self._rows[name] = Row(
            name=name,
            ours=candidate.ours,
            group=self._number,
            versions=loaded["versions"],
            ready_s=ready_s,
            load_mib=load_mib,
            steady_mib=0.0,
            figures={},
        )
        click.echo(f"  {name}: ready in {ready_s:.1f} s, {load_mib / 1024:.1f} GiB")

    def turn(self, measure: str, inputs: Inputs, number: int, seconds: float) -> None:
        """Each candidate once, beginning with another one each time, after a look at how fast the machine is."""
        self.gemm_gflops.append(gemm_gflops())
        names = [name for name in self._rows if measure in self._measures[name]]
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            try:
                outcome = self._remotes[name].ask("run", (measure, inputs, seconds))
            except BackendError as error:
                self._drop(name, error)
                continue
            for key, value in outcome.seconds.items():
                self._seconds[name].setdefault(key, []).append(value)
            if number == 0 and outcome.output is not None:
                self._outputs[name][measure] = _finite(outcome.output, name, measure)

    def finish(self, reference: dict[str, Float32]) -> list[Row]:
        """The rows; outputs of the reference, where it is in this group, are added to `reference`.

        Raises:
            BackendError: When the anchor has none, to which all others are compared.
        """
        self.gemm_gflops.append(gemm_gflops())
        if ANCHOR.name not in self._rows:
            raise BackendError(
                f"nothing to compare with: {self.absent.get(ANCHOR.name, f'{ANCHOR.name} was not loaded')}"
            )
        reference |= self._outputs.get(REFERENCE.name, {})
        base = {measure: Samples(tuple(s)).median for measure, s in self._seconds[ANCHOR.name].items()}
        rows = []
        for name, row in self._rows.items():
            figures = {}
            # Of what the anchor was not asked for there is no ratio.
            for measure in (each for each in MEASURES if each in self._seconds[name] and each in base):
                samples = Samples(tuple(self._seconds[name][measure]))
                output = self._outputs[name].get(measure)
                error = None if output is None else _error(output, reference.get(measure))
                ratio = samples.median / base[measure]
                figures[measure] = Figure(samples=samples, ratio=ratio, error=error)
            rows.append(replace(row, steady_mib=self._remotes[name].ask("peak"), figures=figures))
        return rows

    def _export(self, candidate: Candidate, setting: Setting) -> None:
        """In a process that ends, since what exporting takes is not the candidate's memory."""
        exporter = self._start(candidate)
        try:
            exporter.ask("prepare", (candidate, setting))
        finally:
            exporter.close()

    def _drop(self, name: str, error: BackendError) -> None:
        """Go on without it."""
        click.echo(f"left out: {error}", err=True)
        self.absent[name] = str(error)
        self._rows.pop(name, None)
        if name in self._remotes:
            self._remotes.pop(name).close()


def compare(
    groups: Sequence[Sequence[Candidate]],
    plan: Plan,
    rounds: Sequence[Inputs],
    setting: Setting,
    logs: Path,
) -> Iterator[Result]:
    """Run one group after the other; gives each one's result as soon as it is there.

    A reference that is in no group is loaded first, for the outputs of all but the picture.

    Args:
        groups: Who runs with whom.
        plan: What is measured, how often.
        rounds: The inputs of each turn, as many as the longest measure has turns.
        setting: What is the same for all candidates.
        logs: A folder for what their processes print.

    Raises:
        BackendError: When the anchor or the reference does not run.
        NumericsError: When a candidate gives NaN or Inf.
    """
    logs.mkdir(parents=True, exist_ok=True)

    def start(candidate: Candidate) -> Remote:
        return Remote(candidate.name, logs / f"{re.sub(r'[^a-z0-9]+', '-', candidate.name.lower())}.log")

    reference: dict[str, Float32] = {}
    if REFERENCE not in groups[0]:
        parts = [measure for measure in plan.turns if measure != PICTURE]
        reference = _reference(start, setting, rounds[0], parts) if parts else {}
    warm = replace(rounds[0], steps=min(plan.warm_steps, rounds[0].steps))
    for number, candidates in enumerate(groups):
        with Group(number, start) as group:
            click.echo(f"group {number + 1} of {len(groups)}")
            for candidate in candidates:
                group.load(candidate, setting, warm, plan.turns)
            for measure, turns in plan.turns.items():
                for turn in range(turns):
                    group.turn(measure, rounds[turn], turn, plan.turn_s)
            rows = group.finish(reference)
        yield Result(rows=tuple(rows), gemm_gflops=tuple(group.gemm_gflops), absent=group.absent)


def _reference(start: Asker, setting: Setting, inputs: Inputs, measures: Sequence[str]) -> dict[str, Float32]:
    remote = start(REFERENCE)
    try:
        remote.ask("load", (REFERENCE, replace(setting, options=REFERENCE.options)))
        outcomes = {measure: remote.ask("run", (measure, inputs, 0.0)) for measure in measures}
    finally:
        remote.close()
    return {measure: outcome.output for measure, outcome in outcomes.items()}


def _finite(output: Float32, name: str, measure: str) -> Float32:
    if not np.isfinite(output).all():
        raise NumericsError(
            f"{name} gave NaN or Inf as {MEASURES[measure]}; leave it out with --skip {name!r}"
        )
    return output


def _error(output: Float32, expected: Float32 | None) -> float | None:
    """Relative L2 distance, to three digits; None without anything to compare with."""
    if expected is None:
        return None
    return float(f"{np.linalg.norm(output - expected) / np.linalg.norm(expected):.3g}")
