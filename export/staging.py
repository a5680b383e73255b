"""A directory that appears whole or not at all, however many builds of it run.

Builds of one target lock the folder that it is in while they change names there, and each its own stage while it
lives: the system releases both however a builder ends. A target that is replaced changes places with its stage in one
step where the file system can (https://man7.org/linux/man-pages/man2/rename.2.html), so that it is there at any time.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

from rt.bundle import FORMAT, MANIFEST
from rt.errors import BuildError

_PATIENCE = 60.0
"""Seconds for another build to change names."""
_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """A new sibling of `target` to write into; it takes the target's name when the block ends well.

    On any error, Ctrl-C included, the sibling is removed. One that a killed build left is removed by the
    next build of the same target. With `force` an existing bundle gives way at the last moment.

    Raises:
        BuildError: When the target exists, or the disk refuses.
    """
    target = Path(os.path.abspath(target))
    with ExitStack() as holding:
        try:
            check_free(target, force=force)
            target.parent.mkdir(parents=True, exist_ok=True)
            with _names(target.parent):
                _clear_abandoned(target)
                stage = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
                with suppress(OSError):  # without locks, it is nobody else's to remove
                    holding.enter_context(_locked(stage))
                holding.callback(shutil.rmtree, stage, ignore_errors=True)
            stage.chmod(0o755)
        except OSError as error:
            raise BuildError(
                f"cannot make {target}: {error.filename}: {error.strerror}; choose another -o"
            ) from None
        try:
            yield stage
            _sync(stage)
            with _names(target.parent):
                _swap(stage, target, force=force)
        except OSError as error:
            raise BuildError(_explain(error, target)) from error


def check_free(target: Path, *, force: bool) -> None:
    """Raise `BuildError` when a bundle cannot be written to `target`; `staged` asks it, too."""
    if not os.path.lexists(target):
        return
    if not force:
        raise BuildError(f"{target} exists; choose another -o or replace it with --force")
    if target.is_symlink() or not (_is_bundle(target) or _is_empty(target)):
        raise BuildError(
            f"{target} exists and is not a bundle; --force replaces bundles only, choose another -o"
        )


def _is_bundle(target: Path) -> bool:
    # Other programs write a manifest.json, too; a damaged one of ours still says whose it is.
    manifest = target / MANIFEST
    try:
        if not manifest.is_file():
            return False
        with manifest.open("rb") as file:
            return FORMAT.encode() in file.read(4096)
    except OSError:
        return False


def _is_empty(target: Path) -> bool:
    try:
        return target.is_dir() and not any(target.iterdir())
    except OSError:
        return False


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
def _names(folder: Path) -> Iterator[None]:
    """While no other build changes names in `folder`; without that where its file system has no locks.

    Raises:
        BuildError: When another one does for too long.
    """
    end = time.monotonic() + _PATIENCE
    with ExitStack() as holding:
        while True:
            try:
                holding.enter_context(_locked(folder))
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BuildError(f"{folder} is locked by another program; choose another -o") from None
                time.sleep(0.01)
            except OSError:
                break
        yield


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; the system releases it however the builder ends.

    Raises:
        BlockingIOError: When a living builder holds it.
        OSError: There are no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
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
    """Give the stage the name of the target; what was there has the stage's afterwards, or is removed."""
    check_free(target, force=force)  # another build may have been faster
    if not target.exists():
        stage.rename(target)
    elif not _exchange(stage, target):
        # A rename needs an empty place.
        aside = _aside(target)
        target.rename(aside)
        try:
            stage.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Two names change places in one step; False where the system or the file system cannot.

    Raises:
        OSError: It can, and failed.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):  # the last in sandboxes
        return False
    raise OSError(number, os.strerror(number), str(other))


def _explain(error: OSError, target: Path) -> str:
    """Whether it was the bundle that could not be written, or something that it is made from."""
    name = str(error.filename or target)
    if not name.startswith(str(target.parent)):
        return f"{name} could not be read: {error.strerror or error}; nothing was left behind"
    free = shutil.disk_usage(target.parent).free / 2**30
    return f"{target} could not be written: {error.strerror or error} ({free:.1f} GiB free); nothing was left behind"
