"""A small network built and run by every backend that is here, each of its forms compared with torch.

It has what the programs of a bundle have, and meets every operator `rt::…`, so on a machine with classic TensorRT it
compiles our kernels, puts them into a plan as plugins, and runs that.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rt.backends import BACKENDS, Backend, Form
from rt.bundle import EngineRecord
from rt.config import BuildConfig, DType
from rt.errors import RtError
from rt.export.forms import Request, Writer, writer
from rt.export.lower import WeightFile, lower
from rt.export.observe import observe
from rt.export.one_line import one_line
from rt.export.passes.cast import HALF, cast
from rt.export.passes.fuse import fuse
from rt.export.passes.layout import channels_last
from rt.export.program import Program, trace_program
from rt.model import Component
from rt.shapes import ShapeProfile, TensorSpec
from rt.verify import check, save_reference

FORMATS = (DType.FP32, DType.FP16, DType.BF16)
SIDE, CHANNELS, HEADS = 16, 64, 2
_WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one form in one backend.

    Attributes:
        backend: Its name.
        dtype: The format, or "" where the backend is not there at all.
        form: What was run, or "" likewise.
        result: "ok", "FAILED", "built" where nothing here can run it, "no" where the backend does not do that.
        detail: The distance from torch, or the reason.
    """

    backend: str
    dtype: str
    form: str
    result: str
    detail: str

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return self.result == "FAILED"

    def lines(self) -> list[str]:
        """Of a table of 80 columns."""
        head = f"{self.result:<7} {self.backend:<20} {self.dtype:<5} {self.form:<18} "
        return textwrap.wrap(self.detail, _WIDTH, initial_indent=head, subsequent_indent=" " * 8)


class Probe(nn.Module):
    """A residual block, self-attention and a gated feed-forward layer: (1, 4, 16, 16) → (1, 4, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.norm, self.inner = nn.GroupNorm(8, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.plain = nn.LayerNorm(CHANNELS)
        self.query, self.key, self.value, self.out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.widen, self.narrow = nn.Linear(CHANNELS, 8 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        """See the class."""
        x = self.enter(latents)
        x = x + self.inner(F.silu(self.norm(x)))
        batch, channels, height, width = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        seen = self.plain(tokens)
        q, k, v = (
            layer(seen).view(batch, -1, HEADS, channels // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, channels)
        tokens = tokens + self.out(attended)
        hidden, gate = self.widen(tokens).chunk(2, -1)
        tokens = tokens + self.narrow(hidden * F.gelu(gate))
        return (self.leave(tokens.reshape(batch, height, width, channels).permute(0, 3, 1, 2)),)


def selftest(backends: Sequence[Backend] = (), formats: Sequence[DType] = ()) -> Iterator[Outcome]:
    """One outcome for each of the backends, formats and forms, as they come; of all where some are left out."""
    backends, formats = backends or [*BACKENDS.values()], formats or FORMATS
    for backend in backends:
        if backend.available().version is None:
            yield _outcome(backend, "no", backend.available().problem)
    torch.manual_seed(0)
    probe = Probe().eval()
    for dtype in formats:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            stage = Path(folder)
            with lowered(probe, dtype, stage) as sample:
                for backend in backends:
                    if backend.available().version is not None:
                        yield from _try(backend, sample, stage)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The network lowered, as a build has it when it writes further forms.

    Attributes:
        record: What is on disk.
        program: In torch; in half precision with its operators fused.
        module: What computes it in its final precision.
        weights: The open file that the forms share.
    """

    record: EngineRecord
    program: Program
    module: nn.Module
    weights: WeightFile


