import hashlib
import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rt.errors import ConfigError, RtError
from rt.images import ImageMetadata, OutputPattern, postprocess, save, to_pil

SUFFIXES = ["png", "jpg", "jpeg", "webp", "PNG"]

METADATA = ImageMetadata(
    prompt='A "red" cat, 35mm: näive,\n  (best:1.3) <lora:x:0.6>\n\n漢字 😀',
    negative_prompt="blurry, text: no\nugly",
    steps=20,
    sampler="DPM++ 2M",
    guidance_scale=7.5,
    seed=2**63,
    width=48,
    height=32,
    model="my, model: v1",
    model_hash="0123456789",
    version="rt 0.1.0",
    extra={"Schedule type": "Karras", "Note": 'a "b", c\\d', "Quoted": '"all"'},
)


@pytest.fixture
def image() -> np.ndarray:
    """A smooth picture with random colours: lossy formats keep it within a few levels."""
    rng = np.random.default_rng()
    y, x = np.mgrid[0:1:32j, 0:1:48j][..., None]
    start, right, down = rng.uniform(40, 110, (3, 3))
    return (start + x * right / 2 + y * down / 2).astype(np.uint8)


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, as A1111's format says: the last line is settings."""
    *lines, last = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("Negative prompt:")]
    split = starts[0] if starts else len(lines)
    negative = "\n".join(lines[split:]).removeprefix("Negative prompt:").removeprefix(" ")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    settings = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    return "\n".join(lines[:split]), negative, settings


def written_parameters(path: Path) -> str:
    with Image.open(path) as picture:
        if picture.format == "PNG":
            return picture.text["parameters"]
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return comment[8:].decode("utf-16-be")


def written_xmp(path: Path) -> bytes:
    with Image.open(path) as picture:
        xmp = picture.info["xmp"]
    return xmp.encode() if isinstance(xmp, str) else xmp


# Pixels


@pytest.mark.parametrize("reuse", [False, True])
def test_postprocess_is_diffusers(reuse):
    rng = np.random.default_rng()
    decoded = rng.normal(0, 0.7, (64, 48, 3)).astype(np.float32)
    # Ties and their neighbours, where another rounding or order of operations would show.
    ties = ((np.arange(-2, 258) + 0.5) / 255 * 2 - 1).astype(np.float32)
    ties = np.concatenate(
        [ties, np.nextafter(ties, -2, dtype=np.float32), np.nextafter(ties, 2, dtype=np.float32)]
    )
    decoded.ravel()[: ties.size] = ties
    before = decoded.copy()
    out = rng.integers(0, 256, decoded.shape, np.uint8) if reuse else None

    actual = postprocess(decoded, out)

    tensor = torch.from_numpy(decoded).permute(2, 0, 1)[None]
    (expected,) = VaeImageProcessor().postprocess(tensor, output_type="pil")
    assert (actual is out) == reuse
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, np.asarray(expected))
    np.testing.assert_array_equal(decoded, before)


@pytest.mark.parametrize("out", [np.empty((2, 3, 3), np.uint8), np.empty((3, 2, 3), np.int8)])
def test_postprocess_refuses_another_buffer(out):
    with pytest.raises(ConfigError, match=r"expected uint8 \(3, 2, 3\)"):
        postprocess(np.zeros((3, 2, 3), np.float32), out)


def test_to_pil(image):
    picture = to_pil(image)
    assert (picture.mode, picture.size) == ("RGB", (48, 32))
    np.testing.assert_array_equal(np.asarray(picture), image)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_to_pil_refuses_what_is_no_picture(array):
    with pytest.raises(ConfigError, match=r"expected uint8 \(height, width, 3\)"):
        to_pil(array)


# Metadata


def check_parameters(text: str, metadata: ImageMetadata) -> None:
    prompt, negative, settings = parse_parameters(text)
    assert prompt == metadata.prompt
    assert negative == metadata.negative_prompt
    assert settings == {
        "Steps": str(metadata.steps),
        "Sampler": metadata.sampler,
        "CFG scale": str(metadata.guidance_scale),
        "Seed": str(metadata.seed),
        "Size": f"{metadata.width}x{metadata.height}",
        "Model hash": metadata.model_hash,
        "Model": metadata.model,
        **metadata.extra,
        "Version": metadata.version,
    }


def test_parameters_are_a1111s():
    metadata = replace(METADATA, prompt="a cat", negative_prompt="", model="sd15", extra={})
    assert metadata.parameters_text() == (
        "a cat\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 9223372036854775808, "
        "Size: 48x32, Model hash: 0123456789, Model: sd15, Version: rt 0.1.0"
    )


