"""From decoded pixels to files: 8 bits, names, and what made the picture written into it.

- A1111's text (`parameters` in PNG, EXIF UserComment elsewhere), which most tools of the field read; format:
  AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py.
- The same as exact JSON (`rt`, PNG only).
- XMP that says that the picture is generated, always: IPTC's DigitalSourceType,
  https://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rt.errors import ConfigError, RtError, nearest, shown

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FIELDS = ("seed", "index", "date", "prompt_hash")
DEFAULT_NAME = "{seed}-{index:03d}.png"

XMP = b"""\
<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
   Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""

LONGEST_NAME = 255
"""In bytes, on the file systems that people have."""
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
EXIF_COMMENT_BYTES = 65_000  # an EXIF segment ends at 64 KiB


@dataclass(frozen=True, kw_only=True)
class ImageMetadata:
    """What made a picture.

    Attributes:
        sampler: Its label, as A1111 has it ("DPM++ 2M Karras") or a scheduler's class name.
        model_hash: First 10 hex digits of the SHA-256 of the weights.
        version: Of the program, "rt 0.1.0".
        extra: Further pairs, in this order, before the version; names of words, spaces, "-" and "/".
    """

    prompt: str
    negative_prompt: str
    steps: int
    sampler: str
    guidance_scale: float
    seed: int
    width: int
    height: int
    model: str
    model_hash: str
    version: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def parameters_text(self) -> str:
        """A1111's text: the prompt, `Negative prompt: …` unless empty, and one line of `name: value` pairs.

        The format cannot tell a prompt's own line "Negative prompt: …" from the real one; `to_json` can.
        """
        pairs = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": self.guidance_scale,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_hash,
            "Model": self.model,
            **self.extra,
            "Version": self.version,
        }
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        settings = ", ".join(f"{name}: {_quote(str(value))}" for name, value in pairs.items())
        return "\n".join([self.prompt, *negative, settings])

    def to_json(self) -> str:
        """All attributes by name, as one JSON object."""
        return json.dumps({**vars(self), "extra": dict(self.extra)}, ensure_ascii=False)


def _quote(value: str) -> str:
    """As a JSON string where bare text would end early or lose its edges."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]|^\s|\s$', value) else value


def postprocess(decoded: NDArray[np.float32], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """8-bit pixels from the decoder's: round(255 · clip(x/2 + 1/2, 0, 1)), half to even, as diffusers.

    Args:
        decoded: float32 (H, W, 3) in [-1, 1], finite.
        out: uint8 (H, W, 3), filled and returned.

    Raises:
        ConfigError: `out` is of another shape or type.
    """
    if out is None:
        out = np.empty(decoded.shape, np.uint8)
    elif out.shape != decoded.shape or out.dtype != np.uint8:
        raise ConfigError(f"out is {out.dtype} {out.shape}: expected uint8 {decoded.shape}")
    x = decoded * np.float32(0.5)
    x += np.float32(0.5)
    np.clip(x, 0, 1, out=x)
    x *= np.float32(255)
    np.rint(x, out=out, casting="unsafe")
    return out


def to_pil(image: NDArray[np.uint8]) -> Image.Image:
    """A picture, uint8 (H, W, 3) RGB, for Pillow.

    Raises:
        ConfigError: The array is of another shape or type.
    """
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ConfigError(f"the image is {image.dtype} {image.shape}: expected uint8 (height, width, 3)")
    return Image.fromarray(image)


def save(
    path: Path,
    image: NDArray[np.uint8],
    *,
    metadata: ImageMetadata | None = None,
    overwrite: bool = False,
) -> None:
    """Write a picture, uint8 (H, W, 3) RGB, in the format of the suffix; JPEG and WebP with quality 95.

    The file appears whole or not at all. Without metadata it says only that it is generated.

    Raises:
        ConfigError: Unknown suffix, a file that is there already, or an array that is no picture.
        RtError: The file cannot be written.
    """
    pil_format = _format(path)
    if not overwrite and os.path.lexists(path):
        raise ConfigError(f"{path} exists: choose another name or allow it to be overwritten (--force)")
    picture = to_pil(image)
    temporary = path.with_name(f".rt-{secrets.token_hex(8)}{path.suffix}")
    try:
        with temporary.open("xb") as file:
            picture.save(file, pil_format, **_options(pil_format, metadata))
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise RtError(
            f"cannot write {path}: {reason}; its folder must exist, be writable and have room"
        ) from error
    except ValueError as error:  # Pillow's, of a side that the format has no room for
        raise RtError(f"cannot write {path}: {error}; another format may hold it, such as .png") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        got = f"the suffix {path.suffix!r}" if suffix else "no suffix"
        hint = nearest(suffix, FORMATS) or " (end it with / for a folder)"
        raise ConfigError(f"{str(path)!r} has {got}{hint}: expected one of {', '.join(FORMATS)}")
    return FORMATS[suffix]


def _options(pil_format: str, metadata: ImageMetadata | None) -> dict[str, Any]:
    """What Pillow's writer of the format needs to embed the metadata."""
    from PIL import Image, PngImagePlugin

    if pil_format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", XMP.decode())
        if metadata:
            chunks.add_text("parameters", _unicode(metadata.parameters_text()))
            chunks.add_text("rt", _unicode(metadata.to_json()))
        return {"pnginfo": chunks}

    options: dict[str, Any] = {"quality": 95, "xmp": XMP}
    if metadata:
        comment = _unicode(metadata.parameters_text()).encode("utf-16-be")[:EXIF_COMMENT_BYTES]
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + comment
        options["exif"] = exif
    return options


