"""The engines of one bundle, loaded when first needed, their files hashed just before."""

from __future__ import annotations

from rt.backends import AUTO, Engine, choose, cpu_count
from rt.bundle import Bundle, EngineRecord
from rt.errors import BundleError
from rt.model import Component
from rt.shapes import ShapeProfile


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
        config = bundle.manifest.config
        self.backend, self.reason = choose(backend, config.dtype, preferred=config.backend)
        self._bundle = bundle
        self._threads = threads or cpu_count()
        self._verified: set[str] = set()
        self._loaded: dict[str, Engine] = {}

    def get(self, component: Component, profile: ShapeProfile | None = None, *, guided: bool = False) -> Engine:
        """The engine of `component` for `profile`.

        Raises:
            IntegrityError: When one of its files has changed.
            BundleError: When the bundle has no such engine.
        """
        record = self._find(component, profile, guided)
        if record.name not in self._loaded:
            files = {record.file, record.weights} - self._verified
            self._bundle.verify(files)
            self._verified |= files
            self._loaded[record.name] = self.backend.load(
                self._bundle.path / record.file,
                record.inputs,
                record.outputs,
                dtype=self._bundle.manifest.config.dtype,
                threads=self._threads,
            )
        return self._loaded[record.name]

    def _find(self, component: Component, profile: ShapeProfile | None, guided: bool) -> EngineRecord:
        for record in self._bundle.manifest.engines:
            if (record.component, record.profile, record.guided) == (component, profile, guided):
                return record
        raise BundleError(f"{self._bundle.path} has no engine for {component.value} at {profile}; build it again")