line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"))
prompts = st.lists(line.filter(lambda text: not text.startswith("Negative prompt:")), min_size=1).map(
    "\n".join
)
values = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    prompt=prompts,
    negative=prompts,
    model=values,
    note=values,
    seed=st.integers(0, 2**64 - 1),
    guidance_scale=st.floats(0, 30),
)
def test_parameters_are_read_back(prompt, negative, model, note, seed, guidance_scale):
    metadata = replace(
        METADATA,
        prompt=prompt,
        negative_prompt=negative,
        model=model,
        seed=seed,
        guidance_scale=guidance_scale,
        extra={"Clip skip": "2", "A note/for-us": note},
    )
    check_parameters(metadata.parameters_text(), metadata)
    assert json.loads(metadata.to_json()) == vars(metadata)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, image, suffix):
    path = tmp_path / f"picture.{suffix}"
    save(path, image, metadata=METADATA)
    assert [*tmp_path.iterdir()] == [path]
    with Image.open(path) as picture:
        assert picture.format == {"jpg": "JPEG", "jpeg": "JPEG"}.get(suffix, suffix.upper())
        pixels = np.asarray(picture.convert("RGB"))
    error = np.abs(pixels.astype(int) - image)
    assert error.max() <= (0 if suffix.lower() == "png" else 8)
    check_parameters(written_parameters(path), METADATA)


def test_png_has_the_exact_json(tmp_path, image):
    path = tmp_path / "picture.png"
    save(path, image, metadata=METADATA)
    with Image.open(path) as picture:
        assert ImageMetadata(**json.loads(picture.text["rt"])) == METADATA


@pytest.mark.parametrize("metadata", [None, METADATA])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_xmp_says_that_the_picture_is_generated(tmp_path, image, suffix, metadata):
    path = tmp_path / f"picture.{suffix}"
    save(path, image, metadata=metadata)
    (description,) = ElementTree.fromstring(written_xmp(path)).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    source = description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert source == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_metadata_nothing_else_is_written(tmp_path, image, suffix):
    path = tmp_path / f"picture.{suffix}"
    save(path, image)
    with Image.open(path) as picture:
        assert not getattr(picture, "text", {}).keys() - {"XML:com.adobe.xmp"}
        assert not picture.getexif()


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_comment_too_long_for_exif_is_cut(tmp_path, image, suffix):
    metadata = replace(METADATA, prompt="word " * 20_000)
    path = tmp_path / f"picture.{suffix}"
    save(path, image, metadata=metadata)
    text = written_parameters(path)
    assert len(text) > 30_000
    assert metadata.parameters_text().startswith(text)


# Files


def test_save_never_overwrites_unasked(tmp_path, image):
    path = tmp_path / "picture.png"
    path.write_bytes(b"dear")
    with pytest.raises(ConfigError, match=r"picture\.png exists: .*--force"):
        save(path, image)
    assert path.read_bytes() == b"dear"
    save(path, image, overwrite=True)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)


def test_save_replaces_a_link_and_not_its_target(tmp_path, image):
    target, link = tmp_path / "target", tmp_path / "picture.png"
    link.symlink_to(target)
    with pytest.raises(ConfigError, match="exists"):
        save(link, image)
    save(link, image, overwrite=True)
    assert not link.is_symlink()
    assert not target.exists()


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_save_where_no_file_can_be(tmp_path, image, folder):
    (tmp_path / "file").touch()
    with pytest.raises(RtError, match=r"cannot write .*picture\.png: .*; its folder must exist") as info:
        save(tmp_path / folder / "picture.png", image)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_full_disk_leaves_what_was_there(tmp_path, image, monkeypatch, suffix):
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(b"dear")

    def no_space(self, file, *args, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    with pytest.raises(RtError, match="No space left on device"):
        save(path, image, overwrite=True)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"dear"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.gif", r"'\.gif'.*\.png, \.jpg, \.jpeg, \.webp"),
        ("a.pgn", r"did you mean '\.png'"),
        ("a", "no suffix"),
    ],
)
def test_unknown_suffix(tmp_path, image, name, message):
    with pytest.raises(ConfigError, match=message):
        save(tmp_path / name, image)
    with pytest.raises(ConfigError, match=message):
        OutputPattern(name)
    assert not [*tmp_path.iterdir()]


# Names

HASH = hashlib.sha256(b"a cat").hexdigest()[:10]


