"""`rt.engines`: what is kept when something fails, and given back."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from rt.backends import BACKENDS, Form, openvino_cpu
from rt.backends.ort_cpu import OnnxRuntime
from rt.backends.views import DeviceSide
from rt.bundle import Bundle
from rt.config import DType
from rt.cuda.host import HostDevice
from rt.engines import EngineKey, Engines
from rt.errors import BackendError, ConfigError
from rt.pipeline import Pipeline
from rt.shapes import TensorSpec


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
