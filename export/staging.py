"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from rt.bundle import FORMAT, MANIFEST
from rt.errors import BuildError


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """A new sibling of `target` to write into; it takes the target's name when the block ends well.

    On any error, Ctrl-C included, the sibling is removed. One that a killed build left is removed by the
    next build of the same target. With `force` an existing bundle gives way at the last moment.

    Raises:
        BuildError: When the target exists, or the disk refuses.
    """
    target = Path(os.path.abspath(target))
    try:
        check_free(target, force=force)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target)
        stage = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        stage.chmod(0o755)
    except OSError as error:
        raise BuildError(
            f"cannot make {target}: {error.filename}: {error.strerror}; choose another -o"
        ) from None
    try:
        with _locked(stage):
            yield stage
            _sync(stage)
            _swap(stage, target, force=force)
    except OSError as error:
        raise BuildError(_explain(error, target)) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_free(target: Path, *, force: bool) -> None:
    """Raise `BuildError` when a bundle cannot be written to `target`; `staged` asks it, too."""
    if not os.path.lexists(target):
        return
    if not force:
        raise BuildError(f"{target} exists; choose another -o or replace it with --force")
    # Other programs write a manifest.json, too; a damaged one of ours still says whose it is.
    manifest = target / MANIFEST
    is_bundle = manifest.is_file() and FORMAT.encode() in manifest.read_bytes()
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.is_symlink() or not (is_bundle or is_empty):
        raise BuildError(
            f"{target} exists and is not a bundle; --force replaces bundles only, choose another -o"
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.building-"


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _clear_abandoned(target: Path) -> None:
    """Remove siblings whose builder is gone, and give a target back that a killed `_swap` had moved aside."""
    for sibling in target.parent.glob(f"{escape(_prefix(target))}*"):
        with suppress(OSError), _locked(sibling):
            shutil.rmtree(sibling, ignore_errors=True)
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a stage; the system releases it however the builder ends.

    Raises:
        BlockingIOError: When a living builder holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(stage: Path, target: Path, *, force: bool) -> None:
    """Rename onto the target; what was there moves aside first, since a rename needs an empty place."""
    check_free(target, force=force)  # another build may have been faster
    if target.exists():
        aside = _aside(target)
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
    """Whether it was the bundle that could not be written, or something that it is made from."""
    name = str(error.filename or target)
    if not name.startswith(str(target.parent)):
        return f"{name} could not be read: {error.strerror or error}; nothing was left behind"
    free = shutil.disk_usage(target.parent).free / 2**30
    return f"{target} could not be written: {error.strerror or error} ({free:.1f} GiB free); nothing was left behind"
