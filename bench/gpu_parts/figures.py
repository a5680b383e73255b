"""The figures of each part as the columns and rows of its table, with a note."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rt.bench.gpu_parts.part import Figures
from rt.bench.gpu_parts.section import Rows
from rt.bench.gpu_parts.settings import COMPILED, OURS, REDUCED, UNET, VAE, measure_name

_LAUNCHED = {"step": "a graph a step", "loop": "one graph"}
Table = tuple[tuple[str, ...], Rows, str]


def _ceilings(figures: Figures, ceilings: Figures) -> Table:
    rows = [("copy within the device", f"{figures['copy_tb_s']:.2f} TB/s")]
    rows += [(f"{name} product", f"{value:.0f} TFLOP/s") for name, value in figures.get("tflops", {}).items()]
    if "launch_us" in figures:
        rows.append(("a kernel launched by itself", f"{figures['launch_us']:.2f} us"))
        rows.append(("a kernel in a graph", f"{figures['replay_us']:.2f} us"))
    return ("ceiling", "measured"), [*rows], ""


def _kernels(figures: Figures, ceilings: Figures) -> Table:
    rows: Rows = []
    for name in dict.fromkeys(row["kernel"] for row in figures["cases"]):
        mine = [row for row in figures["cases"] if row["kernel"] == name]
        measured = [row for row in mine if row["error"] is not None]
        worst = max(measured, key=lambda row: row["error"] / (row["tolerance"] or 1), default=None)
        error = f"{worst['error']:.1e} of {worst['tolerance']:.0e}" if worst else ""
        rows.append((name, f"{sum(row['passed'] for row in mine)} of {len(mine)}", error))
    wrong = [f"{row['kernel']} {row['case']}" for row in figures["cases"] if not row["passed"]]
    return ("kernel", "right", "largest error"), rows, f"Wrong: {'; '.join(wrong)}." if wrong else ""


def _timings(figures: Figures, ceilings: Figures) -> Table:
    """A line a kernel, with its largest workload; ratios of all workloads at the end."""
    head = ("kernel", "largest workload", "time", "reaches", "of ceiling", "torch", "×", "× of all")
    rows: Rows = []
    for name in dict.fromkeys(row["kernel"] for row in figures["workloads"]):
        mine = [row for row in figures["workloads"] if row["kernel"] == name]
        timed = [row for row in mine if row["times"]]
        if not timed:
            rows.append((name, str(mine[0]["workload"]), "failed", "", "", "", "", ""))
            continue
        first = timed[0]
        best, ratio = best_alternative(first)
        speed, share = _reach(first, ceilings)
        ratios = [value for row in timed if (value := best_alternative(row)[1]) is not None]
        rows.append(
            (
                name,
                str(first["workload"]),
                _time(first["times"][OURS]["median_s"]),
                speed,
                share,
                best,
                "" if ratio is None else f"{ratio:.2f}",
                f"{min(ratios):.2f}–{max(ratios):.2f}" if ratios else "",
            )
        )
    checked = figures["workloads"]
    wrong = [f"{row['kernel']} {row['workload']}" for row in checked if not row["passed"]]
    cached = sum(row.get("cached", False) for row in checked)
    note = f"{len(checked) - len(wrong)} of {len(checked)} workloads agree with their reference."
    note += f" Wrong: {'; '.join(wrong)}." if wrong else ""
    note += " × is the time of the best alternative in torch over ours: above 1 ours is faster."
    note += f" So small that they were timed out of the L2 cache: {cached}." if cached else ""
    return head, rows, note + (f" Not timed: {len(figures['left_out'])}." if figures["left_out"] else "")


def best_alternative(row: Figures) -> tuple[str, float | None]:
    """The fastest alternative's time with its name, and how many times ours it takes."""
    others = {name: each["median_s"] for name, each in row["times"].items() if name != OURS}
    if not others:
        return "", None
    name = min(others, key=lambda each: others[each])
    return f"{_time(others[name])} {name}", others[name] / row["times"][OURS]["median_s"]


def _reach(row: Figures, ceilings: Figures) -> tuple[str, str]:
    """What moves or computes more, as a rate, and the part of its ceiling where that was measured."""
    seconds = row["times"][OURS]["median_s"]
    dtype = row["case"].split()[0]
    peak = ceilings.get("tflops", {}).get(dtype)
    copy = ceilings.get("copy_tb_s")
    compute = row["flops"] / (peak * 1e12) if peak else 0.0
    memory = row["bytes"] / (copy * 1e12) if copy else 0.0
    share = f"{max(compute, memory) / seconds:.0%}" if compute or memory else ""
    if compute > memory:
        return f"{row['flops'] / seconds / 1e12:.3g} TFLOP/s", share
    return f"{row['bytes'] / seconds / 1e12:.3g} TB/s", share


