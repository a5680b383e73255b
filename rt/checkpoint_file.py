"""The small files of a checkpoint, JSON and text, within the bounds of `rt.json_file`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rt.errors import CheckpointError
from rt.json_file import parse_json, read_bounded

LFS_POINTER = b"version https://git-lfs"
"""How what git leaves begins where a large file would be."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: Something else is there; says what.
    """
    try:
        data = parse_json(read_bytes(path))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}): the file is damaged, download it again"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def read_bytes(path: Path) -> bytes:
    """All of `path`.

    Raises:
        CheckpointError: It is missing, no plain file, too large, unreadable or a git-lfs pointer; says which.
    """
    try:
        raw = read_bounded(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if raw.startswith(LFS_POINTER):
        raise lfs_error(path)
    return raw


def lfs_error(path: Path) -> CheckpointError:
    """The refusal of a git-lfs pointer."""
    return CheckpointError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` in its folder")
