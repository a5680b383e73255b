"""Whatever a path leads to, reading JSON from it ends soon: with the value, or with a few words."""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import sys
from pathlib import Path

import pytest

from rt.json_file import LIMIT, MAX_DEPTH, parse_json, read_bounded


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.json"


def test_what_python_writes_is_read(path: Path) -> None:
    value = {"a": [1, -2.5, 1e-300, True, None, "é\u2028🦊", {}], "": -math.inf, "b": 10**30}
    for ascii_only in (True, False):
        path.write_text(json.dumps(value, ensure_ascii=ascii_only), encoding="utf-8")
        assert parse_json(read_bounded(path)) == value
    link = path.with_name("link")
    link.symlink_to(path)  # the cache of the hub is made of links
    assert parse_json(read_bounded(link)) == value
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # an editor on Windows
    assert parse_json(read_bounded(path)) == value


@pytest.mark.parametrize("text", ['"' + "[" * 1000 + '"', r'"\"' + "[" * 1000 + r'\\"', "[]," * 1000])
def test_brackets_in_strings_and_beside_each_other_are_not_depth(text: str) -> None:
    value = f"[{text.removesuffix(',')}]"
    assert parse_json(value.encode()) == json.loads(value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[" * 200_000, "nested more than 64 deep"),
        (b"[" * 200_000 + b"]" * 200_000, "nested more than 64 deep"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested more than 64 deep"),
        (b'["\\\\",' + b"[{}," * MAX_DEPTH, "nested more than 64 deep"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b"[1e999]", "1e999 is more than a float can hold"),
        (b"[-" + b"9" * 10**5 + b"]", "a number of 100,001 digits"),
        (b"[0." + b"9" * 10**5 + b"]", "a number of 100,002 digits"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16-le"), "not UTF-8 text"),
        ('{"a": 1}'.encode("utf-32"), "not UTF-8 text"),
        (b'{"\xff": 1}', "not UTF-8 text"),
        (rb'{"a": ["\uD800"]}', "half a character"),
        (rb'{"\udc01": 1}', "half a character"),
        (b"", "Expecting value"),
        (b"\xef\xbb\xbf", "Expecting value"),
        (b"{'a': 1}", "Expecting property name"),
        (b"<html>", "Expecting value"),
        (b'["' + b'\\"' * 10**6, "Unterminated string"),
        (b'"' * 10**6, "Extra data"),
        (b"]" * 10**6, "Expecting value"),
    ],
)
def test_what_is_not_json_is_said_in_a_few_words(raw: bytes, reason: str) -> None:
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(10**6)  # some programs do, and the C stack is no larger for it
        with pytest.raises(ValueError, match=reason) as caught:
            parse_json(raw)
    finally:
        sys.setrecursionlimit(limit)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 100


def test_depth_that_is_allowed_is_read() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def make_hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 << 30)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (Path.mkdir, "Is a directory"),
        (make_pipe, "a pipe, not a file"),
        (make_socket, "a socket, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "No such file or directory"),
        (make_loop, "Too many levels of symbolic links"),
        (make_hole, f"larger than {LIMIT:,} bytes"),
        # The memory of a process: its size is said to be 0, and most of it cannot be read.
        (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
    ],
)
def test_what_is_not_a_file_of_some_size_is_not_read(path: Path, make: object, reason: str) -> None:
    make(path)  # type: ignore[operator]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError) as caught:
        read_bounded(path)
    assert caught.value.strerror == reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_file_that_grows_is_read_no_further_than_the_limit(path: Path) -> None:
    # Of /proc, whose files have size 0: more than the limit comes all the same.
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_bounded(Path("/proc/self/maps"), limit=10)
    path.write_bytes(b"[1,2,3,45]")
    assert read_bounded(path, limit=10) == b"[1,2,3,45]"
