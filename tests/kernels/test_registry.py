"""What every kernel says of itself, without running it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from rt.errors import BackendUnavailableError, ConfigError
from rt.kernels import registry
from rt.kernels.launch import draw
from rt.kernels.spec import BYTES

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
NAMES = registry.NAMES
ALL = (*NAMES, *registry.DESCRIBED)


def test_every_file_with_a_kernel_is_listed():
    files = {path.stem for path in KERNELS.glob("*.py") if "\nSPEC = " in path.read_text()}
    assert sorted(ALL) == sorted(files)
    assert list(NAMES) == sorted(NAMES)
    assert [*registry.specs()] == list(NAMES)


def test_an_unknown_kernel_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError, match=r"no kernel 'layernorm' \(did you mean 'layer_norm'\?\); kernels: .*geglu"
    ):
        registry.spec("layernorm")


def test_without_triton_the_command_that_helps(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "rt.kernels.layer_norm", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"a GPU kernel needs triton.*pip install"):
        registry.spec("layer_norm")


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_inputs_scalars_outputs_constants(name):
    spec = registry.spec(name)
    assert (spec.name, spec.kernel.__name__) == (name, name)
    declared = [
        *(argument.name for argument in spec.inputs),
        *spec.scalars,
        *(argument.name for argument in spec.outputs),
    ]
    constexpr = [parameter.name for parameter in spec.kernel.params if parameter.is_constexpr]
    assert spec.kernel.arg_names == [*declared, *constexpr]
    for case in (*spec.cases, *spec.workloads.values()):
        assert sorted(spec.constants(case)) == sorted(constexpr), case
        assert len(spec.fixed) + len(case.attributes) + len(spec.config(case).constants) == len(constexpr)
    assert spec.inplace <= {argument.name for argument in spec.outputs}
    assert bool(spec.descriptors) == (name in registry.DESCRIBED)


@pytest.mark.parametrize("name", ALL)
def test_a_reference_makes_its_tensors_where_its_inputs_are(name):
    """A benchmark runs it on the GPU. What it makes without saying where is on the default device, here another one."""
    spec = registry.spec(name)
    case = min(spec.cases, key=spec.bytes)
    operands = [
        value.float() if value.is_floating_point() else value for value in draw(spec, case, 7).values()
    ]
    expected = spec.reference(*operands, **case.attributes)
    with torch.device("meta"):
        given = spec.reference(*operands, **case.attributes)
    for value, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ALL)
def test_cases_are_within_the_limits_of_a_launch(name):
    spec = registry.spec(name)
    for case in (*spec.cases, *spec.workloads.values()):
        x, y, z = [*spec.blocks(case), 1, 1][:3]
        assert 1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= z < 2**16, case
        config = spec.config(case)
        assert config.warps in (1, 2, 4, 8, 16, 32) and config.stages >= 1
        assert spec.bytes(case) > 0
        assert case.dtype in spec.tolerance and case.dtype in BYTES, case
        assert spec.flops(case) >= 0


@pytest.mark.parametrize("name", ALL)
def test_cases_cover_both_halves_and_more_than_one_size(name):
    spec = registry.spec(name)
    assert spec.cases and spec.workloads
    assert len({str(case) for case in spec.cases}) == len(spec.cases)
    if any(argument.dtype == "T" for argument in (*spec.inputs, *spec.outputs)):
        assert {"float16", "bfloat16"} <= {case.dtype for case in spec.cases}


@pytest.mark.parametrize("name", ALL)
def test_the_reference_answers_in_the_shapes_of_the_outputs(name):
    spec = registry.spec(name)
    case = min(spec.cases, key=spec.bytes)
    operands = [
        value.float() if value.is_floating_point() else value for value in draw(spec, case, 0).values()
    ]
    results = spec.reference(*operands, **case.attributes)
    assert [tuple(result.shape) for result in results] == [
        spec.extent(argument, case) for argument in spec.outputs
    ]


@pytest.mark.parametrize("name", ALL)
def test_a_seed_draws_the_same_values(name):
    spec = registry.spec(name)
    case = min(spec.cases, key=spec.bytes)
    first, again, other = (draw(spec, case, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_projection_and_attention_are_one():
    """And the queries are those of a linear layer without bias."""
    both, alone = registry.spec("query_attention"), registry.spec("attention")
    case = both.cases[0]
    x, weight, key, value = (operand.double() for operand in draw(both, case, 3).values())
    heads = case.attributes["heads"]
    [parts] = alone.reference(x @ weight.mT, key, value, heads=heads)
    [whole] = both.reference(x, weight, key, value, heads=heads)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)


def test_two_launches_of_group_norm_are_one():
    one, first, second = (registry.spec(f"group_{part}") for part in ("norm", "statistics", "normalize"))
    case = one.cases[1]
    groups, eps, silu = (case.attributes[name] for name in ("groups", "eps", "silu"))
    x, bias, scale, shift = (value.double() for value in draw(one, case, 3).values())
    statistics = first.reference(x, bias, groups=groups, chunk=32)
    parts = second.reference(x, bias, scale, shift, *statistics, groups=groups, chunk=32, eps=eps, silu=silu)
    whole = one.reference(x, bias, scale, shift, **case.attributes)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-9, rtol=0)


def test_integers_need_an_example_of_their_shape():
    spec = registry.spec("layer_norm")
    case = spec.cases[0]
    rows = dataclasses.replace(spec.inputs[0], name="rows", shape=("rows",), dtype="int32")
    with pytest.raises(ConfigError, match=r"layer_norm: rows is int32 and has no example; add one to SPEC"):
        draw(dataclasses.replace(spec, inputs=(rows,)), case, 0)
    examples = {"rows": lambda case, generator: torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(
        ConfigError, match=r"the example of rows is \(3,\), its shape \(7,\) for float16 rows=7"
    ):
        draw(dataclasses.replace(spec, inputs=(rows,), examples=examples), case, 0)
