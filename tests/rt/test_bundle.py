"""A bundle is exactly what was built, or an error that names the file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rt.backends import Form
from rt.bundle import (
    MANIFEST,
    SCHEMA,
    Bundle,
    EngineRecord,
    FileRecord,
    LoraRecord,
    Manifest,
    PassRecord,
    SourceRecord,
    hash_file,
)
from rt.config import BuildConfig, DType
from rt.errors import BundleError, IncompatibleBundleError, IntegrityError
from rt.kernel_image import KernelImage, TensorArgument
from rt.model import Component, Family, ModelSpec
from rt.shapes import ShapeProfile, TensorSpec

FILES = (
    "engines/unet.onnx",
    "engines/unet.fused.onnx",
    "engines/unet.weights",
    "reference/unet.npz",
    "tokenizer/text_encoder.json",
    "kernels/copy.cubin",
    "LICENSE",
)


def make_manifest(files: dict[str, FileRecord]) -> Manifest:
    """Every kind of value that a manifest can hold, None included."""
    profile = ShapeProfile(64, 48, 2)
    engine = EngineRecord(
        name="unet",
        component=Component.UNET,
        profile=profile,
        guided=True,
        dtype=DType.FP16,
        forms={"onnx": "engines/unet.onnx", "fused.onnx": "engines/unet.fused.onnx"},
        weights="engines/unet.weights",
        reference="reference/unet.npz",
        inputs=(TensorSpec(name="latents", shape=(2, 4, 8, 6)),),
        outputs=(TensorSpec(name="prediction", shape=(4, 4, 8, 6)),),
        error={"prediction": 1.25e-6},
        verified_with="openvino f32",
        islands=("3 group_norm: sums over many elements",),
        passes=(PassRecord(name="sink", nodes=(1283, 1270), flops=(1_607, 1_565), bytes=(5, 5)),),
    )
    text = replace(
        engine,
        name="text",
        component=Component.TEXT_ENCODER,
        profile=None,
        guided=False,
        inputs=(TensorSpec(name="tokens", shape=(1, 77), dtype="int64"),),
        outputs=(TensorSpec(name="states", shape=(1, 77, 768)),),
        islands=(),
        passes=(),
    )
    argument = TensorArgument(name="x", shape=("rows", "2 * WIDTH"), dtype="float16")
    kernel = KernelImage(
        kernel="copy",
        name="copy-90",
        symbol="copy",
        capability=90,
        file="kernels/copy.cubin",
        sizes={"rows": 2},
        constants={"WIDTH": 8, "eps": 1e-5, "flag": True, "kind": "plain"},
        inputs=(argument,),
        scalars={"n": "rows"},
        outputs=(argument,),
        grid=("rows", "1"),
        threads=32,
        shared_bytes=0,
        registers=16,
    )
    return Manifest(
        created="2026-01-02T03:04:05+00:00",
        fingerprint="f" * 64,
        source=SourceRecord(
            name="modèle",
            kind="folder",
            revision=None,
            licence=None,
            files={"unet/w": "0" * 64},
            loras=(LoraRecord(name="style", scale=0.5, sha256="1" * 64),),
        ),
        model=ModelSpec(
            family=Family.SD1,
            latent_channels=4,
            vae_scale_factor=8,
            sample_size=8,
            scaling_factor=0.18215,
            text_encoders=(Component.TEXT_ENCODER,),
            max_tokens=77,
            context_size=768,
            pooled_size=None,
            zero_negative=False,
            scheduler={"_class_name": "DDIMScheduler", "beta_end": 0.012, "trained_betas": None},
        ),
        config=BuildConfig(profiles=(profile,), dtype=DType.FP16),
        engines=(engine, text),
        versions={"python": "3.11"},
        files=files,
        kernels=(kernel,),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A sound bundle of small files with fresh random bytes; its engines are not engines."""
    root = tmp_path / "bundle"
    records = {}
    for name in FILES:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(random.randint(100, 3000)))
        records[name] = FileRecord(sha256=hash_file(file), size_bytes=file.stat().st_size)
    (root / MANIFEST).write_bytes(make_manifest(records).to_bytes())
    return root


def signed(body: dict[str, object]) -> bytes:
    """A manifest of any content with a digest that is right, computed apart from the code under test."""
    raw = json.dumps({**body, "digest": "0" * 64}, indent=1).encode() + b"\n"
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)


def edit(bundle: Path, change: Callable[[dict[str, object]], object]) -> None:
    body = json.loads((bundle / MANIFEST).read_bytes())
    change(body)
    (bundle / MANIFEST).write_bytes(signed(body))


