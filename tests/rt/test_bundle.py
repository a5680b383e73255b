"""A bundle is exactly what was built, or an error that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rt.bundle import (
    MANIFEST,
    SCHEMA,
    Bundle,
    EngineRecord,
    FileRecord,
    Manifest,
    PassRecord,
    SourceRecord,
    hash_file,
)
from rt.config import BuildConfig, DType
from rt.errors import BundleError, IncompatibleBundleError, IntegrityError
from rt.model import Component, Family, ModelSpec
from rt.shapes import ShapeProfile, TensorSpec

FILES = (
    "engines/unet.onnx",
    "engines/unet.weights",
    "reference/unet.npz",
    "tokenizer/text_encoder.json",
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
        islands=(),
        passes=(),
    )
    return Manifest(
        created="2026-01-02T03:04:05+00:00",
        fingerprint="f" * 64,
        source=SourceRecord(
            name="modèle", kind="folder", revision=None, licence=None, files={"unet/w": "0" * 64}
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
