"""What a package for a GPU computes, in Triton's interpreter: a process of its own, which decides that on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rt.export.candidates import Fastest, first

SCRIPT = """
import json

import torch
import torch.nn.functional as F

torch.library.wrap_triton = lambda kernel: kernel  # it knows compiled kernels alone, and only marks them for a trace
torch.cuda.get_device_capability = lambda: (9, 0)

from rt.export import gpu_operators
from rt.export.operators import REFERENCES, ops
from rt.kernels.interpreter import widen_products

widen_products()
gpu_operators._ROWS_AT_ONCE = 24


def cudnn(query, key, value, bias, logsumexp):
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous().transpose(1, 2), None


cudnn.default = cudnn
torch.ops.aten._scaled_dot_product_cudnn_attention = cudnn


def half(*shape):
    return torch.randn(*shape).half()


def error(got, expected):
    assert got.shape == expected.shape and got.dtype is torch.float16
    return float((got.float() - expected).norm() / expected.norm())


CASES = {
    "attention of 40": (ops.attention.default, (half(2, 80, 40).transpose(1, 2), half(2, 77, 80), half(2, 77, 80), 2)),
    "attention of 64": (ops.attention.default, (half(1, 40, 128), half(1, 33, 128), half(1, 33, 128), 2)),
    "attention of 512": (ops.attention.default, (half(1, 50, 512), half(1, 50, 512), half(1, 50, 512), 1)),
    "self_attention of 40": (ops.self_attention.default, (half(2, 40, 3 * 80), 2)),
    "self_attention of 64": (ops.self_attention.default, (half(1, 33, 3 * 128), 2)),
    "query_attention": (
        ops.query_attention.default,
        (half(2, 20, 80), half(80, 80) / 9, half(2, 7, 80), half(2, 7, 80), 2),
    ),
    "geglu_linear": (ops.geglu_linear.default, (half(2, 5, 64), half(128, 64) / 8, half(128))),
}
found = {}
for case, (operator, arguments) in CASES.items():
    exact = [each.float() if isinstance(each, torch.Tensor) else each for each in arguments]
    expected = REFERENCES[operator](*exact)
    tried = {}

    def keep(operator, arguments, candidates):
        for name, candidate in candidates.items():
            if name != gpu_operators.TMA:  # its descriptors are torch's to make
                tried[name] = error(candidate(*arguments), expected)
        return next(iter(candidates))

    error(gpu_operators.gpu_operators(keep)[operator](*arguments), expected)
    found[case] = tried
    found[case + " of first"] = next(iter(tried))

norm = gpu_operators.gpu_operators(keep)[ops.group_norm.default]
scale, shift = torch.randn(64), torch.randn(64)
for pixels in ((16, 16), (17, 16)):
    for rows in (0, 1, 2):
        x, bias = half(2, *pixels, 64), torch.randn(rows, 64) if rows else None
        expected = REFERENCES[ops.group_norm.default](x.float(), scale, shift, 8, 1e-5, True, bias)
        got = norm(x, scale, shift, 8, 1e-5, True, *([] if bias is None else [bias]))
        found[f"group_norm {pixels} {rows}"] = {"ours": error(got, expected)}
for sizes in ((2, 40, 77, 2, 40), (1, 64, 64, 4, 16)):
    batch, queries, keys, heads, width = sizes
    query = torch.randn(batch, heads * width, queries).transpose(1, 2)  # not contiguous
    key, value = (torch.randn(batch, keys, heads * width) for _ in range(2))
    expected = ops.attention(query, key, value, heads)
    got = gpu_operators.attention(query, key, value, heads)
    assert got.shape == expected.shape
    assert float((got - expected).norm() / expected.norm()) < 1e-5
print(json.dumps(found))
"""


def test_every_candidate_computes_the_operator_and_the_likely_fastest_comes_first() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    firsts = {
        name.removesuffix(" of first"): value for name, value in found.items() if isinstance(value, str)
    }
    assert firsts == {
        "attention of 40": "ours",
        "attention of 64": "cudnn",
        "attention of 512": "products",
        "self_attention of 40": "ours",
        "self_attention of 64": "cudnn",
        "query_attention": "apart",
        "geglu_linear": "apart",
    }
    errors = {name: tried for name, tried in found.items() if not isinstance(tried, str)}
    assert len(errors) == len(firsts) + 6
    assert {name: [*errors[name]] for name in ("attention of 64", "attention of 512", "query_attention")} == {
        "attention of 64": ["cudnn", "ours"],
        "attention of 512": ["products", "ours"],
        "query_attention": ["apart", "ours"],
    }
    assert max(error for tried in errors.values() for error in tried.values()) < 3e-3, errors


def candidates(*names: str) -> dict[str, Any]:
    return {name: lambda x, *_: x for name in names}


def test_without_timing_the_first_is_taken() -> None:
    assert first("op", (torch.zeros(2),), candidates("a", "b")) == "a"


def test_the_fastest_is_timed_once_a_shape() -> None:
    timed: list[int] = []

    def time(calls: Any) -> list[float]:
        timed.append(len(calls))
        for call in calls:
            call()
        return [3.0, 1.0, 2.0][: len(calls)]

    choose = Fastest(time)
    assert choose("op", (torch.zeros(2, 3), 7), candidates("a", "b", "c")) == "b"
    assert choose("op", (torch.ones(2, 3), 7), candidates("a", "b", "c")) == "b"
    assert timed == [3]
    for other in (
        ("op", (torch.zeros(2, 4), 7)),
        ("op", (torch.zeros(2, 3), 8)),
        ("po", (torch.zeros(2, 3), 7)),
    ):
        choose(*other, candidates("a", "b", "c"))
    choose("op", (torch.zeros(2, 3).half(), 7), candidates("a", "b", "c"))
    assert timed == [3] * 5
    assert choose("alone", (torch.zeros(1),), candidates("a")) == "a"
    assert timed == [3] * 5, "nothing to choose"


def test_a_candidate_that_fails_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    def fails(x: Any) -> Any:
        raise RuntimeError("no kernel for this\nand more")

    choose = Fastest(lambda calls: [5.0] * len(calls))
    assert choose("op", (torch.zeros(1),), {"a": fails, "b": lambda x: x}) == "b"
    assert "op float32[1]: a fails: no kernel for this" in caplog.text
    assert choose("op", (torch.zeros(2),), {"a": fails}) == "a", "the build says what is wrong"
    assert choose("op", (torch.zeros(3),), {"a": fails, "b": fails}) == "a"


def test_operands_are_real_while_a_program_is_traced() -> None:
    """Tracing sees tensors without numbers."""
    seen: list[Any] = []

    def candidate(x: torch.Tensor) -> torch.Tensor:
        seen.append(type(x))
        return x

    choose = Fastest(lambda calls: [1.0] * len(calls))
    with FakeTensorMode():
        fake = torch.empty(4, dtype=torch.float16)
        assert choose("op", (fake,), {"a": candidate, "b": candidate}) == "a"
    assert {*seen} == {torch.Tensor}