def _payloads(figures: Figures, ceilings: Figures) -> Table:
    rows: Rows = []
    for name in dict.fromkeys(row["kernel"] for row in figures["payloads"]):
        mine = [row for row in figures["payloads"] if row["kernel"] == name]
        worst = max(mine, key=lambda row: row["error"] / (row["tolerance"] or 1))
        right = sum(row["passed"] for row in mine)
        error = f"{worst['error']:.1e} of {worst['tolerance']:.0e}"
        rows.append((name, f"{right} of {len(mine)}", error, str(max(row["registers"] for row in mine))))
    return ("kernel", "right", "largest error", "registers"), rows, ""


def _demo(figures: Figures, ceilings: Figures) -> Table:
    rows: Rows = [
        (
            row["dtype"],
            f"{row['pictures']}, {row['steps']} steps",
            f"{row['levels']:.2f} of 255",
            f"{row['psnr_db']:.1f} dB",
            "yes" if row["passed"] else "NO",
        )
        for row in figures["pictures"]
    ]
    return ("format", "pictures", "largest difference", "least PSNR", "the same"), rows, ""


def _model(figures: Figures, ceilings: Figures) -> Table:
    candidates = figures["candidates"]
    measures = [*dict.fromkeys(name for row in candidates.values() for name in row["measures"])]
    base = candidates.get(COMPILED, {}).get("measures", {})
    rows: Rows = []
    for name, row in candidates.items():
        cells = []
        for measure in measures:
            seconds = row["measures"].get(measure, {}).get("median_s")
            theirs = base.get(measure, {}).get("median_s")
            ratio = f" ({theirs / seconds:.2f})" if seconds and theirs else ""
            cells.append(f"{_time(seconds)}{ratio}" if seconds else "")
        idle = f"{row['trace']['idle_percent']:.1f} %" if row.get("trace") else ""
        rows.append((name, *cells, idle, f"{row['held_gib']:.1f} GiB", _ready(row)))
    peak = ceilings.get("tflops", {}).get(figures["dtype"])
    floors = {m: _time(f / peak / 1e12) for m, f in figures["flops"].items()} if peak else {}
    rows.append(("floor: products alone", *(floors.get(measure, "") for measure in measures), "", "", ""))
    if figures["bars_ms"]:
        bars = figures["bars_ms"]
        rows.append(("aim", *(f"{bars[m]:g} ms" if m in bars else "" for m in measures), "", "", ""))
    columns = [measure_name(measure) for measure in measures]
    name = f"time (× {COMPILED})" if base else "time"
    return (name, *columns, "GPU idle", "holds", "ready"), rows, _remarks(candidates)


def _ready(row: Figures) -> str:
    """Seconds of the build, which is once, and of what every start takes; together where they are one."""
    loaded = f"{row['ready_s']:.0f} s"
    return f"{row['build_s']:.0f} + {loaded}" if "build_s" in row else loaded


def _remarks(candidates: Mapping[str, Any]) -> str:
    said = [
        f"{name} {row['errors'][UNET]:.1e} and {row['errors'][VAE]:.1e}" for name, row in candidates.items()
    ]
    note = f"Errors of U-Net and decoder, relative L2 from fp32: {', '.join(said)}."
    loops = [
        (f"A step of the loop of {name}", way, loop)
        for name, row in candidates.items()
        for way, loop in row.get("loop", {}).items()
    ]
    for what, way, loop in loops:
        note += f" {what}, {_LAUNCHED.get(way, way)}: {_time(loop['step']['median_s'])}"
        trace = loop["trace"]
        if "gap_us" in trace:
            note += f", between two the GPU waits {trace['gap_us']:.1f} us, {trace['gap_percent']:.2f} %"
        if "synchronisations" in trace:
            note += f", and the host waits {trace['synchronisations']} times while it launches them"
        note += "."
    return note


def _bundles(figures: Figures, ceilings: Figures) -> Table:
    row = (
        figures["bundle"],
        str(figures["programs"]),
        f"{figures['mib'] / 1024:.2f} GiB",
        f"{figures['seconds']:.0f} s",
    )
    return ("bundle", "programs", "size", "built in"), [row], ""


