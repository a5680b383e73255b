"""What was aimed at on an H100, and what a record says to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rt.bench.gpu_parts.parts import TITLES
from rt.bench.gpu_parts.record import Outcome
from rt.bench.gpu_parts.settings import COMPILED, OURS, SETTINGS, measure_name
from rt.device_session import GraphMode

_MOST_GAP_PERCENT = 1.0


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One aim.

    Attributes:
        what: It is about.
        wanted: With its unit.
        measured: In the same unit, or "" where the record does not say.
        reached: Whether; None where that is not known.
    """

    what: str
    wanted: str
    measured: str = ""
    reached: bool | None = None

    @property
    def verdict(self) -> str:
        """For people."""
        return "not measured" if self.reached is None else "yes" if self.reached else "NO"


def bars(parts: Mapping[str, Outcome]) -> list[Bar]:
    """All of them, or none where no model and no kernel was begun."""
    if not parts.keys() & {*SETTINGS, "timings"}:
        return []
    return [*_models(parts), _kernels(parts)]


def _models(parts: Mapping[str, Outcome]) -> Iterator[Bar]:
    for setting in SETTINGS.values():
        if not setting.bars_ms:
            continue
        outcome = parts.get(setting.name)
        candidates = outcome.figures.get("candidates", {}) if outcome else {}
        ours, theirs = (candidates.get(name, {}).get("measures", {}) for name in (OURS, COMPILED))
        title = TITLES[setting.name]
        for measure, most in setting.bars_ms.items():
            what, wanted = f"{title}: {measure_name(measure)}", f"<= {most:g} ms"
            if measure in ours:
                found = 1e3 * ours[measure]["median_s"]
                yield Bar(what=what, wanted=wanted, measured=f"{found:.2f} ms", reached=found <= most)
            else:
                yield Bar(what=what, wanted=wanted)
        for measure, least in setting.bars_faster.items():
            what, wanted = f"{title}: {measure_name(measure)}, {COMPILED}", f">= {least:g} ×"
            if measure in ours and measure in theirs:
                ratio = theirs[measure]["median_s"] / ours[measure]["median_s"]
                yield Bar(what=what, wanted=wanted, measured=f"{ratio:.2f} ×", reached=ratio >= least)
            else:
                yield Bar(what=what, wanted=wanted)
        if setting.guided:
            loop = candidates.get(OURS, {}).get("loop", {}).get(GraphMode.STEP.value, {})
            what, wanted = f"{title}: gap between steps", f"< {_MOST_GAP_PERCENT:g} %"
            gap = loop.get("trace", {}).get("gap_percent")
            if gap is None:
                yield Bar(what=what, wanted=wanted)
            else:
                reached = gap < _MOST_GAP_PERCENT
                yield Bar(what=what, wanted=wanted, measured=f"{gap:.2f} %", reached=reached)


def _kernels(parts: Mapping[str, Outcome]) -> Bar:
    """Of all workloads that were timed; reached only when none was left out, or raised."""
    bar = Bar(what="kernels: workloads at least as fast as torch", wanted="all")
    figures = parts["timings"].figures if "timings" in parts else {}
    if not figures:
        return bar
    slower, timed, failed = 0, 0, 0
    for row in figures["workloads"]:
        others = [each["median_s"] for name, each in row["times"].items() if name != OURS]
        if not row["passed"]:
            failed += 1
        elif others:
            timed += 1
            slower += row["times"][OURS]["median_s"] > min(others)
    measured = f"{timed - slower} of {timed}" + (f", {failed} wrong" if failed else "")
    if figures["left_out"]:
        measured += f", {len(figures['left_out'])} not timed"
    known = slower or failed or not figures["left_out"]
    return Bar(
        what=bar.what,
        wanted=bar.wanted,
        measured=measured,
        reached=not (slower or failed) if known else None,
    )
