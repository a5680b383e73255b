"""`build`: checkpoint → trace → passes → observe → cast or quantize → lower → verify → bundle."""

from __future__ import annotations

import gc
import logging
import platform
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

from rt.backends import AUTO, ON_HOST, Backend, Form, get
from rt.backends.engine_cache import CACHE
from rt.bundle import (
    MANIFEST,
    SCHEMA,
    Bundle,
    EngineRecord,
    FileRecord,
    LoraRecord,
    Manifest,
    SourceRecord,
    hash_file,
)
from rt.config import BuildConfig, DType, fingerprint
from rt.errors import BuildError, ConfigError, RtError
from rt.export.calibrate import Calibration, calibrate
from rt.export.checkpoint import Checkpoint
from rt.export.forms import Request, particular, writer
from rt.export.lower import WeightFile, lower
from rt.export.observe import Observation, observe
from rt.export.one_line import one_line
from rt.export.passes.cast import HALF, cast, in_range
from rt.export.passes.fuse import fuse
from rt.export.passes.layout import channels_last
from rt.export.passes.merge import merge
from rt.export.passes.quantize import FP8, INT8, Bits, quantize
from rt.export.passes.rescale import rescale
from rt.export.program import Program, narrowed
from rt.export.source import Kind
from rt.export.staging import staged
from rt.export.target import loop_compiler, target
from rt.export.trace import trace
from rt.model import Component, ModelSpec
from rt.progress import Bar, progress
from rt.samplers import Scheduler
from rt.shapes import ShapeProfile, TensorSpec
from rt.verify import check, save_reference

logger = logging.getLogger(__name__)

_VERSIONED = (
    "rt-diffusion",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "openvino",
    "onnxruntime",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "triton",
)
# Programs with pixels, where the fused operators are.
_PICTURES = (Component.UNET, Component.UNET_SHALLOW, Component.VAE_ENCODER, Component.VAE_DECODER)
_NATIVE = (DType.BF16, DType.INT8)
"""The formats of our CPU kernels."""
BITS: Mapping[DType, Bits] = {DType.INT8: INT8, DType.FP8: FP8}
"""The formats in which products are calibrated."""
_NOTHING_LEFT = "; nothing was left behind"
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "OFL*")


