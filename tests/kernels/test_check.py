"""What `rt.kernels.check` catches, on kernels that are torch functions and wrong in one way each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from triton import knobs

from rt.errors import ConfigError
from rt.kernel_image import TensorArgument
from rt.kernels import check, registry
from rt.kernels.launch import Outcome, try_case
from rt.kernels.spec import Budget, Case, Config, KernelSpec


class Launched:
    """A kernel in torch, called as Triton's are."""

    def __init__(self, function: Callable[[Tensor, int, Tensor], object]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid == (3,)

        def launch(x: Tensor, rows: int, y: Tensor, **constants: object) -> None:
            assert constants == {"BLOCK": 4, "num_warps": 2, "num_stages": 1}
            self.function(x, rows, y)

        return launch


def right(x: Tensor, rows: int, y: Tensor) -> None:
    y.copy_(2 * x)


def omits_the_last_row(x: Tensor, rows: int, y: Tensor) -> None:
    y[: rows - 1] = 2 * x[: rows - 1]


def is_off(x: Tensor, rows: int, y: Tensor) -> None:
    y.copy_(2 * x)
    y[0, 0] = y[0, 0] + 0.1


def writes_beyond(x: Tensor, rows: int, y: Tensor) -> None:
    right(x, rows, y)
    y.as_strided((1,), (1,), y.storage_offset() + y.numel())[0] = 0


def computes_beyond(x: Tensor, rows: int, y: Tensor) -> None:
    right(x, rows, y)
    beyond = (tensor.as_strided((1,), (1,), tensor.storage_offset() + tensor.numel()) for tensor in (x, y))
    source, target = beyond
    target.copy_(2 * source)  # NaN, like what outputs start as


def writes_its_input(x: Tensor, rows: int, y: Tensor) -> None:
    right(x, rows, y)
    x.as_strided((1,), (1,), x.storage_offset() - 1)[0] = 0


def reads_beyond(x: Tensor, rows: int, y: Tensor) -> None:
    right(x, rows, y)
    y[-1, -1] += 0 * x.as_strided((1,), (1,), x.storage_offset() + x.numel())[0]


def raises(x: Tensor, rows: int, y: Tensor) -> None:
    raise ValueError("no such block")


def doubling(function: Callable[[Tensor, int, Tensor], object]) -> KernelSpec:
    return KernelSpec(
        name="double",
        kernel=Launched(function),
        inputs=(TensorArgument(name="x", shape=("rows", "3"), dtype="T"),),
        scalars={"rows": "rows"},
        outputs=(TensorArgument(name="y", shape=("rows", "3"), dtype="T"),),
        config=lambda case: Config(constants={"BLOCK": 4}, warps=2),
        grid=("cdiv(rows, BLOCK)",),
        reference=lambda x: (2 * x,),
        cases=(Case(sizes={"rows": 11}), Case(sizes={"rows": 9}, dtype="bfloat16")),
        workloads={},
        tolerance={"float16": 1e-3, "bfloat16": 1e-2},
        budget=Budget(registers=1, shared_bytes=0),
    )


def outcome(function: Callable[[Tensor, int, Tensor], object]) -> Outcome:
    spec = doubling(function)
    return try_case(spec, spec.cases[0], seed=1, device="cpu")


def test_a_right_kernel_passes():
    assert outcome(right) == Outcome(error=0.0, tolerance=1e-3, broken=())
    assert outcome(right).passed


@pytest.mark.parametrize("function", [omits_the_last_row, reads_beyond])
def test_what_was_not_computed_is_not_a_number(function):
    found = outcome(function)
    assert found.error != found.error and not found.passed


def test_a_wrong_value_is_measured():
    found = outcome(is_off)
    assert 0.01 < found.error < 0.1 and not found.passed


@pytest.mark.parametrize(
    ("function", "name"), [(writes_beyond, "y"), (computes_beyond, "y"), (writes_its_input, "x")]
)
def test_a_write_beyond_the_end_breaks_the_guard(function, name):
    found = outcome(function)
    assert found.error == 0 and found.broken == (name,) and not found.passed


def test_what_a_kernel_updates_is_drawn_and_given_to_the_reference():
    def accumulate(x: Tensor, rows: int, y: Tensor) -> None:
        y.add_(x)

    spec = replace(doubling(accumulate), inplace=frozenset({"y"}), reference=lambda x, y: (x + y,))
    assert spec.bytes(spec.cases[0]) == 3 * 11 * 3 * 2
    assert try_case(spec, spec.cases[0], seed=1, device="cpu").passed


def test_a_reference_of_another_form_is_refused():
    spec = doubling(right)
    with pytest.raises(ConfigError, match="double: the reference has 2 results, the kernel 1"):
        try_case(replace(spec, reference=lambda x: (x, x)), spec.cases[0], seed=1, device="cpu")
    with pytest.raises(ConfigError, match=r"double: the reference gave \(33,\) for \(11, 3\)"):
        try_case(replace(spec, reference=lambda x: (2 * x.flatten(),)), spec.cases[0], seed=1, device="cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command on doubling kernels by name, as if interpreted."""
    functions = {"right": right, "off": is_off, "beyond": writes_beyond, "raises": raises}
    monkeypatch.setattr(registry, "NAMES", tuple(functions))
    monkeypatch.setattr(registry, "DESCRIBED", ())
    monkeypatch.setattr(registry, "spec", lambda name: doubling(functions[name]))
    monkeypatch.setattr(check, "device", lambda: "cpu")
    return lambda *arguments: CliRunner().invoke(check.command, arguments)


def test_the_command_says_what_it_ran(run):
    done = run("right", "--seed", "7")
    assert done.exit_code == 0
    assert done.stderr == "seed 7 on cpu\n"
    assert done.stdout.splitlines() == [
        "ok   double            float16 rows=11  0.0e+00 of 1e-03",
        "ok   double            bfloat16 rows=9  0.0e+00 of 1e-02",
    ]


def test_the_command_fails_with_its_kernels(run):
    done = run("--json")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "error: 6 of 8 cases failed"
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["passed"] for record in records] == [True, True, *[False] * 6]
    assert [record["note"] for record in records[2::2]] == ["", "wrote beyond y", "ValueError: no such block"]


def test_seeds_are_new(run):
    assert run("right").stderr != run("right").stderr


def test_the_command_names_the_kernels_there_are(monkeypatch):
    monkeypatch.setattr(check, "device", lambda: "cpu")
    done = CliRunner().invoke(check.command, ["group_nrom"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: no kernel 'group_nrom' (did you mean 'group_norm'?); kernels: ")


def test_without_a_gpu_and_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    done = CliRunner().invoke(check.command, [])
    assert done.exit_code == 4
    assert done.stderr == "error: no NVIDIA GPU here; set TRITON_INTERPRET=1 to run the kernels on the CPU\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check.device() == "cuda"
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert check.device() == "cpu"


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    done = CliRunner().invoke(check.command, [])
    assert done.exit_code == 4
    assert done.stderr.startswith(
        "error: a GPU kernel needs triton, which is not installed; run: pip install"
    )
