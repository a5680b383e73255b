"""The peak is seen after the memory is gone, and can be forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from rt.bench.memory import peak_rss_mib, reset_peak


def _touch(mib: int) -> None:
    np.ones(mib << 20, np.uint8)


def test_peak_outlives_the_memory() -> None:
    reset_peak()
    before = peak_rss_mib()
    _touch(160)
    assert peak_rss_mib() > before + 100


def test_reset_forgets() -> None:
    _touch(160)
    high = peak_rss_mib()
    if not reset_peak():
        pytest.skip("this kernel keeps the peak of the whole process")
    assert peak_rss_mib() < high - 100


def test_without_proc_the_peak_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert reset_peak() is False
    assert peak_rss_mib() > 10
