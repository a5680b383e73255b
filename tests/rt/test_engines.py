"""`rt.engines`: what is kept when something fails, and given back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rt.backends import BACKENDS, Form, openvino_cpu
from rt.backends.ort_cpu import OnnxRuntime
from rt.backends.views import DeviceSide
from rt.bundle import Bundle
from rt.config import DType
from rt.cuda.host import HostDevice
from rt.engines import EngineKey, Engines
from rt.errors import BackendError, BackendUnavailableError, ConfigError, IntegrityError
from rt.pipeline import Pipeline
from rt.shapes import TensorSpec

from .device_fakes import SPECS, image


class OnDevice(OnnxRuntime):
    """ONNX Runtime as the backend of a device, which refuses what a test names.

    Attributes:
        refused: Files.
        loaded: Files, in order.
    """

    name = "on-device"

    def __init__(self) -> None:
        super().__init__()
        self.device = HostDevice()
        self.refused: set[str] = set()
        self.loaded: list[str] = []

    def open_device(self) -> HostDevice:
        return self.device

    def load_on(
        self,
        device: HostDevice,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
    ) -> DeviceSide:
        if path.name in self.refused:
            raise BackendError(f"cannot load {path.name}")
        engine = self.load(path, inputs, outputs, dtype=dtype, threads=1)
        self.loaded.append(path.name)
        return Owning(path.stem, engine, device)


class Owning(DeviceSide):
    """With memory of the device, so that it is seen whether that is given back."""

    def __init__(self, name: str, engine: object, device: HostDevice) -> None:
        super().__init__(name, engine, device)  # type: ignore[arg-type]
        self.memory = device.allocate((4,), "float32")
        self.stuck = False

    def close(self) -> None:
        if self.stuck:
            raise BackendError("stuck")
        super().close()
        self._device.free(self.memory)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    made = OnDevice()
    monkeypatch.setitem(BACKENDS, made.name, made)
    return made


def test_what_loaded_is_kept_when_another_fails(demo_bundle: Path, backend: OnDevice) -> None:
    bundle = Bundle.open(demo_bundle)
    records = bundle.manifest.engines
    names = [Path(record.forms[Form.ONNX]).name for record in records]
    keys: list[EngineKey] = [(record.component, record.profile, record.guided) for record in records]
    engines = Engines(bundle, backend.name)
    backend.refused = {names[0], names[3]}
    with pytest.raises(BackendError, match=f"^cannot load {names[0]}$"):
        engines.load(keys)
    assert sorted(backend.loaded) == sorted(set(names) - backend.refused)
    backend.refused, backend.loaded = set(), []
    engines.load([*keys, *keys])
    assert sorted(backend.loaded) == sorted({names[0], names[3]}), "nothing is loaded twice"
    assert backend.device.allocated == 16 * len(names)
    engines.close()
    assert backend.device.in_use == 0


def test_an_engine_that_cannot_be_closed_does_not_keep_the_others(
    demo_bundle: Path, backend: OnDevice
) -> None:
    bundle = Bundle.open(demo_bundle)
    engines = Engines(bundle, backend.name)
    for record in bundle.manifest.engines:
        engine = engines.on_device(record.component, record.profile, guided=record.guided)
        assert isinstance(engine, Owning)
    engine.stuck = True
    with pytest.raises(BackendError, match="stuck"):
        engines.close()
    assert backend.device.allocated == 16, "its own memory alone"
    assert backend.device.calls[-1].name == "close"
    engines.close()


@pytest.mark.parametrize("threads", [0, -1, 10**9, 10**30, 1.5, "2", True])
def test_threads_that_cannot_be_are_refused(demo_bundle: Path, threads: object) -> None:
    with pytest.raises(
        ConfigError, match=r"^threads is .*a whole number from 1 to 1024, or None for all processors$"
    ):
        Engines(Bundle.open(demo_bundle), "onnxruntime", threads)  # type: ignore[arg-type]


def test_another_engine_than_the_bundle_was_measured_with_is_said(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not (Engines(Bundle.open(demo_bundle)), caplog.messages)[1]
    monkeypatch.setattr(openvino_cpu, "lacks_avx2", lambda: True)
    assert Engines(Bundle.open(demo_bundle)).backend.name == "onnxruntime"
    [line] = caplog.messages
    assert line.startswith("onnxruntime: ") and "; not openvino (this processor has no AVX2" in line


def test_engines_of_a_device_are_neither_used_nor_closed_after_a_fork(
    demo_bundle: Path, backend: OnDevice
) -> None:
    pipe = Pipeline.from_bundle(demo_bundle, backend=backend.name)
    child = os.fork()
    if child == 0:  # nothing is loaded, and yet the device is the parent's
        status = 1
        try:
            before = len(backend.device.calls)
            with pytest.raises(BackendError, match="open the bundle after the fork"):
                pipe("a fox")
            pipe.close()
            status = len(backend.device.calls) - before
        finally:
            os._exit(status)
    try:
        status = os.waitpid(child, 0)[1]
    except BaseException:  # the limit of the test
        os.kill(child, signal.SIGKILL)
        raise
    assert status == 0
    pipe.close()
    assert backend.device.calls[-1].name == "close"


# What "auto" does with a bundle that was built for a device


def built_for(bundle: Path, name: str, capability: int = 90) -> Bundle:
    """The demo bundle as a build for that backend leaves it: its kernels are for GPUs from `capability` on."""
    opened = Bundle.open(bundle)
    kernels = tuple(replace(image(spec, "float32"), capability=capability) for spec in SPECS.values())
    config = replace(opened.manifest.config, backend=name)
    return Bundle(opened.path, replace(opened.manifest, config=config, kernels=kernels))


def first(bundle: Bundle) -> str:
    """The file that is tried: that with the least to read."""
    backend, files = BACKENDS["onnxruntime"], bundle.manifest.files
    size = {e.name: sum(files[f].size_bytes for f in e.files(backend)) for e in bundle.manifest.engines}
    return f"{min(size, key=lambda name: size[name])}.onnx"


def test_auto_tries_what_the_bundle_was_built_for_and_keeps_it(
    demo_bundle: Path, backend: OnDevice, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = built_for(demo_bundle, backend.name)
    engines = Engines(bundle)
    assert engines.backend is backend and engines.place is not None and not caplog.messages
    assert backend.loaded == [first(bundle)]
    engines.load((e.component, e.profile, e.guided) for e in bundle.manifest.engines)
    assert len(backend.loaded) == len(set(backend.loaded)) == len(bundle.manifest.engines)
    engines.close()
    assert backend.device.in_use == 0


class Older(HostDevice):
    """A GPU before those that kernels are for."""

    def __init__(self) -> None:
        super().__init__(capability=75)


def of_another_version(backend: OnDevice, bundle: Bundle) -> str:
    backend.refused = {first(bundle)}
    return f"cannot load {first(bundle)}"


def on_an_older_gpu(backend: OnDevice, bundle: Bundle) -> str:
    backend.device = Older()
    return "the loop's kernels are for compute capability 90, and host has 75; build it again for this GPU"


def without_its_device(backend: OnDevice, bundle: Bundle) -> str:
    def missing() -> HostDevice:
        raise BackendUnavailableError("no driver")

    backend.open_device = missing  # type: ignore[method-assign]
    return "no driver"


@pytest.mark.parametrize("change", [of_another_version, on_an_older_gpu, without_its_device])
def test_auto_goes_on_to_the_next_where_the_bundle_does_not_run(
    demo_bundle: Path,
    backend: OnDevice,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[OnDevice, Bundle], str],
) -> None:
    bundle = built_for(demo_bundle, backend.name)
    reason = change(backend, bundle)
    engines = Engines(bundle)
    assert engines.backend.name == "openvino" and engines.place is None
    assert caplog.messages == [f"openvino: computes fp32 graphs in f32; not {backend.name} ({reason})"]
    assert backend.device.in_use == 0
    engines.get(bundle.manifest.engines[0].component)
    engines.close()


def test_what_was_built_for_another_machine_is_said_of_each(
    demo_bundle: Path, backend: OnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built_for(demo_bundle, backend.name)
    reason = of_another_version(backend, bundle)
    monkeypatch.setattr("rt.backends.BACKENDS", {backend.name: backend})
    with pytest.raises(
        BackendUnavailableError, match=rf"^no engine can run fp32 graphs: on-device \({reason}\)$"
    ):
        Engines(bundle)


@pytest.mark.parametrize("error", [MemoryError, IntegrityError])
def test_what_is_no_matter_of_versions_ends_it(
    demo_bundle: Path, backend: OnDevice, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error("2 GiB")

    monkeypatch.setattr(
        *((Bundle, "verify", fail) if error is IntegrityError else (backend, "load_on", fail))
    )
    with pytest.raises(error, match="2 GiB"):
        Engines(built_for(demo_bundle, backend.name))
    assert backend.device.in_use == 0 and backend.device.calls[-1].name == "close"


def test_a_backend_that_is_asked_for_is_not_tried(demo_bundle: Path, backend: OnDevice) -> None:
    bundle = built_for(demo_bundle, backend.name)
    of_another_version(backend, bundle)
    engines = Engines(bundle, backend.name)
    assert backend.loaded == []
    record = next(e for e in bundle.manifest.engines if f"{e.name}.onnx" in backend.refused)
    with pytest.raises(BackendError, match=r"^cannot load"):
        engines.get(record.component, record.profile, guided=record.guided)
    engines.close()


def test_graphs_are_not_tried(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(openvino_cpu.OpenVINO, "load", fail)
    Engines(Bundle.open(demo_bundle)).close()
