"""The peak is seen after the memory is gone, and can be forgotten.

In a fresh interpreter: what other tests leave in this one is theirs, and may go while we look.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rt.bench.memory import peak_rss_mib, reset_peak

SCRIPT = """
import json
import numpy as np
from rt.bench.memory import peak_rss_mib, reset_peak

forgets = reset_peak()
before = peak_rss_mib()
np.ones(160 << 20, np.uint8)  # touched, and gone
high = peak_rss_mib()
reset_peak()
print(json.dumps({"forgets": forgets, "before": before, "high": high, "after": peak_rss_mib()}))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_peak_outlives_the_memory(peaks: dict[str, float]) -> None:
    assert peaks["high"] > peaks["before"] + 150


def test_reset_forgets(peaks: dict[str, float]) -> None:
    if not peaks["forgets"]:
        pytest.skip("this kernel keeps the peak of the whole process")
    assert peaks["after"] < peaks["high"] - 150


def test_without_proc_the_peak_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert reset_peak() is False
    assert peak_rss_mib() > 10
