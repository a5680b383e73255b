"""The engines of one bundle, loaded when first needed, their files hashed just before."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from rt.backends import AUTO, Engine, choose, cpu_count
from rt.bundle import Bundle, EngineRecord
from rt.errors import BundleError, ConfigError
from rt.model import Component
from rt.shapes import ShapeProfile

logger = logging.getLogger(__name__)

EngineKey = tuple[Component, ShapeProfile | None, bool]
"""What is run, at which shape (None for text), and whether with guidance (U-Net only)."""


class Engines:
    """Loads each engine at most once.

    Args:
        bundle: Where the files are.
        backend: Name of a backend, or "auto".
        threads: Processors to use; all that the process may use when None.

    Raises:
        BackendUnavailableError, ConfigError: As `rt.backends.choose`.
    """

    def __init__(self, bundle: Bundle, backend: str = AUTO, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1, or None for all processors")
        config = bundle.manifest.config
        self.backend, self.reason = choose(
            backend, config.dtype, preferred=config.backend, unfit=bundle.manifest.unfit
        )
        logger.info("%s", self.reason)
        self._bundle = bundle
        self._threads = threads or cpu_count()
        self._verified: set[str] = set()
        self._loaded: dict[str, Engine] = {}

    def load(self, keys: Iterable[EngineKey]) -> None:
        """Load what is not loaded yet, several at a time: compiling leaves processors idle.

        Raises:
            IntegrityError: When a file has changed.
            BundleError: When the bundle has no such engine.
        """
        missing = [record for record in map(self._find, keys) if record.name not in self._loaded]
        files = {
            name for record in missing for name in (record.form(self.backend), record.weights)
        } - self._verified
        self._bundle.verify(files)
        self._verified |= files
        with ThreadPoolExecutor() as pool:
            self._loaded.update(
                zip((record.name for record in missing), pool.map(self._open, missing), strict=True)
            )

    def get(
        self, component: Component, profile: ShapeProfile | None = None, *, guided: bool = False
    ) -> Engine:
        """The engine of `component` for `profile`, loaded if need be; raises as `load`."""
        key = (component, profile, guided)
        name = self._find(key).name
        if name not in self._loaded:
            self.load([key])
        return self._loaded[name]

    def _open(self, record: EngineRecord) -> Engine:
        return self.backend.load(
            self._bundle.path / record.form(self.backend),
            record.inputs,
            record.outputs,
            dtype=record.dtype,
            threads=self._threads,
        )

    def _find(self, key: EngineKey) -> EngineRecord:
        for record in self._bundle.manifest.engines:
            if (record.component, record.profile, record.guided) == key:
                return record
        component, profile, _ = key
        raise BundleError(
            f"{self._bundle.path} has no engine for {component.value} at {profile}; build it again"
        )