def build(
    checkpoint: Checkpoint,
    output: str | Path,
    config: BuildConfig,
    *,
    donor: Bundle | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Bundle:
    """Compile `checkpoint` for every profile of `config` and write the bundle `output`.

    With a `donor`, a bundle of the same model with refittable plans, its plans get the new weights and none is built.

    For the backend "auto" the first one is taken that this machine can build for. Where that fails all the same, the
    build begins again for the next one, so that a bundle is always that of a build for one backend.

    Raises:
        BuildError: When the output exists or cannot be written; AccuracyError when an engine is wrong.
        CheckpointError, ShapeError, BackendUnavailableError: Before any work, where that can be known.
    """
    for profile in config.profiles:
        profile.check_multiple(checkpoint.spec.vae_scale_factor)
    request = Request(stage=Path(output), config=config, donor=donor)
    _check_sampler(checkpoint)
    failed: dict[str, str] = {}
    while True:
        backend = target(request, failed)
        chosen = replace(config, backend=backend.name)
        try:
            return _build_for(backend, checkpoint, Path(output), chosen, donor, force=force, quiet=quiet)
        except _EngineFailure as failure:
            # Whoever asked for what one backend alone can do has no use for another.
            if config.backend != AUTO or particular(request) or writer(backend) is None:
                raise failure.error from failure.error.__cause__
            failed[backend.name] = failure.reason


class _EngineFailure(Exception):
    """What is up to a backend did not succeed.

    Args:
        reason: In a few words.
        error: That the build ends with if there is no other backend.
    """

    def __init__(self, reason: str, error: Exception) -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


def _build_for(
    backend: Backend,
    checkpoint: Checkpoint,
    output: Path,
    config: BuildConfig,
    donor: Bundle | None,
    *,
    force: bool,
    quiet: bool,
) -> Bundle:
    """See `build`; raises _EngineFailure where it is the backend that fails."""
    spec = checkpoint.spec
    compile_loop = loop_compiler(backend)
    if problem := backend.available().problem:
        logger.warning(
            "%s %s: what is built for it is not run; check it where it will be: rt verify",
            backend.name,
            problem,
        )
    with (
        staged(output, force=force) as stage,
        progress("build", total=_steps(checkpoint, config, backend), quiet=quiet) as bar,
        torch.inference_mode(),
        _frozen(),
    ):
        for folder in ("engines", "reference", "tokenizer"):
            (stage / folder).mkdir()
        request = Request(stage=stage, config=config, donor=donor)
        engines = [
            engine
            for component in checkpoint.components
            for engine in _compile(component, checkpoint, request, backend, bar)
        ]
        for encoder in spec.text_encoders:
            checkpoint.tokenizer(encoder).save(stage / "tokenizer" / f"{encoder.value}.json")
        _copy_licence(checkpoint, stage)
        with _engine_step(bar, "compile the loop"):
            kernels = compile_loop(stage)
        with _step(bar, "hash the source"):
            source = _source(checkpoint)
        manifest = Manifest(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            fingerprint=fingerprint(
                source.files,
                [asdict(lora) for lora in source.loras],
                checkpoint.configs,
                config.to_json(),
                SCHEMA,
                _versions(),
            ),
            source=source,
            model=spec,
            config=config,
            engines=tuple(engines),
            kernels=kernels,
            versions=_versions(),
            files={name: _record(stage / name) for name in _files(stage)},
        )
        (stage / MANIFEST).write_bytes(manifest.to_bytes())
    return Bundle.open(output)


def default_profiles(
    checkpoint: Checkpoint,
    height: Iterable[int] = (),
    width: Iterable[int] = (),
    batch_size: Iterable[int] = (),
) -> tuple[ShapeProfile, ...]:
    """Every batch size at every size; sizes left out are what the model was trained at, one at a time.

    Heights and widths are paired in order; a single one of either serves all of the other.

    Raises:
        ConfigError: When several heights and several widths do not pair up.
    """
    trained = checkpoint.spec.sample_size
    h, w = trained if isinstance(trained, list) else (trained, trained)
    factor = checkpoint.spec.vae_scale_factor
    heights, widths = list(height) or [h * factor], list(width) or [w * factor]
    if len(heights) != len(widths) and 1 not in (len(heights), len(widths)):
        raise ConfigError(
            f"{len(heights)} heights and {len(widths)} widths do not pair up; give as many of each"
        )
    count = max(len(heights), len(widths))
    sizes = zip(heights * (count // len(heights)), widths * (count // len(widths)), strict=True)
    return tuple(ShapeProfile(h, w, b) for h, w in sizes for b in list(batch_size) or [1])


@contextmanager
def _frozen() -> Iterator[None]:
    """Collections inside pass over what is there already: a million objects of torch's modules, 0.3 s each time."""
    if gc.get_freeze_count():  # whoever did that wants it to stay
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _compile(
    component: Component, checkpoint: Checkpoint, request: Request, backend: Backend, bar: Bar
) -> list[EngineRecord]:
    """All programs of a component, first lowered, then verified: torch's weights are gone when engines load."""
    with _step(bar, f"{component.value}: load"):
        module = checkpoint.load(component)
    lowered = list(_lower_all(module, component, checkpoint, request, backend, bar))
    del module
    gc.collect()
    engines = []
    for record in lowered:
        if (further := writer(backend)) is not None and further.write is not None:
            with _engine_step(bar, f"{record.name}: compile"):
                written = further.write(record, request)
                record = replace(
                    record, forms={**record.forms, **{form.value: path for form, path in written.items()}}
                )
        with _engine_step(bar, f"{record.name}: verify"):
            engines.append(_verified(record, request.stage, backend))
    return engines


def _verified(record: EngineRecord, stage: Path, backend: Backend) -> EngineRecord:
    """With its distance from torch, measured by the backend; if it has no GPU here, by another one on the graph."""
    missing = backend.available().problem
    runner = next(filter(None, map(partial(_runs_here, record.dtype), ON_HOST)), None) if missing else backend
    if runner is None:
        return replace(record, error={}, verified_with=f"not verified: {backend.name} {missing}")
    how = f"{runner.name} {runner.arithmetic(record.dtype)}" + (
        f", {backend.name} not run" if missing else ""
    )
    return replace(record, error=check(record, stage, runner), verified_with=how)


def _runs_here(dtype: DType, name: str) -> Backend | None:
    backend = get(name)
    return None if backend.available().problem or backend.refuses(dtype) else backend


def _lower_all(
    module: nn.Module,
    component: Component,
    checkpoint: Checkpoint,
    request: Request,
    backend: Backend,
    bar: Bar,
) -> Iterator[EngineRecord]:
    """Graphs, weights and references on disk; what is not measured yet is empty in the records."""
    stage, config = request.stage, request.config
    weights = f"engines/{component.value}.weights"
    with WeightFile(stage / weights) as store:
        text = _text(stage, checkpoint.spec) if component is Component.UNET else {}
        early: dict[Component, Program] = {}
        narrow = frozenset[str]()  # what the part of the text hands to the steps in fp16
        calibration: Calibration | None = None
        for program in trace(
            component, module, checkpoint.spec, config.profiles, text, step_cache=config.step_cache
        ):
            file, reference = f"engines/{program.name}.{Form.ONNX.value}", f"reference/{program.name}.npz"
            with _step(bar, f"{program.name}: run in torch"):
                half = None if program.component is Component.UNET_TIME else HALF.get(config.dtype)
                seen = observe(program, half)
                save_reference(
                    stage / reference, {k: v.numpy() for k, v in program.inputs.items()}, seen.outputs
                )
                if half is torch.float16:  # bf16 reaches as far as fp32
                    scaled = program.rewritten("rescale", partial(rescale, seen=seen, largest=in_range(half)))
                    if scaled.module is not program.module:
                        program, seen = scaled, observe(scaled, half)
            # What runs once a schedule costs nothing in fp32, and every step builds on it.
            dtype = DType.FP32 if program.component is Component.UNET_TIME else config.dtype
            early[program.component] = program
            if dtype in BITS and program.component is Component.UNET and calibration is None:
                with _step(bar, f"{program.name}: calibrate"):
                    calibration = calibrate(early, checkpoint, BITS[dtype])
            if program.component is Component.UNET_CONTEXT and half is torch.float16:
                narrow = _within(seen, in_range(half))
            with _step(bar, f"{program.name}: lower"):
                computing, islands = _in_format(program, dtype, seen, calibration, narrow)
                lower(narrowed(program, narrow), computing, store, stage / file)
            forms = {Form.ONNX.value: file}
            if program.component in _PICTURES and _fuses(backend, dtype):
                with _step(bar, f"{program.name}: fuse"):
                    program = program.rewritten("layout", channels_last).rewritten("fuse", fuse)
                    if islands and half is torch.float16:  # its nodes have other names, and none may overflow
                        seen = observe(program, half)
                    computing = _fused(program.module, dtype, seen, calibration)
                    if _lowers_fused(backend, dtype):
                        forms[Form.FUSED.value] = f"engines/{program.name}.{Form.FUSED.value}"
                        path = stage / forms[Form.FUSED.value]
                        lower(narrowed(program, narrow), computing, store, path)
            if (further := writer(backend)) is not None and further.compile is not None:
                with _engine_step(bar, f"{program.name}: compile"):
                    if program.component in _PICTURES and _fuses(backend, dtype):
                        program, computing = _merged(program, dtype, seen, calibration)
                    compiled = further.compile(narrowed(program, narrow), computing, store, request)
                    forms |= {form.value: path for form, path in compiled.items()}
            yield EngineRecord(
                name=program.name,
                component=program.component,
                profile=program.profile,
                guided=program.guided,
                dtype=dtype,
                forms=forms,
                weights=weights,
                reference=reference,
                inputs=_input_specs(narrowed(program, narrow)),
                outputs=tuple(
                    TensorSpec(name=name, shape=value.shape, dtype="float16" if name in narrow else "float32")
                    for name, value in seen.outputs.items()
                ),
                error={},
                verified_with="",
                islands=islands,
                passes=program.passes,
            )


def _within(seen: Observation, largest: float) -> frozenset[str]:
    """The outputs whose values are in range."""
    return frozenset(name for name, value in seen.outputs.items() if np.abs(value).max() <= largest)


def _in_format(
    program: Program,
    dtype: DType,
    seen: Observation,
    calibration: Calibration | None,
    narrow: Collection[str],
) -> tuple[nn.Module, tuple[str, ...]]:
    """The program's graph computing in `dtype`, and what of it does not, in words."""
    module, kept = program.module, tuple[str, ...]()
    if calibration is not None:
        module = quantize(module, calibration.ranges, calibration.chosen, calibration.bits)
        kept = calibration.islands(program.module)
    if dtype in (DType.FP32, DType.INT8):
        return module, kept
    half, islands = cast(module, dtype, seen, [i for i, name in enumerate(program.outputs) if name in narrow])
    return half, (*kept, *islands)


def _lowers_fused(backend: Backend, dtype: DType) -> bool:
    """Whether something runs a fused graph in this format: our CPU kernels, or what the backend makes of it."""
    further = writer(backend)
    return dtype in _NATIVE or (dtype in HALF and further is not None and further.reads_fused)


def _fuses(backend: Backend, dtype: DType) -> bool:
    """Whether anything takes a program fused: see `_lowers_fused`, or the backend compiles it."""
    further = writer(backend)
    return _lowers_fused(backend, dtype) or (dtype in HALF and further is not None and further.fuses)


def _fused(
    module: fx.GraphModule, dtype: DType, seen: Observation, calibration: Calibration | None
) -> nn.Module:
    """A fused graph in half precision, that of an int8 build in bf16 with its products in int8."""
    if calibration is not None:
        module = quantize(module, calibration.ranges, calibration.chosen, calibration.bits)
    return cast(module, DType.BF16 if dtype is DType.INT8 else dtype, seen)[0]


def _merged(
    program: Program,
    dtype: DType,
    seen: Observation,
    calibration: Calibration | None,
) -> tuple[Program, nn.Module]:
    """A fused program with fewer kernels, and what computes it.

    What was measured is known by the names of nodes. So a merged graph is measured again where something has to stay in
    fp32, and one that has layers in eight bits, too, stays as it is.
    """
    module: fx.GraphModule = program.module
    if calibration is not None:
        module = quantize(module, calibration.ranges, calibration.chosen, calibration.bits)
    half, islands = cast(module, dtype, seen)
    if calibration is not None:
        return program, half if islands else cast(merge(module), dtype, seen)[0]
    program = program.rewritten("merge", merge)
    if islands:
        seen = observe(program, HALF[dtype])
    return program, cast(program.module, dtype, seen)[0]


@contextmanager
def _step(bar: Bar, label: str) -> Iterator[None]:
    """Show what is being done, log how long it took, and name it where a library fails at it."""
    bar.describe(label)
    started = time.perf_counter()
    try:
        yield
    except (RtError, OSError, MemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # torch has no error of its own for this
            raise MemoryError from error
        raise BuildError(f"{label}: {one_line(error)}{_NOTHING_LEFT}") from error
    bar.advance()
    logger.info("%s took %.1f s", label, time.perf_counter() - started)


@contextmanager
def _engine_step(bar: Bar, label: str) -> Iterator[None]:
    """A step that is up to the backend. A disk that is full is not: its error stays as it is."""
    try:
        with _step(bar, label):
            yield
    except (RtError, MemoryError) as error:
        reason = str(error).removesuffix(_NOTHING_LEFT) or "out of memory"
        raise _EngineFailure(reason if reason.startswith(label) else f"{label}: {reason}", error) from error


def _steps(checkpoint: Checkpoint, config: BuildConfig, backend: Backend) -> int:
    """Of the progress bar: a load a component, three or four steps a program, calibration, the loop and hashes."""
    sizes = {(profile.height, profile.width) for profile in config.profiles}
    halves = sum(
        component in (Component.VAE_ENCODER, Component.VAE_DECODER) for component in checkpoint.components
    )
    steps = 2 * len(config.profiles) * (2 if config.step_cache else 1)
    programs = len(checkpoint.spec.text_encoders) + 2 + steps + halves * len(sizes)
    fused = (steps + halves * len(sizes)) if _fuses(backend, config.dtype) else 0
    a_program = 3 if writer(backend) is None else 4
    calibrations = config.dtype in BITS
    return len(checkpoint.components) + a_program * programs + fused + calibrations + 2


def _text(stage: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """What the text encoders gave, so that the U-Net is measured on states as large as real ones."""
    given = [np.load(stage / "reference" / f"{encoder.value}.npz") for encoder in spec.text_encoders]
    text = {"context": np.concatenate([arrays["output.states"][:1] for arrays in given], axis=-1)}
    if spec.pooled_size is not None:
        text["pooled"] = given[-1]["output.pooled"]
    return {name: torch.from_numpy(value) for name, value in text.items()}


def _check_sampler(checkpoint: Checkpoint) -> None:
    """Say now, not at the first picture, that the checkpoint's own sampler cannot run."""
    try:
        Scheduler.from_config(checkpoint.spec.scheduler)
    except ConfigError as error:
        logger.warning("%s; rt run will need --scheduler, such as dpmpp-2m", str(error).rstrip("."))


def _input_specs(program: Program) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        for name, value in program.inputs.items()
    )


def _source(checkpoint: Checkpoint) -> SourceRecord:
    local = checkpoint.kind in (Kind.FOLDER, Kind.SINGLE_FILE)
    return SourceRecord(
        # Only the last part of a path: a bundle is given away, and says nothing of who built it where.
        name=Path(checkpoint.name).resolve().name if local else checkpoint.name,
        kind=checkpoint.kind.value,
        revision=checkpoint.revision,
        licence=checkpoint.licence,
        files={name: hash_file(path) for name, path in sorted(checkpoint.files.items())},
        loras=tuple(
            LoraRecord(name=lora.name, scale=lora.scale, sha256=hash_file(lora.path))
            for lora in checkpoint.loras
        ),
    )


def _copy_licence(checkpoint: Checkpoint, stage: Path) -> None:
    """Licence texts travel with the weights, as most licences ask."""
    if "model_index.json" not in checkpoint.files:
        return  # a single file or a synthetic model has no folder of its own
    folder = checkpoint.files["model_index.json"].parent
    for path in (path for pattern in _LICENCE_FILES for path in folder.glob(pattern) if path.is_file()):
        shutil.copyfile(path, stage / path.name)


def _files(stage: Path) -> list[str]:
    """Of the bundle; what a backend compiled when the build ran its engines may be deleted."""
    paths = [path.relative_to(stage) for path in sorted(stage.rglob("*")) if path.is_file()]
    return [str(path) for path in paths if path.parts[0] != CACHE and not path.name.startswith(".")]


def _record(path: Path) -> FileRecord:
    return FileRecord(sha256=hash_file(path), size_bytes=path.stat().st_size)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
