"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rt.errors import BuildError

_LOCK = ".building"


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """A new sibling of `target` to write into; it takes the target's name when the block ends well.

    On any error, Ctrl-C included, the sibling is removed. One that a killed build left is removed by the
    next build of the same target. With `force` an existing bundle gives way at the last moment.

    Raises:
        BuildError: When the target exists, or the disk refuses.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not force:
        raise BuildError(f"{target} exists; choose another -o or replace it with --force")
    if target.exists() and not _replaceable(target):
        raise BuildError(
            f"{target} exists and is not a bundle; --force replaces bundles only, choose another -o"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        stage = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        stage.chmod(0o755)
    except OSError as error:
        raise BuildError(f"cannot write next to {target}: {error.strerror}") from None
    try:
        with (stage / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield stage
            (stage / _LOCK).unlink()
            _sync(stage)
            _swap(stage, target)
    except OSError as error:
        raise BuildError(_explain(error, target)) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replaceable(target: Path) -> bool:
    return (target / "manifest.json").is_file() or (target.is_dir() and not any(target.iterdir()))


def _prefix(target: Path) -> str:
    return f".{target.name}.building-"


def _remove_abandoned(target: Path) -> None:
    """Remove siblings whose builder is gone: a living one holds its lock."""
    for sibling in target.parent.glob(f"{_prefix(target)}*"):
        try:
            with (sibling / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(sibling, ignore_errors=True)
        except OSError:
            continue


def _sync(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(stage: Path, target: Path) -> None:
    """Rename onto the target; what was there moves aside first, since a rename needs an empty place."""
    if target.exists():
        aside = stage.with_name(f"{stage.name}.old")
        target.rename(aside)
        try:
            stage.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        stage.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, target: Path) -> str:
    free = shutil.disk_usage(target.parent).free / 2**30
    return f"{target} could not be written: {error.strerror or error} ({free:.1f} GiB free); nothing was left behind"