def raised(kind: type[BundleError], call: Callable[[], object]) -> str:
    """The message of exactly this class, one line, exit code 3."""
    with pytest.raises(BundleError) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_manifest_survives_a_round_trip(bundle: Path) -> None:
    files = Bundle.open(bundle).manifest.files
    assert Bundle.open(bundle).manifest == make_manifest(dict(files))
    assert set(files) == set(FILES)


def test_the_digest_is_the_sha256_of_the_manifest_with_its_digits_zero(bundle: Path) -> None:
    raw = (bundle / MANIFEST).read_bytes()
    digest = json.loads(raw)["digest"]
    assert hashlib.sha256(raw.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def test_a_sound_bundle_verifies(bundle: Path) -> None:
    Bundle.open(bundle).verify()


def test_repr_says_where_and_what(bundle: Path) -> None:
    assert repr(Bundle.open(bundle)) == f"Bundle('{bundle}', 2 engines, fp16)"


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_of_a_file_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    (bundle / name).write_bytes(data)
    opened = Bundle.open(bundle)
    assert str(bundle / name) in raised(IntegrityError, opened.verify)
    assert str(bundle / name) in raised(IntegrityError, lambda: opened.verify([name]))
    opened.verify(set(FILES) - {name})


def test_one_flipped_bit_anywhere_in_the_manifest_is_found(bundle: Path) -> None:
    raw = (bundle / MANIFEST).read_bytes()
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << random.randrange(8)
        (bundle / MANIFEST).write_bytes(damaged)
        assert str(bundle / MANIFEST) in raised(IntegrityError, lambda: Bundle.open(bundle)), position


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_a_truncated_manifest_is_damaged(bundle: Path, keep: float) -> None:
    raw = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(raw[: int(keep * len(raw)) if keep < 1 else 1])
    assert "damaged" in raised(IntegrityError, lambda: Bundle.open(bundle))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def make_link(file: Path) -> None:
    file.rename(file.with_suffix(".real"))
    file.symlink_to(file.with_suffix(".real"))


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link_its_folder(file: Path) -> None:
    elsewhere = file.parents[2] / "elsewhere"
    file.parent.rename(elsewhere)
    file.parent.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", [truncate, make_link, make_folder, link_its_folder, Path.unlink])
@pytest.mark.parametrize("name", [name for name in FILES if "/" in name])
def test_open_alone_finds_what_is_not_a_whole_plain_file(
    bundle: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(bundle / name)
    message = raised(IntegrityError, lambda: Bundle.open(bundle))
    assert str((bundle / name).parent) in message
    assert "build or copy the bundle again" in message


@pytest.mark.parametrize(
    "name", ["../secret", "engines/../../secret", "{}/secret", "./LICENSE", "engines//unet.onnx"]
)
def test_a_name_that_is_not_a_plain_path_inside_the_bundle_is_refused(bundle: Path, name: str) -> None:
    secret = bundle.parent / "secret"
    secret.write_bytes(b"secret")
    name = name.format(bundle.parent)
    record = {"sha256": hash_file(secret), "size_bytes": (bundle / name).stat().st_size}
    edit(bundle, lambda body: body["files"].update({name: record}))  # type: ignore[attr-defined]
    assert str(bundle / name) in raised(IntegrityError, lambda: Bundle.open(bundle))


def test_a_bundle_may_be_reached_through_a_link(bundle: Path) -> None:
    link = bundle.with_name("link")
    link.symlink_to(bundle)
    Bundle.open(link).verify()


def test_a_bundle_opens_by_a_relative_path(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    Bundle.open(".").verify()


@pytest.mark.parametrize("schema", [2, 7])
def test_another_schema_is_incompatible_and_not_damaged(bundle: Path, schema: int) -> None:
    edit(bundle, lambda body: body.update(schema=schema, engines="as nobody knows yet"))
    message = raised(IncompatibleBundleError, lambda: Bundle.open(bundle))
    assert f"schema {schema}, and this rt reads {SCHEMA}: build it again" in message


@pytest.mark.parametrize("content", ['{"name": "a web page"}', "[]", "1", '"rt-bundle"'])
def test_another_programs_manifest_is_not_a_bundle(bundle: Path, content: str) -> None:
    (bundle / MANIFEST).write_text(content)
    assert "not the manifest of a bundle" in raised(BundleError, lambda: Bundle.open(bundle))


def test_what_is_not_a_bundle_is_said_with_what_to_do(tmp_path: Path, bundle: Path) -> None:
    cases = {
        tmp_path / "nowhere": "does not exist",
        tmp_path: "has no manifest.json",
        bundle / "LICENSE": "is a file",
    }
    for path, why in cases.items():
        message = raised(BundleError, lambda path=path: Bundle.open(path))
        assert message.startswith(str(path)) and why in message and "rt build" in message


def test_a_manifest_that_cannot_be_read_is_said(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).mkdir()
    assert "cannot be read: Is a directory" in raised(BundleError, lambda: Bundle.open(bundle))
    (bundle / MANIFEST).rmdir()
    os.mkfifo(bundle / MANIFEST)
    assert "cannot be read: a pipe, not a file" in raised(BundleError, lambda: Bundle.open(bundle))
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).symlink_to("/dev/zero")
    assert "cannot be read: a device, not a file" in raised(BundleError, lambda: Bundle.open(bundle))
    (bundle / MANIFEST).unlink()
    with (bundle / MANIFEST).open("wb") as file:
        file.truncate(3 << 30)
    assert "cannot be read: larger than 16,777,216 bytes" in raised(BundleError, lambda: Bundle.open(bundle))


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "x/" * 3000])
def test_a_path_that_cannot_be_is_said(path: str) -> None:
    raised(BundleError, lambda: Bundle.open(path))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[" * 200_000, "nested more than 64 deep"),
        (b'{"schema": ' + b"9" * 10**5 + b"}", "a number of 100,000 digits"),
        (b'{"schema": NaN}', "NaN is no JSON"),
        ('{"format": "rt-bundle"}'.encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_a_manifest_that_no_build_wrote_is_damaged(bundle: Path, raw: bytes, reason: str) -> None:
    (bundle / MANIFEST).write_bytes(raw)
    assert f"is damaged: not JSON ({reason})" in raised(IntegrityError, lambda: Bundle.open(bundle))


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


JUNK = (
    *(None, True, False, 0, -1, 3, 10**18, 10**30, 10**400, 0.5, -0.0, 1e300, -math.inf),
    *("", "../../etc/passwd", "/etc/passwd", "\0", "é\n\x1b[31m", "x" * 5000, "9" * 400),
    *([], [None], [1, 2, 3], deep(40), {}, {"": {}}, {"name": 1}, {"../x": {"sha256": "", "size_bytes": 0}}),
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Of a JSON value and of everything in it."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[str | int, ...], junk: Any) -> Any:
    """`value` with something else at one place."""
    if not path:
        return junk
    first, *rest = path
    changed = value.copy()
    changed[first] = replaced(value[first], tuple(rest), junk)
    return changed


def test_a_signed_manifest_with_anything_in_any_place_opens_or_is_refused(bundle: Path) -> None:
    """Signed by whoever changed it; what opens has every value of its type."""
    body = json.loads((bundle / MANIFEST).read_bytes())
    refused = Counter[str]()
    for path in places(body):
        if not path or path[0] in ("digest", "format"):
            continue
        for junk in JUNK:
            changed = replaced(body, path, junk)
            try:
                manifest = Manifest.from_bytes(signed(changed), bundle / MANIFEST)
                if path[0] == "files":
                    (bundle / MANIFEST).write_bytes(signed(changed))
                    Bundle.open(bundle)
            except BundleError as error:
                assert len(str(error)) < 1000 and str(error).isprintable(), (path, junk)
                refused[path[0]] += 1  # type: ignore[index]
            else:
                assert json.loads(manifest.to_bytes()).keys() == body.keys(), (path, junk)
                for engine in manifest.engines:
                    assert engine.files(SimpleNamespace(forms=lambda dtype: [Form.ONNX])), (path, junk)  # type: ignore[arg-type]
    assert set(refused) == set(body) - {"digest", "format"}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("model", "max_tokens"), "77", "model.max_tokens is '77', expected a whole number"),
        (("model", "scheduler"), [], "model.scheduler is [], expected an object"),
        (("model", "text_encoders"), ["unet"], "the text encoders are ['unet']"),
        (("model", "context_size"), 7, "context_size is 7, and the text encoders give 768 channels"),
        (("model", "latent_channels"), 0, "latent_channels is 0, expected more than 0"),
        (("model", "pooled_size"), 5, "pooled_size is 5"),
        (("config", "profiles"), [], "config: a build needs at least one shape profile"),
        (("config", "dtype"), "fp64", "config.dtype is 'fp64', expected one of fp32, fp16"),
        (("config", "speed"), 1, "config has speed, which is not known"),
        (("engines",), {}, "engines is {}, expected a list"),
        (("engines",), [], "there is no program of the unet"),
        (("engines", 0, "name"), "text", "two have the name 'text'"),
        (("engines", 0, "profile"), None, "program 'unet' has the shape None"),
        (
            ("engines", 0, "profile", "height"),
            "6",
            "engines[0].profile.height is '6', expected a whole number",
        ),
        (
            ("engines", 0, "profile", "height"),
            640,
            "'unet': input latents is [2, 4, 8, 6], expected [2, 4, 80, 6]",
        ),
        (("engines", 0, "forms"), {}, "engine 'unet' has no form"),
        (("engines", 0, "forms", "onnx"), "../x", "names '../x', which is not a file of the bundle"),
        (("engines", 0, "inputs", 0, "shape", 0), -2, "'unet': input latents is [-2, 4, 8, 6]"),
        (
            ("engines", 0, "inputs", 0, "dtype"),
            "O",
            "'unet': input latents is 'O', expected float32",
        ),
        (("engines", 0, "inputs", 0, "name"), "x", "'unet': input latents is missing"),
        (("engines", 1, "outputs"), [], "'text': output states is missing"),
        (("engines", 0, "passes", 0, "nodes"), [1], "passes[0].nodes is [1], expected a list of 2"),
        (("engines", 0, "error", "prediction"), True, "error.prediction is True, expected a finite number"),
        (("kernels", 0, "file"), "engines/x", "kernel 'copy-90' names 'engines/x'"),
        (("kernels", 0, "constants", "eps"), [], "constants.eps is [], expected a whole number"),
        (("files", "LICENSE"), "x", "files.LICENSE is 'x', expected an object"),
        (("files", "LICENSE", "size_bytes"), 10**30, "expected a whole number of at most 64 bits"),
        (("source", "loras", 0, "scale"), -math.inf, "scale is -inf, expected a finite number"),
        (("source", "revision"), 5, "source.revision is 5, expected a text or null"),
    ],
)
def test_a_signed_manifest_is_told_what_is_wrong_with_it(
    bundle: Path, path: tuple[str | int, ...], value: Any, reason: str
) -> None:
    body = json.loads((bundle / MANIFEST).read_bytes())
    where = body
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    (bundle / MANIFEST).write_bytes(signed(body))
    message = raised(IncompatibleBundleError, lambda: Bundle.open(bundle))
    assert reason in message and "build it again" in message


