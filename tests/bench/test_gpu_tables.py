"""What the GPU benchmark found, as tables, aims and pictures."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rt.bench.gpu_parts.bars import bars
from rt.bench.gpu_parts.record import Outcome, Status
from rt.bench.gpu_parts.section import Section
from rt.bench.gpu_parts.table import render, sections, text
from rt.bench.gpu_parts.trace import kinds, summary

# importlib mode does not let a test import what lies beside it, and the process of a part is given this path.
sys.path.append(str(Path(__file__).parent))
from gpu_records import H100, a_run, outcome


def times(**seconds: float) -> dict[str, Any]:
    return {name.replace("_", " "): {"median_s": value} for name, value in seconds.items()}


KERNEL = {
    "kernel": "attention",
    "workload": "sd15",
    "case": "float16 batch=2",
    "passed": True,
    "bytes": 10**9,
    "flops": 10**12,
    "times": times(rt=0.002, torch=0.003, torch_flash=0.0025),
}
CEILINGS = outcome(copy_tb_s=2.5, tflops={"float16": 800.0})


def test_a_kernel_is_held_against_the_ceilings_and_the_best_alternative() -> None:
    small = {**KERNEL, "workload": "tiny", "times": times(rt=0.001, torch=0.0005), "cached": True}
    bad = {**KERNEL, "workload": "big", "passed": False, "times": {}}
    other = {**bad, "kernel": "geglu"}
    figures = {"workloads": [bad, KERNEL, small, other], "left_out": ["x y"]}
    _, section, aims = sections({"ceilings": CEILINGS, "timings": outcome(**figures)})
    assert section.rows[1][:3] == ("geglu", "big", "failed")
    assert section.rows[0] == (
        "attention",
        "sd15",
        "2 ms",
        "500 TFLOP/s",
        "62%",
        "2.5 ms torch flash",
        "1.25",
        "0.50–1.25",
    )
    assert "2 of 4 workloads agree with their reference. Wrong: attention big; geglu big." in section.note
    assert section.note.endswith("So small that they were timed out of the L2 cache: 1. Not timed: 1.")
    assert aims.rows[-1][2:] == ("1 of 2, 2 wrong, 1 not timed", "NO")


def test_a_kernel_that_raised_is_in_the_table() -> None:
    right = {"kernel": "geglu", "case": "small", "error": 1e-4, "tolerance": 1e-3, "passed": True}
    raised = {**right, "case": "large", "error": None, "tolerance": None, "passed": False}
    [section] = sections({"kernels": outcome(cases=[right, raised, {**raised, "kernel": "feed"}])})
    assert section.rows == [("geglu", "1 of 2", "1.0e-04 of 1e-03"), ("feed", "0 of 1", "")]
    assert section.note == "Wrong: geglu large; feed large."


def model(**candidates: Any) -> Outcome:
    return outcome(
        dtype="float16",
        flops={"unet": 16 * 10**11, "vae": 8 * 10**11},
        bars_ms={"unet": 4.0},
        candidates=candidates,
    )


def candidate(**seconds: float) -> dict[str, Any]:
    return {
        "errors": {"unet": 1e-3, "vae": 2e-3},
        "held_gib": 3.0,
        "ready_s": 61.0,
        "trace": {},
        "measures": times(**seconds),
    }


def test_a_model_has_ratios_floors_and_aims() -> None:
    ours = candidate(unet=0.0035, picture_4=0.03)
    ours["trace"] = {"idle_percent": 1.5}
    seen = {"gap_us": 8.0, "gap_percent": 0.2, "synchronisations": 0}
    ours["loop"] = {
        "step": {**times(step=0.0039), "trace": seen},
        "loop": {**times(step=0.0038), "trace": {}},
    }
    ours["build_s"] = 240.0
    peers = {"rt": ours, "torch.compile": candidate(unet=0.007, picture_4=0.045)}
    _, section, _ = sections({"ceilings": CEILINGS, "sd15": model(**peers)})
    assert section.title == "SD 1.5, 512 × 512, float16"
    assert section.head[:3] == ("time (× torch.compile)", "U-Net step", "4-step picture")
    assert section.rows[0] == ("rt", "3.5 ms (2.00)", "30 ms (1.50)", "1.5 %", "3.0 GiB", "240 + 61 s")
    assert section.rows[2][:3] == ("floor: products alone", "2 ms", "")
    assert section.rows[3][:3] == ("aim", "4 ms", "")
    assert section.note.endswith(
        "A step of the loop of rt, a graph a step: 3.9 ms, between two the GPU waits 8.0 us, 0.20 %, "
        "and the host waits 0 times while it launches them. A step of the loop of rt, one graph: 3.8 ms."
    )


def test_the_aims_are_held_against_the_record() -> None:
    sd15 = candidate(unet=0.0035)
    sd15["loop"] = {"step": {**times(step=0.0039), "trace": {"gap_percent": 1.2}}}
    turbo = candidate(picture_4=0.036)
    figures = {"workloads": [KERNEL], "left_out": []}
    found = bars(
        {
            "sd15": model(**{"rt": sd15, "torch.compile": candidate(unet=0.006)}),
            "sdxl-turbo": model(rt=turbo),
            "timings": outcome(**figures),
        }
    )
    assert [(bar.what, bar.wanted, bar.measured, bar.verdict) for bar in found] == [
        ("SD 1.5, 512 × 512: U-Net step", "<= 4 ms", "3.50 ms", "yes"),
        ("SD 1.5, 512 × 512: U-Net step, torch.compile", ">= 1.5 ×", "1.71 ×", "yes"),
        ("SD 1.5, 512 × 512: gap between steps", "< 1 %", "1.20 %", "NO"),
        ("SDXL, 1024 × 1024: U-Net step", "<= 34 ms", "", "not measured"),
        ("SDXL, 1024 × 1024: VAE decoder", "<= 25 ms", "", "not measured"),
        ("SDXL, 1024 × 1024: U-Net step, torch.compile", ">= 1.25 ×", "", "not measured"),
        ("SDXL, 1024 × 1024: gap between steps", "< 1 %", "", "not measured"),
        ("SDXL-Turbo, 512 × 512: 4-step picture", "<= 35 ms", "36.00 ms", "NO"),
        ("kernels: workloads at least as fast as torch", "all", "1 of 1", "yes"),
    ]
    left = bars({"timings": outcome(workloads=[KERNEL], left_out=["geglu sd15"])})[-1]
    assert (left.measured, left.reached) == ("1 of 1, 1 not timed", None)
    assert bars({"ceilings": CEILINGS}) == []


def test_the_document_has_the_newest_figures_of_each_part_of_each_gpu() -> None:
    first = replace(a_run(ceilings=CEILINGS, fp8=outcome(Status.FAILED)), gpu=H100).to_json()
    second = replace(
        a_run(sd15=replace(model(rt=candidate(unet=0.5)), status=Status.STOPPED, reason="stopped")), gpu=H100
    ).to_json()
    shown = render([{"provenance": {}}, first, second])
    assert shown.startswith("Measured on an NVIDIA H100 80GB HBM3, 2020-01-01, with torch 2.13.0.")
    assert "| copy within the device | 2.50 TB/s |" in shown and "500 ms" in shown
    assert "Not complete: stopped." in shown and "fp8" not in shown
    other = replace(H100, versions={"torch": "2.14.0"})
    newer = replace(a_run(ceilings=outcome(copy_tb_s=3.0)), gpu=other).to_json()
    shown = render([first, second, newer])
    assert "2.50 TB/s" not in shown
    assert (
        "ceilings: 2020-01-01, with torch 2.14.0; sd15: 2020-01-01, with torch 2.13.0." in shown
        or "sd15: 2020-01-01, with torch 2.13.0; ceilings: 2020-01-01, with torch 2.14.0." in shown
    )
    less = replace(a_run(ceilings=outcome(Status.STOPPED, copy_tb_s=9.0)), gpu=H100).to_json()
    assert "9.00 TB/s" not in render([first, less])
    assert render([]) == "not measured yet"


def test_wide_tables_continue_below_with_their_names() -> None:
    section = Section("wide", ("name", *"abcdef"), [("n" * 40, *(letter * 20 for letter in "abcdef"))])
    lines = section.text().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("n" * 27 + "…") for line in lines) == 3


def test_the_terminal_hears_how_each_part_ended() -> None:
    run = replace(a_run(ceilings=CEILINGS, kernels=outcome(Status.FAILED)), gpu=H100)
    assert re.search(r"kernels +failed", text(run))


def graph(start: float, correlation: int, *durations: float) -> list[dict[str, Any]]:
    """A launch at `start` − 5 whose kernels follow each other from `start`."""
    runtime = {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": start - 5, "dur": 1}
    events = [{**runtime, "args": {"correlation": correlation}}]
    for duration in durations:
        kernel = {"ph": "X", "cat": "kernel", "name": "k", "ts": start, "dur": duration}
        events.append({**kernel, "args": {"correlation": correlation}})
        start += duration
    return events


def test_a_trace_says_how_long_the_gpu_waits_between_steps() -> None:
    wait = {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "dur": 1, "args": {}}
    events = [
        *graph(10, 1, 4, 4, 2),  # ends at 20
        *graph(21, 2, 4, 4, 1),  # 30
        *graph(31, 3, 4, 4, 1),  # 40
        *graph(45, 4, 5),
        {"ph": "M", "name": "a remark"},
    ]
    found = summary([*events, {**wait, "ts": 100}])
    assert (found["kernels"], found["steps"], found["span_us"]) == (10, 3, 40)
    assert found["idle_percent"] == pytest.approx(100 * 7 / 40)
    assert (found["gap_us"], found["step_us"], found["synchronisations"]) == (1, 10.5, 0)
    assert summary([*events, {**wait, "ts": 18}])["synchronisations"] == 1
    assert "synchronisations" not in summary([event for event in events if event.get("cat") == "kernel"])
    single = summary([*graph(0, 1, 2), *graph(2, 2, 2)])
    assert "gap_us" not in single and single["idle_percent"] == 0
    assert summary([]) == {}


def test_a_trace_says_which_kinds_of_kernels_take_the_time() -> None:
    names = {
        "attention_3": 5,
        "triton_poi_fused_add_7": 2,
        "triton_per_fused_native_layer_norm_1": 3,
        "sm90_xmma_fprop_implicit_gemm_f16": 9,
        "nvjet_hsh_128x256": 8,
        "vectorized_elementwise_kernel": 1,
    }
    kernel = {"ph": "X", "cat": "kernel", "ts": 0}
    events = [{**kernel, "name": name, "dur": duration} for name, duration in names.items()]
    found = kinds(
        [*events, events[1], {"ph": "X", "cat": "cuda_runtime", "name": "launch", "dur": 99}], longest=2
    )
    assert found["us"] == {
        "convolution": 9,
        "product": 8,
        "attention": 5,
        "Triton": 4,
        "norm": 3,
        "other": 1,
    }
    assert found["launches"]["Triton"] == 2
    assert list(found["longest"]) == ["sm90_xmma_fprop_implicit_gemm_f16", "nvjet_hsh_128x256"]
    assert kinds([], longest=2) == {}


PACKAGE = {"ready_s": 3.0, "held_gib": 2.0, "finite": True, "time": {"median_s": 0.006}}


def test_packages_have_their_kinds_of_kernels_and_what_went_wrong() -> None:
    rows = [
        {**PACKAGE, "package": "a", "us": {"convolution": 2000.0}, "launches": {"convolution": 52}},
        {**PACKAGE, "package": "b", "finite": False},
        {"package": "c", "problem": "RuntimeError: no"},
    ]
    [section] = sections({"packages-tried": outcome(tried=True, packages=rows)})
    assert section.head == ("package", "time", "launches", "convolution", "ready")
    assert section.rows[0] == ("a", "6 ms", "52", "2 ms in 52", "3.0 s")
    assert section.rows[2] == ("c", "failed", "", "", "")
    assert section.note.endswith("convolutions tried out. c: RuntimeError: no. b gives NaN or Inf.")


def test_what_a_build_will_not_find_stands_below_the_table() -> None:
    facts = {"torch": "2.11.0", "links with -lcuda": "no: cannot find -lcuda"}
    [section] = sections({"environment": outcome(facts=facts)})
    assert section.note == "links with -lcuda: no: cannot find -lcuda."


def test_a_step_alone_has_its_ratio_to_the_compiler() -> None:
    rows = {"rt": {"time": {"median_s": 0.004}, "ready_s": 3.0}}
    [first] = sections({"ratio": outcome(dtype="float16", candidates=rows)})
    assert first.rows == [("rt", "4 ms", "", "3 s")]
    rows["torch.compile, reduce-overhead"] = {"time": {"median_s": 0.006}, "ready_s": 60.0}
    [both] = sections({"ratio": outcome(dtype="float16", candidates=rows)})
    assert [row[2] for row in both.rows] == ["1.50", "1.00"]


def test_the_plot_shows_models_and_kernels(tmp_path: Path) -> None:
    plot = pytest.importorskip("rt.bench.gpu_parts.plot")
    replace(a_run(ceilings=CEILINGS), gpu=H100).save(tmp_path)
    plot.update(tmp_path, tmp_path)
    assert not list(tmp_path.glob("*.svg"))  # nothing that a picture shows

    figures = {"workloads": [KERNEL], "left_out": []}
    sd15 = model(rt=candidate(unet=0.5), diffusers=candidate(unet=0.7, picture_4=2.0))
    replace(a_run(timings=outcome(**figures), sd15=sd15), gpu=H100).save(tmp_path)
    plot.update(tmp_path, tmp_path)
    assert ElementTree.parse(tmp_path / "gpu-h100-80gb-hbm3.svg").getroot().tag.endswith("svg")
