"""Folders that are made once and kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def make_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` unless it is there; one that `write` did not finish never gets its name."""
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(folder)
    return folder