def _unicode(text: str) -> str:
    """What no file can hold, as from the bytes of a model's name that are no text, becomes an escape."""
    return text.encode(errors="backslashreplace").decode()


class OutputPattern:
    """Where the pictures of a request go.

    Args:
        pattern: A path with any of `{seed}`, `{index}`, `{date}` and `{prompt_hash}`, with format specs as in
            Python ("out/{date:%Y-%m}/{seed}-{index:03d}.png"); or a folder, which exists or ends with "/",
            for files named as `in_folder` says.
        in_folder: The pattern of a file's name in a folder.

    Raises:
        ConfigError: Unknown field, broken braces, a format that does not fit or has no bounds, unknown suffix.
    """

    def __init__(self, pattern: str, in_folder: str = DEFAULT_NAME) -> None:
        is_folder = pattern.endswith("/") or os.path.isdir(pattern)
        self._pattern = pattern
        self._template = os.path.join(pattern, in_folder) if is_folder else pattern
        try:
            fields = [
                (name, spec) for _, name, spec, _ in Formatter().parse(self._template) if name is not None
            ]
        except ValueError as error:
            raise ConfigError(f"{pattern!r} has unbalanced braces: {error}") from error
        names = {name for name, _ in fields}
        for name in sorted(names.difference(FIELDS)):
            valid = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ConfigError(
                f"{pattern!r} has the field {{{name}}}{nearest(name, FIELDS)}: expected {valid}"
            )
        for width in (digits for _, spec in fields for digits in re.findall(r"\d+", spec or "")):
            if len(width.lstrip("0")) > 3 or int(width) > LONGEST_NAME:
                raise ConfigError(
                    f"{shown(pattern)} has a field of width {shown(width)[1:-1]}: "
                    f"expected at most {LONGEST_NAME}, which is how long a name can be"
                )
        self._tells_apart = not names.isdisjoint({"seed", "index"})
        _format(self.path(seed=0, index=0, prompt="", count=1))

    def path(self, *, seed: int, index: int, prompt: str, count: int) -> Path:
        """The file of picture `index`, from 0, of a request for `count` pictures.

        Where neither seed nor index tells several pictures apart, "-{index:03d}" goes before the suffix.

        Raises:
            ConfigError: A format does not fit its field, or this value of it.
        """
        template = self._template
        if count > 1 and not self._tells_apart:
            stem, suffix = os.path.splitext(template)
            template = f"{stem}-{{index:03d}}{suffix}"
        digest = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()
        try:
            name = template.format(seed=seed, index=index, date=date.today(), prompt_hash=digest[:10])
            if b"\0" in os.fsencode(name):
                raise ValueError("it gives a character that no name can have")
        except (LookupError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{self._pattern!r} has a format that does not fit its field: {error}"
            ) from error
        return Path(name)

    def paths(self, seeds: Sequence[int], prompts: Sequence[str]) -> list[Path]:
        """The files of all pictures of a request, one for each.

        Raises:
            ConfigError: As `path`; or two of them are the same file.
        """
        paths: list[Path] = []
        taken: dict[str, int] = {}
        for index, (seed, prompt) in enumerate(zip(seeds, prompts, strict=True)):
            path = self.path(seed=seed, index=index, prompt=prompt, count=len(seeds))
            _format(path)
            first = taken.setdefault(os.path.realpath(path), index)
            if first != index:
                raise ConfigError(
                    f"{path} would be picture {first} and picture {index}: {self._pattern!r} does not tell them "
                    f"apart; put {{index}} into the name"
                )
            paths.append(path)
        return paths
