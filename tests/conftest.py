"""What the whole suite shares: bundles, built once a session; a worker's share of the processors; limits of time."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import itertools
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rt.processors import cpu_count

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import it without rt
# Before torch starts its threads: a worker has its share of the processors, or they wait for each other in busy loops.
os.environ["OMP_NUM_THREADS"] = str(
    max(1, cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)
# A run that was started in the background ignores Ctrl-C, and would hand that on to the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


class Speed:
    """How many times longer work takes here and now than on the machine that the limits of tests were chosen on."""

    REFERENCE_S = 0.042  # of the loop below, on a free core of an AMD EPYC (Zen 5)
    EVERY_S = 30.0  # what else the machine does changes

    def __init__(self) -> None:
        self._slowness, self._measured = 1.0, -self.EVERY_S

    def slowness(self) -> float:
        """At least 1; measured anew now and then, and the worst so far, because load comes and goes."""
        started = time.perf_counter()
        if started - self._measured > self.EVERY_S:
            total = 0
            for i in range(1_000_000):
                total += i
            self._measured = time.perf_counter()
            self._slowness = max(self._slowness, (self._measured - started) / self.REFERENCE_S)
        return self._slowness


SPEED = Speed()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Before pytest-timeout reads the limit of a test: as much longer as this machine is slower."""
    own = item.get_closest_marker("timeout")
    limit = float(own.args[0] if own else item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(limit * SPEED.slowness()), append=False)
    return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with the most slow tests first, alternating those that need shared bundles with those that do not.

    What begins last is short then, and two workers rarely wait for the same bundle.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    sharing = {item.path for item in items if "build_bundle" in getattr(item, "fixturenames", ())}
    files = sorted(dict.fromkeys(item.path for item in items), key=lambda path: -slow[path])
    turns: dict[bool, Iterator[int]] = {True: itertools.count(0, 2), False: itertools.count(1, 2)}
    place = {path: next(turns[path in sharing]) for path in files}
    items.sort(key=lambda item: place[item.path])


def pytest_collection_finish() -> None:
    """What was imported and collected stays; no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def speed() -> Speed:
    """For limits of time that a test sets itself."""
    return SPEED


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The checkpoint of the quick start, a diffusers folder."""
    return ROOT / "examples" / "emoji-ldm"


@pytest.fixture(scope="session")
def build_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`build_bundle(model, dtype="fp32", batch_size=(1,), step_cache=False)`: each is built once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose own folder it is
        folder = folder.parent
    folder = folder / "bundles"
    folder.mkdir(exist_ok=True)

    def build_once(
        model: str | Path, dtype: str = "fp32", batch_size: tuple[int, ...] = (1,), step_cache: bool = False
    ) -> Path:
        from rt.config import BuildConfig, DType
        from rt.export.build import build, default_profiles
        from rt.export.checkpoint import open_checkpoint

        key = (str(model), dtype, batch_size, step_cache)
        path = folder / re.sub(r"\W+", "-", repr(key))
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # a build appears whole
                checkpoint = open_checkpoint(str(model))
                profiles = default_profiles(checkpoint, batch_size=batch_size)
                config = BuildConfig(
                    profiles=profiles, dtype=DType(dtype), backend="openvino", step_cache=step_cache
                )
                build(checkpoint, path, config)
        return path

    return build_once


@pytest.fixture(scope="session")
def demo_bundle(build_bundle: Callable[..., Path], demo_model: Path) -> Path:
    """The demo model in fp32 for one and two pictures at once. Read only; copy it before damaging it."""
    return build_bundle(demo_model, batch_size=(1, 2))


@pytest.fixture(scope="session")
def tiny_bundle(build_bundle: Callable[..., Path]) -> Path:
    """A random model of SD 1.5's shape with few channels, in fp32. Read only."""
    return build_bundle("synthetic:tiny")


def _load(name: str) -> ModuleType:
    """A helper beside this file, which importlib mode does not let a test import."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_tensorrt() -> ModuleType:
    """The module `fake_tensorrt`."""
    return _load("fake_tensorrt")


@pytest.fixture
def trt(fake_tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh `Fake` in the place of both flavours of TensorRT."""
    fake = fake_tensorrt.Fake()
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, fake.module(name))
    return fake


@pytest.fixture
def gpu_ort(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gpu_ort(device)`: a fresh `fake_onnxruntime.Fake` in the place of the library."""

    def put(device: object) -> Any:
        fake = _load("fake_onnxruntime").Fake(device)
        monkeypatch.setitem(sys.modules, "onnxruntime", fake.module())
        return fake

    return put
