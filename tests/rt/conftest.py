"""The CUDA driver's stand-in, for the device and for the loop on it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from .fake_driver import FakeDriver


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A fresh fake in the place of `cuda.bindings.driver`."""
    made = FakeDriver()
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    return made
