"""What a run found out, as tables: for a terminal in 80 columns, and for `docs/benchmarks.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rt.bench.gpu_parts.bars import bars
from rt.bench.gpu_parts.figures import TABLES
from rt.bench.gpu_parts.part import Figures, Part
from rt.bench.gpu_parts.parts import PARTS
from rt.bench.gpu_parts.record import Gpu, Outcome, Run, Status, runs
from rt.bench.gpu_parts.section import Section

Record = Mapping[str, Any]


def text(run: Run) -> str:
    """All of one run, and how each part ended."""
    found = [section.text() for section in sections(run.parts)]
    ended = Section(
        "Dry run on the CPU: no figure below means anything" if run.dry else run.gpu.name,
        ("part", "ended", "seconds"),
        [(name, each.status.value, f"{each.seconds:.0f}") for name, each in run.parts.items()],
    )
    return "\n\n".join([*([ended.text()] if run.dry else []), *found, *([] if run.dry else [ended.text()])])


def render(records: Iterable[Record]) -> str:
    """Of each GPU the newest figures of each part, for the document."""
    found = [
        "\n\n".join([_heading(measured), *(section.markdown() for section in sections(measured.parts))])
        for measured in newest_parts(records)
    ]
    return "\n\n".join(found) or "not measured yet"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of one GPU.

    Attributes:
        gpu: As the newest run found it.
        parts: The outcomes that are shown, by name.
        versions: Those with which each was measured.
    """

    gpu: Gpu
    parts: Mapping[str, Outcome]
    versions: Mapping[str, Mapping[str, str]]


def newest_parts(records: Iterable[Record]) -> list[Measured]:
    """Of each GPU of the records, which come oldest first, the newest outcome of each part that has figures.

    What was broken off does not take the place of an older outcome with more in it.
    """
    found: dict[str, Measured] = {}
    for run in runs(records):
        older = found.get(run.gpu.name, Measured(gpu=run.gpu, parts={}, versions={}))
        newer = {
            name: each
            for name, each in run.parts.items()
            if each.figures and (name not in older.parts or each.supersedes(older.parts[name]))
        }
        if not run.dry and newer:
            versions = {**older.versions, **dict.fromkeys(newer, run.gpu.versions)}
            parts = {**older.parts, **newer}
            found[run.gpu.name] = Measured(gpu=run.gpu, parts=parts, versions=versions)
    return [*found.values()]


def sections(parts: Mapping[str, Outcome]) -> Iterator[Section]:
    """A table of each part that has figures, in the order of `PARTS`, then the aims that these parts have."""
    ceilings = parts["ceilings"].figures if "ceilings" in parts else {}
    for part in PARTS:
        outcome = parts.get(part.name)
        if outcome is not None and outcome.figures:
            head, rows, note = TABLES[part.module](outcome.figures, ceilings)
            if outcome.status is not Status.DONE:
                note = f"{note} Not complete: {outcome.reason}.".strip()
            yield Section(_title(part, outcome.figures), head, rows, note)
    if aims := bars(parts):
        rows = [(bar.what, bar.wanted, bar.measured, bar.verdict) for bar in aims]
        yield Section("The aims, which are for an H100", ("aim", "wanted", "measured", "reached"), rows)


def _heading(measured: Measured) -> str:
    """When and with what; where versions differ, which parts each were measured with."""
    together: dict[str, list[str]] = {}
    for name in measured.parts:
        versions = ", ".join(f"{what} {version}" for what, version in measured.versions[name].items())
        together.setdefault(versions, []).append(name)
    if len(together) == 1:
        [(versions, names)] = together.items()
        return f"Measured on an {measured.gpu.name}, {_when(measured, names)}, with {versions}."
    each = "; ".join(
        f"{', '.join(names)}: {_when(measured, names)}, with {versions}"
        for versions, names in together.items()
    )
    return f"Measured on an {measured.gpu.name}. {each}."


def _when(measured: Measured, names: Iterable[str]) -> str:
    dates = sorted({measured.parts[name].date for name in names})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _title(part: Part, figures: Figures) -> str:
    return f"{part.title}, {figures['dtype']}" if "dtype" in figures else part.title
