"""Every kernel and case against its reference in Triton's interpreter.

Triton decides when it is imported whether it interprets, and another test may have imported it: a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from rt.kernels import registry
from rt.kernels.check import forms


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `rt.kernels.check` finds."""
    done = subprocess.run(
        [sys.executable, "-m", "rt.kernels.check", "--json"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tmp_path_factory.mktemp("check"),
        capture_output=True,
        text=True,
    )
    print(done.stderr)  # the seed
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", (*registry.NAMES, *registry.DESCRIBED))
def test_a_kernel_is_its_reference(name: str, records: list[dict[str, Any]]):
    own = [record for record in records if record["kernel"] == name]
    assert [record["case"] for record in own] == [
        str(case) for form in forms(registry.spec(name), "cpu") for case in form.cases
    ]
    assert not [record for record in own if not record["passed"]]
