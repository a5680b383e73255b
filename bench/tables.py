"""The tables of the documents, written from `bench/results/`: `python -m rt.bench.tables` in a checkout.

A table shows the newest record of each kind; a document has it between two markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rt.bench.record import RESULTS

DOCUMENT = RESULTS.parents[1] / "README.md"
_MARKED = re.compile(r"<!-- benchmarks -->.*<!-- /benchmarks -->", re.DOTALL)


def render(results: Path = RESULTS) -> str:
    """The table of all records under `results`, with where they come from."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    rows = [row for record in records for row in _rows(record)]
    machines = {
        f"{p['machine']['processor']}, {p['machine']['cores']} cores, {p['date']}"
        for p in (record["provenance"] for record in records)
    }
    newest = dict(rows)  # records come oldest first
    table = "\n".join(f"| {what} | {figure} |" for what, figure in newest.items())
    return f"Measured on {'; '.join(sorted(machines))}:\n\n| what | figure |\n|---|---|\n{table}"


def update(document: Path = DOCUMENT, results: Path = RESULTS) -> None:
    """Put the table between the markers of `document`."""
    text = document.read_text()
    marked = f"<!-- benchmarks -->\n{render(results)}\n<!-- /benchmarks -->"
    document.write_text(_MARKED.sub(lambda _: marked, text))


def _rows(record: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What one record says, in words; each kind of record is known by a field of its own."""
    if "wall_s" in record:
        what = f"`rt build {record['model']}`, {record['dtype']}: time, peak memory"
        yield what, f"{record['wall_s']:.0f} s, {record['peak_rss_gib']:.1f} GiB"
    elif "step" in record:
        subject, step = record["subject"], record["step"]["session step"]
        size = f"{subject['profile']['height']} x {subject['profile']['width']}"
        what = f"U-Net step with guidance, {subject['model']}, {subject['dtype']}, {size}"
        yield (
            what,
            f"{_time(step['median_s'])}, {step['ratio']:.2f} of OpenVINO called by hand on the same graph",
        )
    elif "processes" in record:
        for process in ("import rt", "rt run"):
            what = f"`{process}`, whole process" + (
                f", {record['steps']} steps" if process == "rt run" else ""
            )
            yield what, _time(record["processes"][process]["median_s"])
    elif "results" in record:
        for result in record["results"]:
            what = f"loop outside the engine, {result['subject']['model']}, {result['subject']['dtype']}"
            yield what, f"{result['loop']['overhead_percent']:.1f} % of a step"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


if __name__ == "__main__":
    update()