@contextmanager
def lowered(probe: nn.Module, dtype: DType, stage: Path) -> Iterator[Sample]:
    """The network on disk as a program of a bundle is, in half precision with its fused form, too."""
    for folder in ("engines", "reference"):
        (stage / folder).mkdir()
    generator = torch.Generator().manual_seed(0)
    inputs = {"latents": torch.randn(1, 4, SIDE, SIDE, generator=generator)}
    program = trace_program("probe", Component.UNET, None, probe, inputs, ("prediction",))
    seen = observe(program, HALF.get(dtype))
    save_reference(stage / "reference/probe.npz", {"latents": inputs["latents"].numpy()}, seen.outputs)
    forms = {Form.ONNX.value: "engines/probe.onnx"}
    with WeightFile(stage / "engines/probe.weights") as weights:
        module = program.module if dtype is DType.FP32 else cast(program.module, dtype, seen)[0]
        lower(program, module, weights, stage / forms[Form.ONNX])
        if dtype is not DType.FP32:
            forms[Form.FUSED.value] = "engines/probe.fused.onnx"
            program = program.rewritten("layout", channels_last).rewritten("fuse", fuse)
            module = cast(program.module, dtype, seen)[0]
            lower(program, module, weights, stage / forms[Form.FUSED])
        record = EngineRecord(
            name="probe",
            component=Component.UNET,
            profile=None,
            guided=False,
            dtype=dtype,
            forms=forms,
            weights="engines/probe.weights",
            reference="reference/probe.npz",
            inputs=(TensorSpec(name="latents", shape=(1, 4, SIDE, SIDE)),),
            outputs=(TensorSpec(name="prediction", shape=(1, 4, SIDE, SIDE)),),
            error={},
            verified_with="",
            islands=(),
            passes=program.passes,
        )
        yield Sample(record=record, program=program, module=module, weights=weights)


def _try(backend: Backend, sample: Sample, stage: Path) -> Iterator[Outcome]:
    """What the backend builds of the network, and each form that it runs."""
    record = sample.record
    if reason := backend.refuses(record.dtype):
        yield _outcome(backend, "no", reason, record.dtype)
        return
    config = BuildConfig(profiles=(ShapeProfile(SIDE, SIDE),), dtype=record.dtype, backend=backend.name)
    request = Request(stage=stage, config=config)
    further = writer(backend)
    if further is not None:
        try:
            further.check(request)
        except RtError as error:  # not a fault: it needs what this machine has not
            yield _outcome(backend, "no", _reason(error), record.dtype)
            return
    try:
        forms = {**record.forms, **_further(further, sample, request)}
    except Exception as error:  # compilers have errors of their own; the others are still tried
        yield _outcome(backend, "FAILED", f"does not build: {_reason(error)}", record.dtype)
        return
    for form in backend.forms(record.dtype):
        if form not in forms:
            continue
        if problem := backend.available().problem:
            yield _outcome(backend, "built", f"not run: {problem}", record.dtype, form)
            continue
        try:
            errors = check(replace(record, forms={form.value: forms[form]}), stage, backend)
            yield _outcome(backend, "ok", f"{max(errors.values()):.1e} from torch", record.dtype, form)
        except (RtError, MemoryError) as error:
            yield _outcome(backend, "FAILED", _reason(error), record.dtype, form)


def _further(further: Writer | None, sample: Sample, request: Request) -> dict[str, str]:
    """The forms that the backend makes for itself."""
    if further is None:
        return {}
    forms: dict[Form, str] = {}
    if further.compile is not None:
        forms |= further.compile(sample.program, sample.module, sample.weights, request)
    sample.weights.flush()
    if further.write is not None:
        forms |= further.write(sample.record, request)
    return {form.value: path for form, path in forms.items()}


def _reason(error: Exception) -> str:
    return "out of memory" if isinstance(error, MemoryError) else one_line(error)


def _outcome(
    backend: Backend, result: str, detail: str, dtype: DType | None = None, form: Form | None = None
) -> Outcome:
    return Outcome(
        backend=backend.name,
        dtype=dtype.value if dtype else "",
        form=form.value if form else "",
        result=result,
        detail=detail,
    )
