"""JSON that somebody else wrote: read within bounds of kind, size and depth, whatever the path leads to."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

LIMIT = 16 << 20
"""Bytes of the largest file that is read: four times CLIP's `tokenizer.json`, and Python makes 0.5 GB of the worst."""
MAX_DEPTH = 64
"""Objects and lists inside each other: ten times what any config has, far from what a recursion can bear."""
MAX_DIGITS = 1000
"""Of a whole number: reading one takes the square of its digits."""

_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def read_bounded(path: Path, *, limit: int = LIMIT) -> bytes:
    """The bytes of a plain file, or of one that a link leads to; never waits and never reads more than `limit`.

    Raises:
        OSError: It is missing, no plain file, too large or unreadable; `strerror` says which in a few words.
    """
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_large(path, limit)
        raw = file.read(limit + 1)
    if len(raw) > limit:  # it grew, or is of /proc, where sizes are 0
        raise _too_large(path, limit)
    return raw


def open_plain(path: Path) -> BinaryIO:
    """A plain file, or one that a link leads to, open to be read; never waits.

    Raises:
        OSError: It is missing, no plain file or unreadable; `strerror` says which in a few words.
    """
    _check_kind(path, os.stat(path))  # before it is opened, which a tape or a pipe would notice
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 the caller's
    try:
        _check_kind(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def parse_json(raw: bytes, *, make_object: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """The value of a JSON text in UTF-8; `make_object` gets the names and values of each object in it.

    With the usual one the last value counts of a name that is there twice, as in `json.loads`.

    Beyond JSON, Infinity is read: diffusers writes it into the configs of DPM-Solver.

    Raises:
        ValueError: It is no JSON, or holds what no float, encoding or recursion can bear; says so in few words.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    if "\0" in text:  # UTF-16 without its mark: ASCII is UTF-8 then, with zeros
        raise ValueError("not UTF-8 text")
    strings_cut = b"".join(_ESCAPED.sub(b"", raw).split(b'"')[::2])
    brackets = strings_cut.translate(None, delete=_NOT_BRACKETS)
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    value = json.loads(
        text, parse_int=_whole, parse_float=_finite, parse_constant=_constant, object_pairs_hook=make_object
    )
    if rb"\ud" in raw.lower():  # halves of a pair alone can be neither printed nor written
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text with half a character (an unpaired surrogate)") from None
    return value


def _check_kind(path: Path, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise OSError(errno.EINVAL, f"{name}, not a file", str(path))


def _too_large(path: Path, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is more than a float can hold")
    return value


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no JSON")
    return float(text)
