"""The bundle on disk: a plain directory with a manifest that knows every byte of it.

    manifest.json                what it is, how it was built, sha256 and size of every other file
    tokenizer/<component>.json   one a text encoder
    engines/<name>.<form>        one or more a program and shape: a graph, a compiled library, a plan
    engines/<component>.weights  the tensors that these share
    kernels/<name>.cubin, .ptx   what the sampling loop launches itself on a GPU
    reference/<name>.npz         inputs and torch's outputs, for `rt verify`

`docs/bundle-format.md` describes each field. A bundle is code: run only those you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rt import contract
from rt.backends import Backend, Form, cpu_count
from rt.config import BuildConfig, DType
from rt.decode import decode
from rt.errors import BundleError, IncompatibleBundleError, IntegrityError, shown
from rt.json_file import parse_json, read_bounded
from rt.kernel_image import KernelImage
from rt.model import Component, ModelSpec
from rt.process import in_threads
from rt.shapes import ShapeProfile, TensorSpec

FORMAT = "rt-bundle"
SCHEMA = 4
MANIFEST = "manifest.json"
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')
_ENVELOPE = ("format", "schema", "digest")
_NO_DIGEST = b'"digest": "' + b"0" * 64 + b'"'


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file of the bundle must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """A rewrite of a graph, with what one run cost before and after it.

    Attributes:
        name: Of the pass.
        nodes: Operations.
        flops: Of products, two a multiply-add.
        bytes: Read and written by an engine that fuses nothing.
    """

    name: str
    nodes: tuple[int, int]
    flops: tuple[int, int]
    bytes: tuple[int, int]

    def __str__(self) -> str:
        """Such as `sink: 1,073 → 1,079 nodes, 803.9 → 755.1 GFLOP, 5.12 → 4.80 GB`; what is the same stands once."""
        amounts = (
            _change([f"{count:,}" for count in self.nodes]) + " nodes",
            _change([f"{count / 1e9:.4g}" for count in self.flops]) + " GFLOP",
            _change([f"{count / 1e9:.3g}" for count in self.bytes]) + " GB",
        )
        return f"{self.name}: {', '.join(amounts)}"


def _change(amounts: list[str]) -> str:
    return " → ".join(dict.fromkeys(amounts))


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """One compiled program.

    Attributes:
        name: Unique in the bundle; the stem of its file.
        component: The network it runs.
        profile: The shape it is for; None where the shape does not depend on one (text).
        guided: U-Net only: one row of latents gives an unconditional and a conditional row.
        dtype: Format of weights and arithmetic; what runs once a schedule stays fp32 in a half-precision bundle.
        forms: The program in each form that a backend may want (`rt.backends.Form`): form to path inside the bundle.
        weights: Path of the tensors that the forms refer to.
        reference: Path of test inputs and torch's outputs for them.
        inputs: In the order of the graph.
        outputs: In the order of the graph.
        error: Relative L2 distance from torch in fp32, per output, measured at the build; empty if nothing ran it.
        verified_with: Backend and arithmetic of that measurement, such as "openvino f32", or "not verified: " and why.
            Where the build had no GPU for its backend: "openvino f32, tensorrt-rtx not run".
        islands: Operators that stayed in fp32, or in an int8 graph in floats: how many and why.
        passes: What rewrote the graph, in order.
    """

    name: str
    component: Component
    profile: ShapeProfile | None
    guided: bool
    dtype: DType
    forms: Mapping[str, str]
    weights: str
    reference: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    error: Mapping[str, float]
    verified_with: str
    islands: tuple[str, ...]
    passes: tuple[PassRecord, ...]

    @property
    def accuracy(self) -> str:
        """Such as `1.2e-06 from torch with openvino f32`."""
        return (
            f"{max(self.error.values()):.1e} from torch with {self.verified_with}"
            if self.error
            else self.verified_with
        )

    def runnable(self, backend: Backend) -> list[str]:
        """Paths of the forms that `backend` can run here, the fastest first."""
        return [self.forms[form] for form in backend.forms(self.dtype) if form in self.forms]

    def form(self, backend: Backend) -> str:
        """The path of `fastest`."""
        return self.forms[self.fastest(backend)]

    def fastest(self, backend: Backend) -> Form:
        """What `backend` runs fastest here; there is something where `Manifest.unfit` says nothing."""
        return next(form for form in backend.forms(self.dtype) if form in self.forms)

    def files(self, backend: Backend) -> list[str]:
        """Paths that loading it reads."""
        form = self.fastest(backend)
        return [self.forms[form]] if form.holds_weights else [self.forms[form], self.weights]


@dataclass(frozen=True, kw_only=True)
class LoraRecord:
    """A LoRA's file name, how much of it was added, and what the file was."""

    name: str
    scale: float
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """Where the weights came from.

    Attributes:
        name: What the user typed; of a local path only the last part.
        kind: folder, hub, single_file or synthetic.
        revision: Commit of the hub repository.
        licence: As the model card says.
        files: sha256 of every file that was read, by its name in the source.
        loras: Low-rank additions that were merged into the weights.
    """

    name: str
    kind: str
    revision: str | None
    licence: str | None
    files: Mapping[str, str]
    loras: tuple[LoraRecord, ...] = ()

    @property
    def model_hash(self) -> str:
        """First 10 hex digits of the U-Net's (or the single file's) sha256, as other tools write it."""
        unet = [
            sha
            for name, sha in sorted(self.files.items())
            if name.startswith("unet") and "safetensors" in name
        ]
        single = [
            sha for name, sha in sorted(self.files.items()) if re.fullmatch(r"[^/]+\.safetensors", name)
        ]
        return (unet or single or [hashlib.sha256(self.name.encode()).hexdigest()])[0][:10]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known of a bundle; see the module and `docs/bundle-format.md`."""

    created: str
    fingerprint: str
    source: SourceRecord
    model: ModelSpec
    config: BuildConfig
    engines: tuple[EngineRecord, ...]
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    kernels: tuple[KernelImage, ...] = ()

    def unfit(self, backend: Backend) -> str:
        """Why `backend` cannot run these engines, or "" when it can."""
        for engine in self.engines:
            if not engine.runnable(backend):
                return (
                    f"{engine.name} was built as {', '.join(engine.forms)}, and it runs "
                    f"{' or '.join(backend.forms(engine.dtype))}; rebuild with --backend {backend.name}"
                )
        return ""

    def _check_paths(self) -> None:
        """Raise ValueError unless every path that is named is a file of the bundle."""
        for engine in self.engines:
            if not engine.forms:
                raise ValueError(f"engine {shown(engine.name)} has no form")
            for path in (*engine.forms.values(), engine.weights, engine.reference):
                if path not in self.files:
                    raise ValueError(
                        f"engine {shown(engine.name)} names {shown(path)}, which is not a file of the bundle"
                    )
        for kernel in self.kernels:
            if kernel.file not in self.files:
                raise ValueError(
                    f"kernel {shown(kernel.name)} names {shown(kernel.file)}, which is not a file of the bundle"
                )

    def to_bytes(self) -> bytes:
        """The manifest file, its own sha256 (taken with the digest's digits all zero) in it."""
        body = {
            "format": FORMAT,
            "schema": SCHEMA,
            "digest": "0" * 64,
            "created": self.created,
            "fingerprint": self.fingerprint,
            "source": asdict(self.source),
            "model": self.model.to_json(),
            "config": self.config.to_json(),
            "engines": [asdict(engine) for engine in self.engines],
            "kernels": [kernel.to_json() for kernel in self.kernels],
            "versions": dict(self.versions),
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        raw = json.dumps(body, indent=1, ensure_ascii=True).encode() + b"\n"
        return _DIGEST.sub(b'"digest": "' + hashlib.sha256(raw).hexdigest().encode() + b'"', raw, count=1)

    @classmethod
    def from_bytes(cls, raw: bytes, path: Path) -> Manifest:
        """Read and check a manifest file.

        Raises:
            BundleError: When it is not the manifest of a bundle.
            IncompatibleBundleError: When an rt of another schema wrote it.
            IntegrityError: When a byte of it has changed.
        """
        try:
            body = parse_json(raw)
        except ValueError as error:
            raise IntegrityError(
                f"{path} is damaged: not JSON ({error}); build or copy the bundle again"
            ) from None
        digest = _DIGEST.search(raw)
        if not isinstance(body, dict) or (body.get("format") != FORMAT and not digest):
            raise BundleError(f"{path} is not the manifest of a bundle; make one with: rt build MODEL -o DIR")
        if (
            not digest
            or digest[1].decode() != hashlib.sha256(_DIGEST.sub(_NO_DIGEST, raw, count=1)).hexdigest()
        ):
            raise IntegrityError(f"{path} is damaged: its sha256 differs; build or copy the bundle again")
        # Every later schema keeps the digest, so that a damaged byte is never taken for a newer version.
        if body.get("schema") != SCHEMA:
            raise IncompatibleBundleError(
                f"{path} has schema {shown(body.get('schema'))}, and this rt reads {SCHEMA}: build it again, or use "
                f"the rt that built it"
            )
        try:
            known = {key: value for key, value in body.items() if key not in _ENVELOPE}
            manifest = decode(cls, known, "the manifest")
            manifest._check_paths()
            contract.check(manifest.model, manifest.engines)
            return manifest
        except ValueError as error:
            raise IncompatibleBundleError(
                f"{path} was written by another program or version of rt ({error}); build it again"
            ) from None


class Bundle:
    """A bundle that was opened: its manifest read, its files present and of the right size."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {len(self.manifest.engines)} engines, {self.manifest.config.dtype.value})"

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open the directory `path`.

        Raises:
            BundleError: When there is no bundle.
            IntegrityError: When the manifest is damaged, or a file is missing, a link, or of the wrong size.
            IncompatibleBundleError: When a newer rt wrote it.
        """
        path = Path(path)
        try:
            raw = read_bounded(path / MANIFEST)
        except FileNotFoundError:
            what = "has no manifest.json" if path.is_dir() else "does not exist"
            raise BundleError(
                f"{path} is not a bundle: it {what}; make one with: rt build MODEL -o {path}"
            ) from None
        except NotADirectoryError:
            raise BundleError(
                f"{path} is a file, not a bundle; a bundle is a directory that `rt build` made"
            ) from None
        except OSError as error:
            raise BundleError(f"{path / MANIFEST} cannot be read: {error.strerror}") from None
        except ValueError as error:  # a zero byte
            raise BundleError(f"{str(path)!r} is no path: {error}") from None
        # Absolute: engines load later, perhaps from another working directory.
        bundle = cls(path.absolute(), Manifest.from_bytes(raw, path / MANIFEST))
        try:
            for name, record in bundle.manifest.files.items():
                bundle._check_size(name, record)
        except IntegrityError:
            if bundle._is_replaced(raw):  # by a build, after its manifest was read
                return cls.open(path)
            raise
        return bundle

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare the sha256 of the named files, or of all, with the manifest.

        Raises:
            IntegrityError: With the first file that differs.
        """
        chosen = sorted(self.manifest.files if names is None else set(names))
        for name in chosen:
            if name not in self.manifest.files:
                raise IntegrityError(
                    f"{self.path / name} is not in the bundle's manifest; build or copy the bundle again"
                )
        for name, sha256 in zip(chosen, in_threads(self._hash, chosen, cpu_count()), strict=True):
            if sha256 != self.manifest.files[name].sha256:
                raise IntegrityError(
                    f"{self.path / name} is damaged: its sha256 differs; build or copy the bundle again"
                )

    def _is_replaced(self, raw: bytes) -> bool:
        """Whether there is another bundle now than the one whose manifest is `raw`."""
        try:
            return read_bounded(self.path / MANIFEST) != raw
        except OSError:
            return False

    def _hash(self, name: str) -> str:
        try:
            return hash_file(self.path / name)
        except OSError as error:
            raise IntegrityError(
                f"{self.path / name} cannot be read: {error.strerror}; build or copy the bundle again"
            ) from None

    def _check_size(self, name: str, record: FileRecord) -> None:
        file = self.path / name
        try:
            # Differs for a name that leaves the bundle, and for a link anywhere on the way.
            inside = os.path.realpath(file) == f"{os.path.realpath(self.path)}/{name}" and file.is_file()
        except (OSError, ValueError):  # a name that is too long or has a zero byte
            inside = False
        if not inside:
            what = file if name.isprintable() and len(name) < 256 else shown(name)
            raise IntegrityError(f"{what} is missing or not a plain file; build or copy the bundle again")
        size = file.stat().st_size
        if size != record.size_bytes:
            raise IntegrityError(
                f"{file} is damaged: {size} bytes instead of {record.size_bytes}; build or copy the bundle again"
            )


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file, without holding it in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
