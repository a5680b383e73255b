"""What stands where a small file of a checkpoint should be is said in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rt.checkpoint_file import read_bytes, read_json
from rt.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1059962\n"


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "a.json is not JSON (Expecting value: line 1 column 1 (char 0)): the file is damaged"),
        (b"[1]", "a.json holds a JSON list, expected an object"),
        (b"3", "a.json holds a JSON int, expected an object"),
        (b"[" * 200_000, "a.json is not JSON (nested more than 64 deep)"),
    ],
)
def test_other_json_and_none(tmp_path: Path, raw: bytes, problem: str) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "a.json")
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_json, read_bytes])
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "is missing: the checkpoint is incomplete, download it again"),
        (lambda path: path.write_bytes(POINTER), "is a git-lfs pointer, not the file: run `git lfs pull`"),
        (Path.mkdir, "cannot be read: Is a directory"),
        (os.mkfifo, "cannot be read: a pipe, not a file"),
    ],
)
def test_no_such_file(
    tmp_path: Path, read: Callable[[Path], object], make: Callable[[Path], object], problem: str
) -> None:
    make(tmp_path / "a.json")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'} {problem}")