@pytest.mark.parametrize("name", ["\0", "x" * 300, "../" * 2000, "", ".", "engines"])
def test_names_that_no_file_can_have_are_missing_files(bundle: Path, name: str) -> None:
    record = {"sha256": "0" * 64, "size_bytes": 0}
    edit(bundle, lambda body: body["files"].update({name: record}))  # type: ignore[attr-defined]
    assert "is missing or not a plain file" in raised(IntegrityError, lambda: Bundle.open(bundle))


def test_a_file_that_is_not_in_the_manifest_is_not_verified(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "more").write_bytes(b"")
    assert "is not in the bundle's manifest" in raised(IntegrityError, lambda: opened.verify(["more"]))


def test_a_bundle_that_is_replaced_while_it_opens_is_the_new_one(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(bundle, bundle.with_name("other")))
    (other / "LICENSE").write_bytes(b"longer than it was" * 1000)
    record = {"sha256": hash_file(other / "LICENSE"), "size_bytes": 18_000}
    edit(other, lambda body: body["files"].update(LICENSE=record))  # type: ignore[attr-defined]
    read = Manifest.from_bytes

    def replace_then_read(raw: bytes, path: Path) -> Manifest:
        if other.exists():
            shutil.rmtree(bundle)
            other.rename(bundle)
        return read(raw, path)

    monkeypatch.setattr(Manifest, "from_bytes", replace_then_read)
    assert Bundle.open(bundle).manifest.files["LICENSE"].size_bytes == 18_000


