"""Where a backend keeps what it compiled of a bundle while loading it.

    BUNDLE/cache/<backend>/                 beside the bundle's own files; or, where nobody may write there,
    $XDG_CACHE_HOME/rt/<backend>/           (~/.cache/rt/…)
        <program>-<key>/                    what was compiled of one program
        <name>                              what all of them share

All of it may be deleted. Processes never see half of a folder: one is filled under another name, and takes its own when
it is whole; of two that compile the same at once, the first one's stays.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rt.errors import BackendError

CACHE = "cache"
"""The folder of a bundle that is not listed in its manifest."""


def user_cache() -> Path:
    """The folder of rt where the user keeps caches.

    https://specifications.freedesktop.org/basedir-spec/latest/
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rt"


@contextmanager
def compiled(graph: Path, backend: str, *, key: tuple[object, ...], shared: str) -> Iterator[Path]:
    """A folder for a library to read what it compiled of `graph` from, or else to write it into; empty at first.

    Args:
        graph: In the folder of a bundle that has its weights, too.
        backend: Whose.
        key: What the compiled code is good for: versions, the GPU.
        shared: Pattern of files in it that other programs profit from: they get copies of the newest ones.

    Raises:
        BackendError: What is there cannot be loaded, with what to do; or nothing can be written anywhere.
    """
    name = f"{graph.stem}-{_digest(graph, key)}"
    roots = [base / backend for base in (graph.absolute().parents[1] / CACHE, user_cache())]
    for root in roots:
        if (root / name).is_dir():
            try:
                yield root / name
            except BackendError as error:
                raise BackendError(
                    f"{error}; what was compiled before is in {root / name}: delete it and try again"
                ) from error
            return
    with ExitStack() as holding:
        root, filling = _new(roots, name)
        holding.callback(shutil.rmtree, filling, ignore_errors=True)
        for file in root.glob(shared):
            shutil.copy2(file, filling)
        yield filling
        with suppress(OSError):  # a full disk, or another process was faster: the library has it in memory
            for file in filling.glob(shared):
                copy = filling.with_name(f"{filling.name}.{file.name}")
                holding.callback(copy.unlink, missing_ok=True)
                shutil.copy2(file, copy)
                copy.replace(root / file.name)
            filling.rename(root / name)


def _new(roots: Sequence[Path], name: str) -> tuple[Path, Path]:
    """The first of these that can be written to, and a new folder in it."""
    reasons = []
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
            filling = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
            filling.chmod(0o755)
            return root, filling
        except OSError as error:
            reasons.append(f"{root}: {error.strerror}")
    raise BackendError(
        f"there is no place for what is compiled of {name} ({'; '.join(reasons)}); set XDG_CACHE_HOME to a folder that "
        f"can be written to"
    )


def _digest(graph: Path, key: tuple[object, ...]) -> str:
    """Of the graph and of which files its weights are, which libraries do not look at, and of `key`.

    Hashing the weights would take longer than loading what was compiled; as it is, a copy of a bundle compiles anew,
    unless it was copied with its times.
    """
    digest = hashlib.sha256(graph.read_bytes())
    for weights in sorted(graph.parent.glob("*.weights")):
        state = weights.stat()
        digest.update(repr((weights.name, state.st_size, state.st_mtime_ns)).encode())
    digest.update(repr(key).encode())
    return digest.hexdigest()[:16]