def _ablation(figures: Figures, ceilings: Figures) -> Table:
    """Each step's time, with its ratio to the first of its kind."""
    first = figures["passes"][0]["time"]["median_s"]
    rows: Rows = []
    for row in figures["passes"]:
        seconds = row["time"]["median_s"]
        name = row["pass"] if not rows else f"+ {row['pass']}"
        cells = (_time(seconds), f"{first / seconds:.2f}", f"{row['flops'] / 1e9:.3g}", f"{row['error']:.1e}")
        rows.append((name, *cells))
    launching = figures.get("launching", {})
    for name, samples in launching.items():
        ratio = launching["no graph"]["median_s"] / samples["median_s"]
        rows.append((f"compiled, {name}", _time(samples["median_s"]), f"{ratio:.2f}", "", ""))
    return ("guided step of SD 1.5", "time", "×", "GFLOP", "error"), rows, ""


def _environment(figures: Figures, ceilings: Figures) -> Table:
    facts = figures["facts"]
    problems = [f"{name}: {said}" for name, said in facts.items() if said.startswith("no: ")]
    return ("what", "found"), [*facts.items()], " ".join(f"{problem}." for problem in problems)


def _selftest(figures: Figures, ceilings: Figures) -> Table:
    rows: Rows = [
        (row["backend"], row["dtype"], row["form"], row["result"], row["detail"])
        for row in figures["outcomes"]
    ]
    failed = [
        f"{row['backend']} {row['dtype']}: {row['detail']}"
        for row in figures["outcomes"]
        if not row["passed"]
    ]
    return (
        ("engine", "format", "form", "result", "detail"),
        rows,
        f"Wrong: {'; '.join(failed)}." if failed else "",
    )


def _packages(figures: Figures, ceilings: Figures) -> Table:
    """A line a package, with the time and the launches of each kind of kernel that any of them has."""
    timed = [row for row in figures["packages"] if "time" in row]
    kinds = [*dict.fromkeys(kind for row in timed for kind in row.get("us", {}))]
    rows: Rows = []
    for row in figures["packages"]:
        if "time" not in row:
            rows.append((row["package"], "failed", *[""] * (len(kinds) + 2)))
            continue
        us, launches = row.get("us", {}), row.get("launches", {})
        cells = [f"{_time(us[kind] / 1e6)} in {launches[kind]}" if kind in us else "" for kind in kinds]
        count = str(sum(launches.values())) if launches else ""
        rows.append(
            (row["package"], _time(row["time"]["median_s"]), count, *cells, f"{row['ready_s']:.1f} s")
        )
    how = "tried out" if figures["tried"] else "as it deems best"
    note = f"Random weights, nothing tuned; cuDNN's convolutions {how}."
    problems = [f"{row['package']}: {row['problem']}" for row in figures["packages"] if "problem" in row]
    problems += [f"{row['package']} gives NaN or Inf" for row in timed if not row["finite"]]
    return (
        ("package", "time", "launches", *kinds, "ready"),
        rows,
        " ".join([note, *(f"{p}." for p in problems)]),
    )


def _steps(figures: Figures, ceilings: Figures) -> Table:
    """Each candidate's time, with the compiler's over it."""
    candidates = figures["candidates"]
    base = candidates.get(REDUCED)
    rows: Rows = []
    for name, row in candidates.items():
        seconds = row["time"]["median_s"]
        ratio = f"{base['time']['median_s'] / seconds:.2f}" if base else ""
        rows.append((name, _time(seconds), ratio, f"{row['ready_s']:.0f} s"))
    return ("guided step", "time", f"× {COMPILED}", "ready"), rows, "Random weights, not the same ones."


def _fp8(figures: Figures, ceilings: Figures) -> Table:
    names = ("fp16", "fp8", "fp8 with cast")
    rows = [
        (
            row["layer"],
            *(_time(row["times"][name]["median_s"]) for name in names),
            f"{row['errors']['fp8']:.1e}",
        )
        for row in figures["layers"]
    ]
    return ("layer", *names, "error"), rows, ""


TABLES: Mapping[str, Callable[[Figures, Figures], Table]] = {
    "ceilings": _ceilings,
    "environment": _environment,
    "kernels": _kernels,
    "timings": _timings,
    "bundles": _bundles,
    "packages": _packages,
    "selftest": _selftest,
    "steps": _steps,
    "payloads": _payloads,
    "demo": _demo,
    "models": _model,
    "ablation": _ablation,
    "fp8": _fp8,
}
"""By the module of a part, of its figures and those of the ceilings."""


def _time(seconds: float) -> str:
    """Three digits in the unit that fits."""
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
