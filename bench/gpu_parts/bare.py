"""A bundle with what a benchmark runs and no more, its programs compiled beside each other.

Of a build by `rt.export.build` it has the step with guidance or the one without, and the one form that the backend
runs. Nothing is run on the CPU, so `rt verify` has nothing to hold it to: weights are random, and what is measured is
compared with diffusers anyway.

Products of the step and of the decoder are timed in every way that inductor knows. What else is compiled meanwhile
launches little that could disturb these times.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from rt.backends import DeviceBackend, Form, get
from rt.bench.gpu_parts.programs import (
    EARLY,
    calibrated,
    convolutions_left_to_cudnn,
    in_format,
    network,
    traced,
)
from rt.bundle import MANIFEST, EngineRecord, FileRecord, Manifest, SourceRecord, hash_file
from rt.config import BuildConfig, DType, fingerprint
from rt.export.checkpoint import Checkpoint
from rt.export.forms import Request, writer
from rt.export.lower import WeightFile, lower
from rt.export.passes.cast import HALF
from rt.export.passes.shapes import value
from rt.export.program import Program
from rt.export.staging import staged
from rt.export.unet import of_text
from rt.kernel_image import KernelImage
from rt.model import Component
from rt.process import in_threads
from rt.processors import cpu_count
from rt.shapes import TensorSpec
from rt.verify import save_reference

_TUNED = (Component.UNET, Component.VAE_DECODER)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process compiles.

    Attributes:
        checkpoint: Of the model.
        config: Of the build; it has one profile.
        guided: Whether the step is the one with guidance.
        stage: The folder that becomes the bundle.
        programs: By component, all of one network; none for the kernels of the loop.
    """

    checkpoint: Checkpoint
    config: BuildConfig
    guided: bool
    stage: Path
    programs: tuple[Component, ...]


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a job wrote."""

    engines: tuple[EngineRecord, ...] = ()
    kernels: tuple[KernelImage, ...] = ()


def build(checkpoint: Checkpoint, output: Path, config: BuildConfig, *, guided: bool, beside: bool) -> None:
    """Write the bundle `output`, over one that is there.

    Args:
        checkpoint: Random weights.
        output: Its folder.
        config: Its options; one profile.
        guided: Whether the step is the one with guidance.
        beside: Whether each job has a process of its own, which first takes its time to import torch.

    Raises:
        ConfigError, BackendUnavailableError: This machine has not what the backend compiles with.
    """
    with staged(output, force=True) as stage:
        for folder in ("engines", "reference", "tokenizer"):
            (stage / folder).mkdir()
        if (further := writer(get(config.backend))) is not None:
            further.check(Request(stage=stage, config=config))
        wanted = jobs(checkpoint, config, stage, guided=guided)
        if beside:
            with ProcessPoolExecutor(len(wanted), mp_context=get_context("spawn")) as pool:
                done = [*pool.map(do, wanted)]
        else:
            done = [*map(do, wanted)]
        for encoder in checkpoint.spec.text_encoders:
            checkpoint.tokenizer(encoder).save(stage / "tokenizer" / f"{encoder.value}.json")
        (stage / MANIFEST).write_bytes(_manifest(checkpoint, config, stage, done).to_bytes())


def jobs(checkpoint: Checkpoint, config: BuildConfig, stage: Path, *, guided: bool) -> list[Job]:
    """All of a bundle, the longest first."""
    together: list[tuple[Component, ...]] = [(Component.UNET,), (Component.VAE_DECODER,), EARLY]
    together += [(encoder,) for encoder in checkpoint.spec.text_encoders]
    if isinstance(get(config.backend), DeviceBackend):
        together.append(())
    return [
        Job(checkpoint=checkpoint, config=config, guided=guided, stage=stage, programs=programs)
        for programs in together
    ]


def do(job: Job) -> Done:
    """Compile its programs, each with weights in a file of its own: two processes cannot write the same."""
    if not job.programs:
        from rt.export.loop_kernels import compile_loop

        return Done(kernels=compile_loop(job.stage))
    with torch.inference_mode():
        module = job.checkpoint.load(network(job.programs[0]))
        return Done(engines=tuple(_engine(job, module, component) for component in job.programs))


def _engine(job: Job, module: nn.Module, component: Component) -> EngineRecord:
    [profile] = job.config.profiles
    program = traced(component, module, job.checkpoint.spec, profile, guided=job.guided)
    weights, reference = f"engines/{program.name}.weights", f"reference/{program.name}.npz"
    inputs = {name: each.numpy() for name, each in program.inputs.items()}
    save_reference(job.stage / reference, inputs, {})
    calibration = calibrated(program, module, job.checkpoint, job.config.dtype)
    program, dtype, computing = in_format(program, job.config.dtype, get(job.config.backend), calibration)
    with WeightFile(job.stage / weights) as store:
        forms = _forms(job, program, computing, store)
    return EngineRecord(
        name=program.name,
        component=component,
        profile=program.profile,
        guided=program.guided,
        dtype=dtype,
        forms=forms,
        weights=weights,
        reference=reference,
        inputs=tuple(_spec(name, each) for name, each in program.inputs.items()),
        outputs=_outputs(program, dtype),
        error={},
        verified_with="not verified: a bundle of a benchmark",
        islands=(),
        passes=program.passes,
    )


def _forms(job: Job, program: Program, computing: nn.Module, store: WeightFile) -> dict[str, str]:
    """The one that the backend runs."""
    further = writer(get(job.config.backend))
    if further is None or further.compile is None:
        path = f"engines/{program.name}.{Form.ONNX.value}"
        lower(program, computing, store, job.stage / path)
        return {Form.ONNX.value: path}
    tuned = job.config.max_autotune and program.component in _TUNED
    request = Request(stage=job.stage, config=replace(job.config, max_autotune=tuned))
    with convolutions_left_to_cudnn():
        found = further.compile(program, computing, store, request)
    return {form.value: path for form, path in found.items()}


def _spec(name: str, value: Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))


def _outputs(program: Program, dtype: DType) -> tuple[TensorSpec, ...]:
    """From the shapes of the graph, as `in_format` gives them."""
    [results] = next(node for node in program.module.graph.nodes if node.op == "output").args
    narrow = of_text(program) if HALF.get(dtype) is torch.float16 else frozenset()
    return tuple(
        _spec(name, value(node).half() if name in narrow else value(node))
        for name, node in zip(program.outputs, results, strict=True)
    )


def _manifest(checkpoint: Checkpoint, config: BuildConfig, stage: Path, done: list[Done]) -> Manifest:
    files = sorted(path for path in stage.rglob("*") if path.is_file())
    hashes = in_threads(hash_file, files, cpu_count())
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Manifest(
        created=created,
        fingerprint=fingerprint(created, config.to_json()),
        source=SourceRecord(
            name=checkpoint.name, kind=checkpoint.kind.value, revision=None, licence=None, files={}
        ),
        model=checkpoint.spec,
        config=config,
        engines=tuple(engine for each in done for engine in each.engines),
        kernels=tuple(kernel for each in done for kernel in each.kernels),
        versions={"torch": torch.__version__},
        files={
            str(path.relative_to(stage)): FileRecord(sha256=sha256, size_bytes=path.stat().st_size)
            for path, sha256 in zip(files, hashes, strict=True)
        },
    )
