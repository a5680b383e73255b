"""The engines of one bundle, loaded when first needed, their files hashed just before."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from rt.backends import AUTO, DeviceBackend, DeviceEngine, Engine, choose, cpu_count
from rt.backends.views import HostSide
from rt.bundle import Bundle, EngineRecord
from rt.cuda import Device, Stream
from rt.errors import BundleError, ConfigError, shown
from rt.model import Component
from rt.process import Calls, in_threads, on_fork
from rt.shapes import ShapeProfile
from rt.whole import is_whole

logger = logging.getLogger(__name__)

MOST_THREADS = 1024
"""More than most machines have processors; the libraries would die of as many threads as somebody may ask for."""

EngineKey = tuple[Component, ShapeProfile | None, bool]
"""What is run, at which shape (None for text), and whether with guidance (U-Net only)."""


@dataclass(frozen=True)
class Place:
    """Where engines of a device run, all in the order of one stream."""

    device: Device
    stream: Stream


class Engines:
    """Loads each engine at most once.

    Args:
        bundle: Where the files are.
        backend: Name of a backend, or "auto".
        threads: Processors to use; as `rt.processors.cpu_count` when None.

    Raises:
        BackendUnavailableError, ConfigError: As `rt.backends.choose`; or the backend's device is not there.

    Attributes:
        backend: That runs them.
        reason: Why it is this one.
        place: Where they run when it is not the host.
        forked: Whether this process was forked since something was loaded, which then neither runs nor can be given
            back.
    """

    def __init__(self, bundle: Bundle, backend: str = AUTO, threads: int | None = None) -> None:
        if threads is not None and not (is_whole(threads) and 1 <= threads <= MOST_THREADS):
            raise ConfigError(
                f"threads is {shown(threads)}; it must be a whole number from 1 to {MOST_THREADS}, or None for all "
                f"processors"
            )
        config = bundle.manifest.config
        self.backend, self.reason = choose(
            backend, config.dtype, preferred=config.backend, unfit=bundle.manifest.unfit
        )
        # Where it is not the engine that the bundle was measured with, the user should know.
        unexpected = backend == AUTO and self.backend.name != config.backend
        logger.log(logging.WARNING if unexpected else logging.INFO, "%s", self.reason)
        self.place: Place | None = None
        if isinstance(self.backend, DeviceBackend):
            device = self.backend.open_device()
            self.place = Place(device, device.create_stream())
        self._bundle = bundle
        self._threads = int(threads or cpu_count())
        self._calls = Calls(self)
        self._verified: set[str] = set()
        self._loaded: dict[str, Engine] = {}
        self.forked = False
        on_fork(self, Engines._lose)

    def activate(self) -> None:
        """Make this thread ready to use them.

        Raises:
            BackendError: In a process that was forked since.
        """
        if self.forked:
            self._calls.check()
        if self.place is not None:
            self.place.device.activate()

    def load(self, keys: Iterable[EngineKey]) -> None:
        """Load what is not loaded yet, several at a time: compiling leaves processors idle.

        Where one fails, those that did load are kept: `close` gives them back, and another `load` goes on from there.

        Raises:
            IntegrityError: When a file has changed.
            BundleError: When the bundle has no such engine.
        """
        wanted = {record.name: record for record in map(self._find, keys)}
        missing = [record for name, record in wanted.items() if name not in self._loaded]
        files = {name for record in missing for name in record.files(self.backend)} - self._verified
        self._bundle.verify(files)
        self._verified |= files
        in_threads(self._keep, missing, self._threads)

    def get(
        self, component: Component, profile: ShapeProfile | None = None, *, guided: bool = False
    ) -> Engine:
        """The engine of `component` for `profile`, loaded if need be; raises as `load`."""
        key = (component, profile, guided)
        name = self._find(key).name
        if name not in self._loaded:
            self.load([key])
        return self._loaded[name]

    def on_device(
        self, component: Component, profile: ShapeProfile | None = None, *, guided: bool = False
    ) -> DeviceEngine:
        """As `get`, with its buffers on the device.

        Raises:
            ConfigError: The backend runs on the host.
        """
        engine = self.get(component, profile, guided=guided)
        if not isinstance(engine, HostSide):
            raise ConfigError(
                f"{self.backend.name} runs on the host; use a backend of a GPU for a loop there"
            )
        return engine.engine

    def close(self) -> None:
        """Give engines and device back; without a device, nothing needs it, and in a forked process nothing can."""
        if self.forked:
            return
        with ExitStack() as closing:  # from the last one to the first, past those that fail
            if self.place is not None:
                device, stream = self.place.device, self.place.stream
                device.activate()
                closing.callback(device.close)
                closing.callback(device.destroy_stream, stream)
            for engine in self._loaded.values():
                if isinstance(engine, HostSide):
                    closing.callback(engine.close)
            self._loaded.clear()
            self.place = None

    def _lose(self) -> None:
        # At the fork: what the child loads itself is its own.
        self.forked = self.place is not None or bool(self._loaded)

    def _keep(self, record: EngineRecord) -> None:
        self._loaded[record.name] = self._open(record)

    def _open(self, record: EngineRecord) -> Engine:
        path = self._bundle.path / record.form(self.backend)
        if self.place is not None and isinstance(self.backend, DeviceBackend):
            device, stream = self.place.device, self.place.stream
            device.activate()  # in the thread of the pool
            engine = self.backend.load_on(device, path, record.inputs, record.outputs, dtype=record.dtype)
            return HostSide(engine, device, stream)
        return self.backend.load(
            path, record.inputs, record.outputs, dtype=record.dtype, threads=self._threads
        )

    def _find(self, key: EngineKey) -> EngineRecord:
        for record in self._bundle.manifest.engines:
            if (record.component, record.profile, record.guided) == key:
                return record
        component, profile, _ = key
        raise BundleError(
            f"{self._bundle.path} has no engine for {component.value} at {profile}; build it again"
        )
