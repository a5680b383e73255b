"""Scripts that run in a process of their own, because Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def interpreted() -> Callable[[str], dict[str, Any]]:
    """`interpreted("loop.py")`: the JSON object that a script beside this file prints, in Triton's interpreter."""

    def run(script: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script))],
            env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run
