"""A picture's levels do not depend on how it is given, and what is none is refused by one line."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from rt.errors import ConfigError
from rt.inpainting import cut_out
from rt.picture import levels

SIZE, OTHER = (30, 20), (64, 48)
Levels = np.ndarray[Any, Any]


@pytest.fixture
def colours() -> np.ndarray:
    """Every level is there, so that its range shows: (20, 30, 3)."""
    pixels = np.random.default_rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
    pixels[0, :2] = [[0, 0, 0], [255, 255, 255]]
    return pixels


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels[..., 0])


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, np.random.default_rng().integers(0, 256, pixels.shape[:2], dtype=np.uint8)])


def big_endian(pixels: np.ndarray) -> Image.Image:
    return Image.frombytes("I;16B", SIZE, (grey(pixels).astype(">u2") * 257).tobytes())


def premultiplied(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])).convert("RGBa")


# Each says the same as the array that it is made from.
COLOURED: dict[str, Callable[[np.ndarray], Any]] = {
    "PIL": Image.fromarray,
    "uint8": lambda p: p,
    "not contiguous": lambda p: np.asfortranarray(p),
    "RGBA": lambda p: Image.fromarray(with_alpha(p)),
    "alpha array": with_alpha,
    "RGBX": lambda p: Image.fromarray(p).convert("RGBX"),
    "RGBa": premultiplied,
    "uint16": lambda p: p.astype(np.uint16) * 257,
    "big-endian": lambda p: p.astype(">u2") * 257,
    "float32": lambda p: p.astype(np.float32) / 255,
    "float64": lambda p: p / 255,
    "int64": lambda p: p.astype(np.int64),
    "int32 of 16 bits": lambda p: p.astype(np.int32) * 257,
    "int32 of 31 bits": lambda p: (p / 255 * (2**31 - 1)).astype(np.int32),
    "torch": lambda p: torch.from_numpy(p),
    "torch floats": lambda p: torch.from_numpy(p) / 255,
}
GREY: dict[str, Callable[[np.ndarray], Any]] = {
    "L": lambda p: Image.fromarray(grey(p)),
    "uint8": grey,
    "a channel": lambda p: p[..., :1],
    "LA": lambda p: Image.fromarray(with_alpha(p)[..., [0, 3]]),
    "I;16": lambda p: Image.fromarray(grey(p).astype(np.uint16) * 257),
    "I;16B": big_endian,
    "I": lambda p: Image.fromarray(grey(p).astype(np.int32) * 257),
    "I as Pillow converts": lambda p: Image.fromarray(grey(p)).convert("I"),
    "F": lambda p: Image.fromarray(grey(p).astype(np.float32) / 255),
    "F as Pillow converts": lambda p: Image.fromarray(grey(p)).convert("F"),
    "uint16": lambda p: grey(p).astype(np.uint16) * 257,
    "float32": lambda p: grey(p).astype(np.float32) / 255,
}


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", COLOURED)
def test_colours(colours: np.ndarray, kind: str, mode: Any, size: tuple[int, int]) -> None:
    expected = levels(Image.fromarray(colours), "image", size, mode)
    assert expected.shape == (size[1], size[0], 3)[: 3 if mode == "RGB" else 2]
    found = levels(COLOURED[kind](colours), "image", size, mode)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", GREY)
def test_grey(colours: np.ndarray, kind: str, mode: Any, size: tuple[int, int]) -> None:
    expected = levels(Image.fromarray(grey(colours)), "image", size, mode)
    np.testing.assert_allclose(levels(GREY[kind](colours), "image", size, mode), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("of", ["1", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_what_pillow_makes_of_them(colours: np.ndarray, of: str, mode: Any) -> None:
    """Before they are resized: neither indices nor hues can be."""
    made = Image.fromarray(colours)
    made = made.convert("LA").convert("PA") if of == "PA" else made.convert(of)
    expected = levels(made.convert("RGB"), "image", OTHER, mode)
    if of == "P":
        made.info["transparency"] = bytes(range(256))
    np.testing.assert_array_equal(levels(made, "image", OTHER, mode), expected)


def test_bool_is_black_and_white(colours: np.ndarray) -> None:
    hole = grey(colours) > 127
    expected = levels(Image.fromarray(hole.astype(np.uint8) * 255), "mask_image", OTHER, "L")
    for given in (
        hole,
        hole.astype(np.int64),
        hole.astype(np.float32),
        Image.fromarray(hole.astype(np.int32)),
    ):
        np.testing.assert_array_equal(levels(given, "mask_image", OTHER, "L"), expected)


def test_floats_of_the_right_size_keep_their_precision() -> None:
    """As in diffusers, which takes them as they are."""
    given = np.random.default_rng().random((16, 16, 3), np.float32)
    np.testing.assert_array_equal(levels(given, "image", (16, 16), "RGB"), given)
    hole = np.zeros((16, 16), bool)
    expected = VaeImageProcessor().preprocess(given, 16, 16)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(cut_out(given, hole, 16, 16)[0], expected, atol=1e-6)


@pytest.mark.parametrize("deep", [False, True])
def test_files(colours: np.ndarray, tmp_path: Path, deep: bool) -> None:
    array = grey(colours)
    for suffix in ("png", "tiff"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(array.astype(np.uint16) * 257 if deep else array).save(path)
        for given in (path, str(path)):
            np.testing.assert_array_equal(
                levels(given, "image", OTHER, "RGB"), levels(array, "image", OTHER, "RGB")
            )


def test_a_photograph_is_turned_upright(colours: np.ndarray, tmp_path: Path) -> None:
    image, sideways = Image.fromarray(colours), Image.Exif()
    sideways[0x0112] = 6  # orientation: a quarter turn clockwise brings it up
    image.save(tmp_path / "a.png", exif=sideways)
    expected = levels(image.transpose(Image.Transpose.ROTATE_270), "image", OTHER, "RGB")
    np.testing.assert_array_equal(levels(tmp_path / "a.png", "image", OTHER, "RGB"), expected)


@pytest.mark.parametrize("top", [1, 200, 255, 40_000])
@pytest.mark.parametrize("kind", ["u2", "i2", "i4", "u4", "i8", "f2", "f4", "f8"])
def test_the_order_of_bytes_does_not_matter(kind: str, top: int) -> None:
    """Nor does how bright it is to the range of 16 bits."""
    array = np.random.default_rng().integers(0, top, SIZE[::-1], endpoint=True)
    array[0, 0] = top
    array = array / top if kind[0] == "f" else array.clip(0, np.iinfo(kind).max)
    little, big = (levels(array.astype(order + kind), "image", SIZE, "RGB") for order in "<>")
    np.testing.assert_array_equal(little, big)
    if kind == "u2":
        np.testing.assert_array_equal(little[..., 0], (array / 65535).astype(np.float32))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_dark_pictures_of_16_bits(mode: str, tmp_path: Path) -> None:
    dark = np.random.default_rng().integers(0, 200, SIZE[::-1])
    order = ">" if mode == "I;16B" else "<"
    image = Image.frombytes(mode, SIZE, dark.astype(f"{order}u2").tobytes())
    given: list[Any] = [image]
    if mode != "I;16L":  # which no file has
        image.save(tmp_path / "a.tiff")
        given.append(tmp_path / "a.tiff")
    for each in given:
        found = levels(each, "image", SIZE, "RGB")
        np.testing.assert_array_equal(found[..., 0], (dark / 65535).astype(np.float32))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "is NoneType: expected a PIL image"),
        (5, "is int"),
        (b"x", "is bytes"),
        ([[["x"]]], "is list"),
        ([[1, 2], [3]], "is list"),
        (np.zeros((4, 4), complex), "is complex128 (4, 4): expected a PIL image, an array"),
        (np.zeros((4, 4), object), "is object (4, 4)"),
        (np.zeros((3, 4, 5), np.uint8), "is uint8 (3, 4, 5): expected (height, width, 3)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "is uint8 (1, 4, 4, 3)"),
        (np.zeros((0, 4), np.uint8), "is uint8 (0, 4, 1)"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (np.full((4, 4), 1.5), "has levels from 1.5 to 1.5, as float64: expected 0 to 1; scale or clip them"),
        (np.full((4, 4), 255.0), "has levels from 255 to 255"),
        (np.full((4, 4), -0.5, np.float32), "has levels from -0.5 to -0.5, as float32: expected 0 to 1"),
        (np.array([[0.5, np.nan]]), "has NaN, as float64"),
        (np.array([[0.5, np.inf]]), "has levels from 0.5 to inf"),
        (np.full((4, 4), -1), "has levels from -1 to -1, as int64"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "has levels from -1 to -1, as int32"),
        (Image.fromarray(np.full((4, 4), 1.02, np.float32)), "has levels from 1.02 to 1.02, as float32"),
        (Image.fromarray(np.full((4, 4), 1e6, np.float32)), "has levels from 1e+06 to 1e+06"),
        ("no\x1b[31m\n\udcff.png", r"no\x1b[31m\n\udcff.png cannot be read: No such file"),
        ("none.png", "none.png cannot be read: No such file or directory"),
        ("\0", "is damaged or of a kind that cannot be read (ValueError: embedded null byte)"),
        ("x" * 300, "cannot be read: File name too long"),
        ("/dev/zero", "/dev/zero cannot be read: a device, not a file"),
        ("/", "/ cannot be read: Is a directory"),
        (torch.zeros(4, 4, requires_grad=True), "(RuntimeError: "),
    ],
    ids=str.split(
        "none int bytes text ragged complex object channels-first batch empty no-pixels beyond of-255 negative "
        "nan inf negative-int negative-I overshoot-F huge-F steering missing nul long zero folder grad"
    ),
)  # fmt: skip
def test_what_is_no_picture(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        levels(given, "image", (8, 8), "RGB")
    assert str(caught.value).startswith("image ") and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    for name, what in (("a.png", "a pipe"), ("b.png", "a device")):
        with pytest.raises(ConfigError, match=f"{name} cannot be read: {what}, not a file"):
            levels(tmp_path / name, "image", (8, 8), "RGB")


def test_what_is_no_file_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape would rewind, and who writes into a pipe would see a reader come and go."""
    os.mkfifo(tmp_path / "a.png")
    monkeypatch.setattr("rt.json_file.os.open", lambda *_: pytest.fail("opened"))
    with pytest.raises(ConfigError, match="cannot be read: a pipe, not a file"):
        levels(tmp_path / "a.png", "image", (8, 8), "RGB")


def test_no_program_is_started_to_read_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(ConfigError, match="is no picture of a usual kind"):
        levels(tmp_path / "a.png", "image", (8, 8), "RGB")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff", "bmp", "gif", "ppm"])
def test_damaged_files_are_refused_or_read(colours: np.ndarray, tmp_path: Path, suffix: str) -> None:
    """Cut off, with wrong bytes anywhere, and with wrong bytes at the start, where EXIF and sizes are."""
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    Image.fromarray(colours).save(
        path, **({"exif": exif} if suffix in ("png", "jpg", "webp", "avif") else {})
    )
    sound, rng, refused = path.read_bytes(), random.Random(), 0
    for _ in range(150):
        data = bytearray(sound)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        else:
            end = len(data) if rng.random() < 0.5 else min(200, len(data))
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            levels(path, "image", (8, 8), "RGB")
        except ConfigError as error:
            assert str(error).startswith("image ") and "\n" not in str(error)
            refused += 1
    assert refused
