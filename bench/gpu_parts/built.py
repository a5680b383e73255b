"""A bundle in the scratch folder, named by what it depends on: the model, its format, and the commit of rt.

In a dry run it is for the best engine of the CPU, in fp32. All changes that are not committed have one name: remove
`bundles` from the scratch folder after further ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rt.backends import AUTO, choose
from rt.bench.record import commit
from rt.config import BuildConfig, DType
from rt.errors import ConfigError
from rt.pipeline import Pipeline
from rt.shapes import ShapeProfile

_BACKEND = "inductor"
Make = Callable[[Path, BuildConfig], object]
"""Writes a bundle, over one that is there."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A bundle that is there, or is to be built.

    Attributes:
        path: Its folder.
        dtype: Of the build.
        backend: That runs it.
    """

    path: Path
    dtype: DType
    backend: str

    @classmethod
    def at(cls, scratch: Path, name: str, dtype: DType, *, dry: bool) -> Built:
        """That of `name` at this commit."""
        dtype = DType.FP32 if dry else dtype
        name = f"{'dry-' * dry}{name}-{dtype.value}-{commit() or 'no-commit'}"
        return cls(
            path=scratch / "bundles" / name,
            dtype=dtype,
            backend=choose(AUTO, dtype)[0].name if dry else _BACKEND,
        )

    @property
    def seconds(self) -> float:
        """That its build took, with all that was in compilers' caches by then.

        Raises:
            ConfigError: It is not there.
        """
        try:
            seconds: float = json.loads(self._note.read_text())["seconds"]
        except FileNotFoundError:
            raise ConfigError(
                f"there is no bundle {self.path}; run the part that builds it first, with the same --scratch"
            ) from None
        return seconds

    def build(self, profile: ShapeProfile, make: Make, *, max_autotune: bool) -> None:
        """Let `make` write it, unless it is there."""
        if self._note.is_file():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        config = BuildConfig(
            profiles=(profile,), dtype=self.dtype, backend=self.backend, max_autotune=max_autotune
        )
        started = time.perf_counter()
        make(self.path, config)
        self._note.write_text(json.dumps({"seconds": time.perf_counter() - started}) + "\n")

    def open(self) -> Pipeline:
        """Its pipeline.

        Raises:
            ConfigError: It is not there.
        """
        _ = self.seconds
        return Pipeline.from_bundle(self.path, backend=self.backend)

    @property
    def _note(self) -> Path:
        """Beside the bundle; there when it is complete."""
        return self.path.with_name(f"{self.path.name}.json")
