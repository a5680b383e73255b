"""Our step against OpenVINO called by hand: `python -m rt.bench.against_openvino BUNDLE`.

The same program on the same inputs, in turn in one process. By hand: the graph of standard operators, compiled and
called as OpenVINO's documentation shows (https://docs.openvino.ai/2026/openvino-workflow/running-inference.html:
`compile_model`, then `infer` with a dictionary). Ours: `Engine.enqueue` on the graph that the backend prefers, and a
step of the session with guidance and sampler on top. By hand it may be the graph of another build of the model, to see
what a format is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import click

from rt.backends import Engine, Form, get
from rt.bench.bundle import PROMPT, describe, find_profile
from rt.bench.record import RESULTS, publish
from rt.bench.timing import Calibration, Samples, elapsed, gemm_gflops, interleave
from rt.bundle import Bundle
from rt.model import Component
from rt.pipeline import Pipeline
from rt.shapes import ShapeProfile

BY_HAND, ENQUEUE, STEP = "by hand", "Engine.enqueue", "session step"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--steps", type=int, default=20, show_default=True, help="Calls in a row.")
@click.option("--rounds", type=int, default=15, show_default=True, help="Turns of each of the three.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="Bundle to call by hand in place of BUNDLE."
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the record.")
def command(bundle: Path, steps: int, rounds: int, baseline: Path | None, out: Path) -> None:
    """Time a guided U-Net step of BUNDLE three ways."""
    pipe = Pipeline.from_bundle(bundle, backend="openvino")
    profile = find_profile(pipe.bundle)
    subject = describe(pipe, profile)
    engine = pipe.engines.get(Component.UNET, profile, guided=True)

    def session() -> float:
        count = profile.batch_size
        run = pipe(PROMPT, num_inference_steps=steps, num_images_per_prompt=count, output_type="latent")
        return run.timings.denoise_s / run.timings.steps

    def repeated(call: Callable[[], object]) -> Callable[[], float]:
        return lambda: elapsed(lambda: [call() for _ in range(steps)]) / steps

    session()  # leaves real inputs in the engine's buffers
    theirs = pipe.bundle if baseline is None else Bundle.open(baseline)
    dtype = theirs.manifest.config.dtype
    by_hand = _by_hand(_graph(theirs, profile), engine, get("openvino").arithmetic(dtype), subject.threads)
    calls = {BY_HAND: repeated(by_hand), ENQUEUE: repeated(engine.enqueue), STEP: session}
    interleave(calls, 1)
    before = gemm_gflops()
    samples = interleave(calls, rounds)
    calibration = Calibration(before_gflops=before, after_gflops=gemm_gflops())
    click.echo(f"{subject}, by hand {dtype.value}\nmedian of {rounds} x {steps} steps; {calibration}")
    ratios = {name: _ratio(each, samples[BY_HAND]) for name, each in samples.items()}
    for name, each in samples.items():
        click.echo(f"{name:<16}{each.median * 1e3:>10.4g} ms a step{ratios[name]:>8.3f} of by hand")
    publish(
        f"against-openvino {subject.model} {subject.dtype}",
        {
            "subject": asdict(subject),
            "by_hand_dtype": dtype.value,
            "steps": steps,
            "calibration": asdict(calibration),
            "step": {name: {**each.to_json(), "ratio": ratios[name]} for name, each in samples.items()},
        },
        out,
    )


def _graph(bundle: Bundle, profile: ShapeProfile) -> Path:
    records = (r for r in bundle.manifest.engines if r.component is Component.UNET and r.guided)
    return bundle.path / next(record.forms[Form.ONNX] for record in records if record.profile == profile)


def _by_hand(graph: Path, engine: Engine, arithmetic: str, threads: int) -> Callable[[], object]:
    """One inference as a user of OpenVINO writes it, on the inputs that `engine` has now."""
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": arithmetic,
        "INFERENCE_NUM_THREADS": threads,
    }
    request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    inputs = {name: array.copy() for name, array in engine.inputs.items()}
    return lambda: request.infer(inputs)


def _ratio(ours: Samples, theirs: Samples) -> float:
    """Median of the ratios of each round."""
    return float(median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True)))


if __name__ == "__main__":
    command()
