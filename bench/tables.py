"""The tables of the documents, written from `bench/results/`: `python -m rt.bench.tables` in a checkout.

A table shows the newest record of each kind; a document has it between two markers that bear its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rt.bench.gpu_parts.table import render as render_gpu
from rt.bench.markdown import table
from rt.bench.peers.table import render
from rt.bench.record import RESULTS, read
from rt.bench.stand_in_gpu.table import render as render_launches

ROOT = RESULTS.parents[1]
DEMO = "emoji-ldm"
Record = dict[str, Any]


def tables(results: Path = RESULTS) -> dict[Path, dict[str, str]]:
    """Of each document below the checkout, its tables by name, of the records under `results`."""
    records = read(results)
    return {
        Path("README.md"): {"benchmarks": _speed(records)},
        Path("docs/benchmarks.md"): {
            "peers": render(records),
            "gpu": render_gpu(records),
            "launches": render_launches(records),
        },
        Path(f"examples/{DEMO}/README.md"): {
            "quality": _quality(records),
            "settings": _settings(records),
            "inpainting": _inpainting(records),
            "shortcuts": _shortcuts(records),
        },
    }


def update(root: Path = ROOT, results: Path = RESULTS) -> None:
    """Put each table between its markers in the documents of `root`."""
    for document, named in tables(results).items():
        text = (root / document).read_text()
        for name, body in named.items():
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            text = f"{before}{begin}\n{body}\n{end}{after}"
        (root / document).write_text(text)


def _speed(records: Iterable[Record]) -> str:
    newest: dict[str, tuple[str, str]] = {}  # records come oldest first
    for record in records:
        provenance = record["provenance"]
        machine = provenance["machine"]
        where = f"{machine['processor']}, {machine['cores']} cores, {provenance['date']}"
        newest |= {what: (figure, where) for what, figure in _rows(record)}
    places = sorted({where for _, where in newest.values()})
    rows = [(what, figure) for what, (figure, _) in newest.items()]
    return f"Measured on {'; '.join(places)}:\n\n{table(('what', 'figure'), rows)}"


def _quality(records: Iterable[Record]) -> str:
    """How often a model draws what it is asked for."""
    head = (
        "model",
        "steps",
        "guidance",
        "plain names",
        "one emoji",
        "both of a pair",
        "background",
        "distance",
    )
    rows = {}
    for record in records:
        if "quality" in record:
            settings, quality = record["settings"], record["quality"]
            percents = (quality[f"{kind}_percent"] for kind in ("plain", "single", "pair", "background"))
            dtype = settings["dtype"]
            rows[record["model"], dtype, settings["steps"], settings["guidance_scale"]] = (
                record["model"] + ("" if dtype == "fp32" else f", {dtype}"),
                str(settings["steps"]),
                "off" if settings["guidance_scale"] <= 1 else f"{settings['guidance_scale']:g}",
                *(f"{percent:g} %" for percent in percents),
                f"{quality['distance']:.1f}",
            )
    return table(head, rows.values())


def _settings(records: Iterable[Record]) -> str:
    """What steps, samplers, guidance and precision do to the demo model."""
    compared = [
        record["comparison"] for record in records if "comparison" in record and record["model"] == DEMO
    ]
    rows = [
        (
            result["varied"],
            result["value"],
            f"{result['right_percent']:g} %",
            f"{result['distance']:.1f}",
            f"{result['psnr_db']:g} dB" if result["psnr_db"] else "",
        )
        for result in (compared[-1] if compared else ())
    ]
    return table(("varied", "value", "all right", "distance", "PSNR to fp32"), rows)


def _shortcuts(records: Iterable[Record]) -> str:
    """What step caching and guidance intervals cost and save on the demo model."""
    head = ("full steps", "guided part", "all right", "distance", "PSNR to the full run", "loop")
    measured = [r["shortcuts"] for r in records if "shortcuts" in r and r["model"] == DEMO]
    rows = [
        (
            f"1 in {result['step_cache']}" if "step_cache" in result else "all",
            " to ".join(f"{part:g}" for part in result.get("guidance_interval", ())) or "all",
            f"{result['right_percent']:g} %",
            f"{result['distance']:.1f}",
            f"{result['psnr_db']:g} dB" if result["psnr_db"] else "",
            f"{_time(result['loop_s'])}, {result['speedup']:.2f}×",
        )
        for result in (measured[-1] if measured else ())
    ]
    return table(head, rows)


def _inpainting(records: Iterable[Record]) -> str:
    """How often the inpainting model paints what is missing, and how much of the rest it keeps."""
    head = ("model", "painted right", "PSNR outside the hole", "of the autoencoder alone")
    rows = {}
    for record in records:
        if "inpainting" in record:
            found = record["inpainting"]
            rows[record["model"]] = (
                record["model"],
                f"{found['painted_percent']:g} %",
                f"{found['outside_psnr_db']:.1f} dB",
                f"{found['outside_psnr_of_autoencoder_db']:.1f} dB",
            )
    return table(head, rows.values())


def _rows(record: Record) -> Iterable[tuple[str, str]]:
    """What one record says, in words; each kind of record is known by a field of its own."""
    if "wall_s" in record:
        what = f"`rt build {record['model']}`, {record['dtype']}: time, peak memory"
        yield what, f"{record['wall_s']:.0f} s, {record['peak_rss_gib']:.1f} GiB"
    elif "step" in record:
        subject, step = record["subject"], record["step"]["session step"]
        size = f"{subject['profile']['height']} x {subject['profile']['width']}"
        what = f"U-Net step with guidance, {subject['model']}, {subject['dtype']}, {size}"
        theirs = record.get("by_hand_dtype", subject["dtype"])
        program = "the same" if theirs == subject["dtype"] else f"the {theirs}"
        yield (
            what,
            f"{_time(step['median_s'])}, {step['ratio']:.2f} of OpenVINO called by hand on {program} program",
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
