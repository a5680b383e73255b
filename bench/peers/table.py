"""Comparisons as tables: the newest figure of each candidate, with its ratio to the anchor in its own run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rt.bench.markdown import table
from rt.bench.peers.peer import MEASURES, PICTURE
from rt.bench.timing import Samples

Record = Mapping[str, Any]


@dataclass(eq=False)
class Line:
    """A candidate: the newest of its figures by the column that shows them, and the newest of its rows."""

    row: Mapping[str, Any]
    figures: dict[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(eq=False)
class Section:
    """A model on a machine: a line a candidate, in the order of the newest record that has it."""

    model: str
    size: int
    machine: Mapping[str, Any]
    anchor: str
    dates: list[str] = field(default_factory=list)
    gemm_gflops: list[float] = field(default_factory=list)
    lines: dict[str, Line] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """In the order of `MEASURES`; pictures of few steps before those of more."""
        found = {column for line in self.lines.values() for column in line.figures}
        return sorted(found, key=_place)

    def heading(self) -> str:
        """What was measured where."""
        machine, speed = self.machine, self.gemm_gflops
        return (
            f"**{self.model}**, {self.size} × {self.size}, with guidance, on {machine['processor']}, "
            f"{machine['cores']} cores, {machine['memory_gib']:g} GiB, {' and '.join(sorted(set(self.dates)))}. "
            f"float32 GEMM before every round: {min(speed):.0f} to {max(speed):.0f} GFLOP/s."
        )

    def times(self) -> str:
        """Medians, each with its ratio to the anchor's."""
        return table(
            (f"time (× {self.anchor})", *self.columns),
            (
                (name, *(_time(line.figures.get(column)) for column in self.columns))
                for name, line in self.lines.items()
            ),
        )

    def costs(self) -> str:
        """Errors, memory, and how long until a candidate is ready."""
        columns = [
            column
            for column in self.columns
            if any(line.figures.get(column, {}).get("error") is not None for line in self.lines.values())
        ]
        return table(
            (f"error (× {self.anchor}), memory", *columns, "peak while loading", "peak after", "ready"),
            (
                (
                    name,
                    *(_error(line.figures.get(column)) for column in columns),
                    *(f"{line.row[key] / 1024:.2f} GiB" for key in ("load_mib", "steady_mib")),
                    f"{line.row['ready_s']:.1f} s",
                )
                for name, line in self.lines.items()
            ),
        )


def sections(records: Iterable[Record]) -> list[Section]:
    """Of all records of comparisons among `records`, the oldest first; one a model and machine."""
    found: dict[tuple[str, str], Section] = {}
    for record in records:
        if "peers" not in record:
            continue
        peers, provenance = record["peers"], record["provenance"]
        machine = provenance["machine"]
        section = found.setdefault(
            (peers["model"], f"{machine['processor']} {machine['cores']}"),
            Section(peers["model"], peers["size"], machine, peers["anchor"]),
        )
        _add(section, peers, provenance["date"])
    return list(found.values())


def render(records: Iterable[Record]) -> str:
    """Headings and tables of all sections."""
    parts = [(each.heading(), each.times(), each.costs()) for each in sections(records)]
    return "\n\n".join(piece for part in parts for piece in part)


def _add(section: Section, peers: Mapping[str, Any], date: str) -> None:
    """Put the figures of one record in place of older ones."""
    older = section.lines
    section.lines = {}
    section.dates.append(date)
    section.gemm_gflops += [speed for group in peers["gemm_gflops"] for speed in group]
    anchors = {row["group"]: row["figures"] for row in peers["rows"] if row["name"] == peers["anchor"]}
    for row in peers["rows"]:
        before = older.pop(row["name"], Line(row)) if row["name"] not in section.lines else None
        line = section.lines.setdefault(row["name"], before or Line(row))
        line.row = row
        for measure, plain in row["figures"].items():
            figure = {**plain, "error_ratio": _ratio(plain, anchors[row["group"]].get(measure, {}))}
            column = _column(measure, peers["steps"])
            first = before is not None or column not in line.figures
            line.figures[column] = figure if first else _pooled(line.figures[column], figure)
    section.lines |= older


def _ratio(figure: Mapping[str, Any], anchor: Mapping[str, Any]) -> float | None:
    """Of the errors; None where the anchor has none."""
    error, least = figure["error"], anchor.get("error")
    return error / least if error is not None and least else None


def _pooled(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The anchor's figures of two groups as one."""
    samples = Samples((*one["seconds"], *other["seconds"]))
    return {**one, **samples.to_json()}


def _column(measure: str, steps: int) -> str:
    return f"{MEASURES[measure]}, {steps} steps" if measure == PICTURE else MEASURES[measure]


def _place(column: str) -> tuple[int, int]:
    name, _, steps = column.partition(", ")
    return list(MEASURES.values()).index(name), int(steps.removesuffix(" steps") or 0)


def _time(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    seconds = figure["median_s"]
    shown = f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    return f"{shown} ({figure['ratio']:.2f})"


def _error(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["error"] is None:
        return ""
    if not figure["error"]:
        return "0"
    ratio = figure["error_ratio"]
    return f"{figure['error']:.1e}" + ("" if ratio is None else f" ({ratio:.2g})")


def lines(record: Record) -> Iterator[str]:
    """One comparison for a terminal: its heading, its tables, and who is absent."""
    [section] = sections([record])
    yield from (section.heading(), "", section.times(), "", section.costs())
    yield from (f"absent: {reason}" for reason in record["peers"]["absent"].values())