def test_a_copied_bundle_is_the_same_bundle(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    Bundle.open(copy).verify()
    assert Bundle.open(copy).manifest == Bundle.open(bundle).manifest


def test_the_model_hash_is_ten_digits_of_the_unet_or_of_the_single_file() -> None:
    source = SourceRecord(name="m", kind="folder", revision=None, licence=None, files={})
    folder = {
        "text_encoder/model.safetensors": "a" * 64,
        "unet/x.safetensors": "b" * 64,
        "unet/config.json": "c" * 64,
    }
    assert replace(source, files=folder).model_hash == "b" * 10
    assert replace(source, files={"model.safetensors": "d" * 64}).model_hash == "d" * 10
    assert re.fullmatch("[0-9a-f]{10}", source.model_hash)


def test_a_backend_is_given_its_first_form_that_is_there() -> None:
    manifest = make_manifest({})
    record = manifest.engines[0]

    def backend(*forms: str) -> Any:
        return SimpleNamespace(name="stones", forms=lambda dtype: forms)

    assert record.form(backend("fused.onnx", "onnx")) == "engines/unet.fused.onnx"
    assert record.runnable(backend("plan", "onnx")) == ["engines/unet.onnx"]
    assert manifest.unfit(backend("plan", "onnx")) == ""
    assert manifest.unfit(backend("plan", "stone")) == (
        "unet was built as onnx, fused.onnx, and it runs plan or stone; rebuild with --backend stones"
    )
