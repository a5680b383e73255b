"""The engines of one bundle, loaded when first needed, their files hashed just before."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rt.backends import AUTO, Backend, DeviceBackend, DeviceEngine, Engine, choose, cpu_count
from rt.backends.views import HostSide
from rt.bundle import Bundle, EngineRecord
from rt.cuda import Device, Stream
from rt.errors import BackendError, BundleError, ConfigError, IncompatibleBundleError, shown
from rt.kernel_image import KernelImage
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

    @classmethod
    def open(cls, backend: DeviceBackend) -> Place:
        """On the backend's device.

        Raises:
            BackendUnavailableError: There is none.
        """
        device = backend.open_device()
        return cls(device, device.create_stream())

    def close(self) -> None:
        """Give both back."""
        self.device.activate()
        with ExitStack() as closing:  # from the last one to the first, past those that fail
            closing.callback(self.device.close)
            closing.callback(self.device.destroy_stream, self.stream)


class Engines:
    """Loads each engine at most once.

    Args:
        bundle: Where the files are.
        backend: Name of a backend, or "auto": the bundle's own, or the next best with which it runs here. That is seen
            by loading one program, where programs were compiled for machines like that of the build.
        threads: Processors to use; as `rt.processors.cpu_count` when None.

    Raises:
        BackendUnavailableError, ConfigError: As `rt.backends.choose`; or the backend's device is not there.
        IntegrityError, MemoryError: Loading that program.

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
        self._bundle = bundle
        self._threads = int(threads or cpu_count())
        self._calls = Calls(self)
        self._verified: set[str] = set()
        self._loaded: dict[str, Engine] = {}
        self.place: Place | None = None
        manifest, config = bundle.manifest, bundle.manifest.config

        def unfit(candidate: Backend) -> str:
            return manifest.unfit(candidate) or (self._try(candidate) if backend == AUTO else "")

        self.backend, self.reason = choose(backend, config.dtype, preferred=config.backend, unfit=unfit)
        # Where it is not the engine that the bundle was measured with, the user should know.
        unexpected = backend == AUTO and self.backend.name != config.backend
        logger.log(logging.WARNING if unexpected else logging.INFO, "%s", self.reason)
        if self.place is None and isinstance(self.backend, DeviceBackend):
            self.place = Place.open(self.backend)
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
        self._verify(missing, self.backend)
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
                self.place.device.activate()
                closing.callback(self.place.close)
            for engine in self._loaded.values():
                if isinstance(engine, HostSide):
                    closing.callback(engine.close)
            self._loaded.clear()
            self.place = None

    def _lose(self) -> None:
        # At the fork: what the child loads itself is its own.
        self.forked = self.place is not None or bool(self._loaded)

    def _try(self, candidate: Backend) -> str:
        """Why the programs do not run here with `candidate`, or "" where one of them loads, which then stays loaded."""
        record = min(self._bundle.manifest.engines, key=lambda each: self._size(each, candidate))
        on_device = isinstance(candidate, DeviceBackend)
        if not (on_device or record.fastest(candidate).is_compiled):
            return ""
        place = None
        with ExitStack() as undo:
            try:
                if isinstance(candidate, DeviceBackend):
                    place = Place.open(candidate)
                    undo.callback(place.close)
                    if reason := _lacks_kernels(self._bundle.manifest.kernels, place.device):
                        return reason
                self._verify([record], candidate)
                self._loaded[record.name] = self._open(record, candidate, place)
            except (BackendError, IncompatibleBundleError) as error:
                return str(error)
            self.place = place
            undo.pop_all()
        return ""

    def _size(self, record: EngineRecord, backend: Backend) -> int:
        return sum(self._bundle.manifest.files[name].size_bytes for name in record.files(backend))

    def _verify(self, records: Iterable[EngineRecord], backend: Backend) -> None:
        files = {name for record in records for name in record.files(backend)} - self._verified
        self._bundle.verify(files)
        self._verified |= files

    def _keep(self, record: EngineRecord) -> None:
        self._loaded[record.name] = self._open(record, self.backend, self.place)

    def _open(self, record: EngineRecord, backend: Backend, place: Place | None) -> Engine:
        path = self._bundle.path / record.form(backend)
        if place is not None and isinstance(backend, DeviceBackend):
            place.device.activate()  # in the thread of the pool
            engine = backend.load_on(place.device, path, record.inputs, record.outputs, dtype=record.dtype)
            return HostSide(engine, place.device, place.stream)
        return backend.load(path, record.inputs, record.outputs, dtype=record.dtype, threads=self._threads)

    def _find(self, key: EngineKey) -> EngineRecord:
        for record in self._bundle.manifest.engines:
            if (record.component, record.profile, record.guided) == key:
                return record
        component, profile, _ = key
        raise BundleError(
            f"{self._bundle.path} has no engine for {component.value} at {profile}; build it again"
        )


def _lacks_kernels(images: Sequence[KernelImage], device: Device) -> str:
    """Why the loop has no kernels on `device`, or "" where it has."""
    runs = {image.kernel for image in images if image.runs_on(device.capability)}
    if images and runs == {image.kernel for image in images}:
        return ""
    there = ", ".join(str(each) for each in sorted({image.capability for image in images})) or "none"
    return (
        f"the loop's kernels are for compute capability {there}, and {device.name} has {device.capability}; "
        f"build it again for this GPU"
    )
