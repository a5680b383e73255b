"""What a package for a GPU launches, in Triton's interpreter: a process of its own, which decides that on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json

import torch

torch.library.wrap_triton = lambda kernel: kernel  # it knows compiled kernels alone, and only marks them for a trace

from rt.export.gpu_operators import gpu_operators
from rt.export.operators import ops

errors = []
for sizes in ((2, 40, 77, 2, 40), (1, 64, 64, 4, 16)):
    batch, queries, keys, heads, width = sizes
    query = torch.randn(batch, heads * width, queries).transpose(1, 2)  # not contiguous
    key, value = (torch.randn(batch, keys, heads * width) for _ in range(2))
    expected = ops.attention(query, key, value, heads)
    got = gpu_operators()[ops.attention.default](query, key, value, heads)
    errors.append(float((got - expected).norm() / expected.norm()) if got.shape == expected.shape else None)
print(json.dumps(errors))
"""


def test_attention_is_launched_with_its_arguments_in_order() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(error is not None and error < 1e-5 for error in json.loads(done.stdout))