@pytest.mark.parametrize(
    ("pattern", "count", "expected"),
    [
        ("out/{seed}-{index:03d}.png", 4, "out/7-002.png"),
        ("out/", 1, "out/7-002.png"),
        ("out/{date}/", 1, f"out/{date.today()}/7-002.png"),
        ("{date:%Y}_{prompt_hash}.webp", 1, f"{date.today():%Y}_{HASH}.webp"),
        ("{prompt_hash}.webp", 2, f"{HASH}-002.webp"),
        ("cat.png", 1, "cat.png"),
        ("cat.png", 3, "cat-002.png"),
        ("out/cat.v2.JPG", 3, "out/cat.v2-002.JPG"),
        ("{seed}.jpeg", 3, "7.jpeg"),
        ("{{seed}}.png", 2, "{seed}-002.png"),
    ],
)
def test_output_path(pattern, count, expected):
    assert OutputPattern(pattern).path(seed=7, index=2, prompt="a cat", count=count) == Path(expected)


def test_output_path_in_a_folder_that_exists(tmp_path):
    path = OutputPattern(str(tmp_path)).path(seed=1, index=0, prompt="", count=1)
    assert path == tmp_path / "1-000.png"


@pytest.mark.parametrize("pattern", ["cat.png", "{date}.webp", "{seed}.png", "out/", "{index}.jpg"])
def test_every_picture_has_its_own_path(pattern):
    output = OutputPattern(pattern)
    assert len({output.path(seed=40 + i, index=i, prompt="", count=9) for i in range(9)}) == 9


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "{sed}.png",
            r"the field {sed} \(did you mean 'seed'\?\): expected {seed}, {index}, {date}, {prompt_hash}",
        ),
        ("{}.png", "the field {}"),
        ("{0}.png", "the field {0}"),
        ("{seed.__class__}.png", "the field {seed.__class__}"),
        ("{seed[0]}.png", r"the field {seed\[0\]}"),
        ("{seed.png", "unbalanced braces"),
        ("seed}.png", "unbalanced braces"),
        ("{seed:q}.png", "a format that does not fit"),
        ("{seed:{width}}.png", "a format that does not fit"),
        ("{seed}.{date}", "expected one of"),
        ("{seed:0999999999d}.png", "a field of width 0999999999: expected at most 255"),
        ("{index:256}.png", "a field of width 256"),
        ("{seed:.99999999999f}.png", "a field of width 99999999999"),
        ("{date:%9999999Y}.png", "a field of width 9999999"),
        ("{prompt_hash:>" + "9" * 5000 + "}.png", "a field of width 99999"),
        ("{index:c}.png", "it gives a character that no name can have"),
        ("{index:.0}.png", "a format that does not fit"),
    ],
)
def test_bad_pattern(pattern, message):
    with pytest.raises(ConfigError, match=message):
        OutputPattern(pattern)


def test_a_value_that_does_not_fit_the_format():
    with pytest.raises(ConfigError, match="a format that does not fit its field"):
        OutputPattern("{seed:c}.png").path(seed=2**40, index=0, prompt="", count=1)


@pytest.mark.parametrize(
    "pattern", ["{seed:.0e}.png", "{index:.0e}.png", "{seed:.1}{date}.png", "{index:%}.png", "out/"]
)
def test_pictures_that_would_be_one_file(pattern, tmp_path, monkeypatch):
    """Found among the names themselves, whatever the pattern looks like."""
    monkeypatch.chdir(tmp_path)
    try:
        output = OutputPattern(pattern)
        names = [output.path(seed=95 + i, index=i, prompt="", count=30) for i in range(30)]
    except ConfigError:  # a precision is nothing for a whole number
        return
    if len(set(names)) == 30:
        assert output.paths(range(95, 125), [""] * 30) == names
    else:
        with pytest.raises(
            ConfigError, match=r"would be picture \d+ and picture \d+: .*put {index} into the name"
        ):
            output.paths(range(95, 125), [""] * 30)


def test_a_link_between_two_folders_of_a_pattern(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").symlink_to("1")
    pattern = OutputPattern(f"{tmp_path}/{{seed}}/x.png")
    with pytest.raises(ConfigError, match=r"2/x\.png would be picture 0 and picture 1"):
        pattern.paths([1, 2], ["", ""])


def test_a_side_that_a_format_has_no_room_for(tmp_path):
    path = tmp_path / "picture.webp"
    with pytest.raises(RtError, match=r"cannot write .*picture\.webp: .*16383.*; another format may hold it"):
        save(path, np.zeros((1, 16384, 3), np.uint8))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_that_are_no_text_become_escapes(tmp_path, image, suffix):
    path = tmp_path / f"picture.{suffix}"
    save(path, image, metadata=replace(METADATA, model="a\udcffb"))
    assert r"a\udcffb" in written_parameters(path)
