"""Our kernels as plugins: what TensorRT's own plugin module makes of them, and graphs with plugin nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from rt.config import DType
from rt.errors import BuildError
from rt.export.selftest import Probe, lowered
from rt.export.tensorrt import plugins, tune
from rt.export.tensorrt.graph import fused_nodes, with_plugins
from rt.export.tensorrt.operators import OPERATORS
from rt.export.tensorrt.plan import Options
from rt.export.tensorrt.tune import Choice, choose_plugins, one_node
from rt.kernels.aot import compile_case
from rt.kernels.registry import spec
from rt.kernels.spec import Case

# What libnvinfer has and the lean library has not. Nothing here may be called.
MISSING = """
void*createInferBuilder_INTERNAL(void*l,int v){return 0;} void*getBuilderPluginRegistry(int c){return 0;}
void*createNvOnnxParserRefitter_INTERNAL(void*a,void*b,int v){return 0;}
void*createNvOnnxParser_INTERNAL(void*a,void*b,int v){return 0;}
int getNvOnnxParserVersion(void){return 0;} int initLibNvInferPlugins(void*l,const char*n){return 1;}
"""
HOST = Path(__file__).with_name("plugin_host.py")
H, B, S = "HALF", "BF16", "FLOAT"
CALLS: list[tuple[str, int, list[tuple[list[int], str]], dict[str, Any]]] = [
    ("attention", 90, [([2, 4096, 320], H), ([2, 77, 320], H), ([2, 77, 320], H)], {"heads": 8}),
    ("attention", 80, [([1, 64, 640], B), ([1, 64, 640], B), ([1, 64, 640], B)], {"heads": 8}),
    (
        "group_norm",
        90,
        [([2, 64, 64, 320], B), ([2, 320], S), ([320], S), ([320], S)],
        {"groups": 32, "epsilon": 1e-5, "silu": 1},
    ),
    (
        "group_norm",
        120,
        [([1, 100, 64], H), ([1, 64], S), ([64], S), ([64], S)],
        {"groups": 2, "epsilon": 1e-6, "silu": 0},
    ),
    ("geglu", 89, [([2, 4096, 2560], H)], {}),
]
WRONG: list[Any] = [
    ("geglu", 75, [([2, 4096, 2560], H)], {}),
    ("geglu", 90, [([-1, 4096, 2560], H)], {}),
]


def needs_classic() -> None:
    if not (find_spec("tensorrt_bindings") and find_spec("tensorrt_lean_libs")):
        pytest.skip("tensorrt-cu13-bindings and tensorrt-lean-cu13-libs are not installed")


@pytest.fixture(scope="module")
def payloads(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What TensorRT would put into a plan for `CALLS`, then `WRONG`."""
    needs_classic()
    found = find_spec("tensorrt_lean_libs")
    assert found and found.submodule_search_locations
    [lean] = Path(found.submodule_search_locations[0]).glob("libnvinfer_lean.so.*")
    major = lean.name.rpartition(".")[2]
    shim = tmp_path_factory.mktemp("shim")

    def link(name: str, code: str, *more: str) -> None:
        name = f"{name}.so.{major}"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(shim / name)]
        subprocess.run([*command, "-x", "none", *more], input=code, text=True, check=True)

    link("libnvinfer", MISSING, "-Wl,--no-as-needed", str(lean), f"-Wl,-rpath,{lean.parent}")
    for name in ("libnvonnxparser", "libnvinfer_plugin"):
        link(name, "int x;")
    done = subprocess.run(
        [sys.executable, str(HOST), json.dumps([*CALLS, *WRONG])],
        env={**os.environ, "LD_LIBRARY_PATH": str(shim)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("index", range(len(CALLS)), ids=lambda i: f"{CALLS[i][0]}-sm{CALLS[i][1]}")
def test_tensorrt_gets_the_kernel_as_our_own_launcher_does(
    payloads: list[dict[str, Any]], index: int
) -> None:
    name, capability, tensors, attributes = CALLS[index]
    got = payloads[index]
    [operator] = [each for each in OPERATORS.values() if each.kernel == name]
    dtype = {H: "float16", B: "bfloat16"}[tensors[0][1]]
    added = {position for position, _ in operator.zeros}
    shapes = [shape for position, (shape, _) in enumerate(tensors) if position not in added]
    case = operator.case(shapes, attributes, dtype)
    compiled = compile_case(spec(name), case, capability)
    image = compiled.image
    x, y, z = image.launch_grid(case.sizes)
    assert got["launch"] == {
        "grid_x": x,
        "grid_y": y,
        "grid_z": z,
        "block_x": image.threads,
        "block_y": 1,
        "block_z": 1,
        "shared_mem": image.shared_bytes,
    }
    assert got["scalars"] == image.scalar_values(case.sizes)
    assert got["symbol"] == image.symbol and got["code"] == compiled.ptx
    assert got["registered"] and got["attributes"] == list(attributes)
    width = tensors[0][0][-1] // (2 if name == "geglu" else 1)
    assert got["output"] == [[*tensors[0][0][:-1], width], tensors[0][1]]


def test_the_grid_and_the_integers_are_those_of_the_formulas(payloads: list[dict[str, Any]]) -> None:
    """By hand: 4096 queries in blocks of 128, 2 × 8 heads; 32 groups of 2 pictures; 1024 values a program."""
    attention, _, norm, _, geglu = payloads[: len(CALLS)]
    assert (attention["launch"]["grid_x"], attention["launch"]["grid_y"]) == (32, 16)
    assert attention["scalars"] == [4096, 77]
    assert norm["launch"]["grid_x"] == 64 and norm["scalars"] == [4096, 320]
    assert geglu["launch"]["grid_x"] == 2 * 4096 * 1280 // 1024 and geglu["scalars"] == [2 * 4096]


def test_the_code_takes_inputs_integers_and_outputs_and_nothing_else(payloads: list[dict[str, Any]]) -> None:
    for (name, capability, tensors, _), got in zip(CALLS, payloads, strict=False):
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\n\)", got["code"], re.S)
        assert entry and entry[1] == got["symbol"]
        kinds = re.findall(r"\.param \.(u64|u32|b64|b32)\b", entry[2])
        pointers, integers = len(tensors), len(got["scalars"])
        assert [kind[1:] for kind in kinds] == ["64"] * pointers + ["32"] * integers + ["64"], name
        assert re.search(rf"^\.target sm_{capability}a?\b", got["code"], re.M)


def test_formats_are_both_halves_row_major(payloads: list[dict[str, Any]]) -> None:
    norm = payloads[2]["formats"]
    assert norm == [[[H, S, S, S, H], True], [[B, S, S, S, B], True]]
    assert payloads[0]["formats"] == [[[H] * 4, True], [[B] * 4, True]]


def test_what_cannot_be_compiled_is_an_error(payloads: list[dict[str, Any]]) -> None:
    old, dynamic = payloads[len(CALLS) :]
    assert re.match(r"^no kernels for compute capability 75; they are for \[80, .*\]$", old["error"])
    assert re.match(r"^plugin geglu needs static shapes, got \[\(-1, 4096, 2560\)\]$", dynamic["error"])


@pytest.mark.parametrize(
    ("gpu", "compiled"),
    [(80, 80), (86, 80), (89, 89), (90, 90), (100, 80), (103, 80), (120, 120), (121, 120)],
)
def test_a_gpu_that_no_kernel_is_for_gets_the_oldest(
    monkeypatch: pytest.MonkeyPatch, gpu: int, compiled: int
) -> None:
    """A plan holds PTX, which later GPUs run, too."""
    monkeypatch.setattr(plugins, "_register_once", lambda: None)
    monkeypatch.setattr(plugins, "_target", plugins._Target(0))
    plugins.register(gpu)
    assert plugins._target.capability == compiled


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The self-test's network in fp16, with operators `rt::…`."""
    torch.manual_seed(0)
    stage = tmp_path_factory.mktemp("probe")
    with torch.inference_mode(), lowered(Probe().eval(), DType.FP16, stage) as sample:
        return stage / sample.record.forms["fused.onnx"]


def test_the_operators_of_a_graph_are_found_with_their_cases(fused: Path) -> None:
    cases = {found.operator.kernel: found.case for found in fused_nodes(ir.load(fused))}
    assert cases["attention"] == Case(
        sizes={"batch": 1, "queries": 256, "keys": 256, "width": 32}, attributes={"heads": 2}
    )
    norm = cases["group_norm"]
    assert norm.sizes == {"batch": 1, "pixels": 256, "channels": 64}
    assert norm.attributes == {"groups": 8, "eps": pytest.approx(1e-5), "silu": True}
    assert cases["geglu"].sizes == {"rows": 256, "features": 256}


def test_plugin_nodes_carry_what_the_parser_looks_for(fused: Path) -> None:
    with with_plugins(fused) as path:
        model = onnx.load(path, load_external_data=False)
        assert path.parent == fused.parent, "its weights are beside it"
    assert not path.exists()
    plugins = {node.op_type: node for node in model.graph.node if node.domain == "rt"}
    assert {"attention", "group_norm", "geglu"} <= set(plugins)
    assert not {"Attention", "GroupNorm", "Geglu"} & set(plugins)
    for node in plugins.values():
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type in ("attention", "group_norm", "geglu"):
            assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"rt", b"1")
    assert {function.name for function in model.functions} == {"Convolution"} & set(plugins)
    zeros = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in model.graph.initializer
        if "zeros" in each.name
    }
    assert [*zeros] == [plugins["group_norm"].input[1]]
    np.testing.assert_array_equal(zeros["zeros_1x64"], np.zeros((1, 64), np.float32))


def test_what_is_slower_as_a_plugin_stays_a_function(fused: Path) -> None:
    [attention] = {found.key for found in fused_nodes(ir.load(fused)) if found.operator.kernel == "attention"}
    with with_plugins(fused, native={attention}) as path:
        model = onnx.load(path, load_external_data=False)
    types = {node.op_type for node in model.graph.node if node.domain == "rt"}
    assert "Attention" in types and "attention" not in types and "geglu" in types
    assert "Attention" in {function.name for function in model.functions}


def test_a_graph_without_static_shapes_is_refused(fused: Path, tmp_path: Path) -> None:
    model = ir.load(fused)
    node = next(node for node in model.graph if node.op_type == "Geglu")
    node.inputs[0].shape = ir.Shape([None, 256, 512])  # type: ignore[union-attr]
    with pytest.raises(BuildError, match=r"has no static shape in the fused graph"):
        list(fused_nodes(model))


def times(slow: str) -> Callable[[Sequence[Path]], list[float]]:
    """Plugins take 10 µs, what is native 20, but plugins of `slow` 30."""

    def time_one(graph: Path) -> float:
        [node] = onnx.load(graph).graph.node
        return 20.0 if node.op_type[0].isupper() else 30.0 if node.op_type == slow else 10.0

    return lambda graphs: [*map(time_one, graphs)]


def test_the_faster_is_kept_for_each_operator_and_shape(fused: Path) -> None:
    choices = choose_plugins(fused, Options(), times("geglu"))
    assert {choice.key.split()[0]: choice.plugin for choice in choices} == {
        "attention": True,
        "group_norm": True,
        "geglu": False,
    }
    [geglu] = Choice.native(choices)
    assert geglu == "geglu float16 rows=256 features=256"
    assert str(choices[-1]) == f"{geglu}: plugin 30.0 µs, native 20.0 µs, kept native"


def test_what_was_timed_once_is_not_timed_again(fused: Path, tmp_path: Path) -> None:
    options = Options(timing_cache=tmp_path / "deep" / "sm90.timing")
    first = choose_plugins(fused, options, times("geglu"))

    def never(graphs: Sequence[Path]) -> list[float]:
        raise AssertionError("timed again")

    assert choose_plugins(fused, options, never) == first
    [file] = (tmp_path / "deep").iterdir()
    assert re.fullmatch(r"sm90\.plugins-[0-9a-f]{8}\.json", file.name)
    other = Options(timing_cache=options.timing_cache, portable=True)
    assert choose_plugins(fused, other, times("attention")) != first, (
        "other options, other kernels of TensorRT"
    )
    file.write_text("damaged")
    assert choose_plugins(fused, options, times("attention")) != first


def test_a_graph_of_one_node_computes_what_the_operator_does(fused: Path, tmp_path: Path) -> None:
    [found] = [each for each in fused_nodes(ir.load(fused)) if each.operator.kernel == "geglu"]
    ir.save(one_node(found), tmp_path / "one.onnx")
    x = torch.randn(1, 256, 512).half()
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    [y] = session.run(None, {"x0": x.numpy()})
    expected = torch.ops.rt.geglu(x)
    assert torch.norm(torch.from_numpy(y).float() - expected.float()) < 1e-2 * torch.norm(expected.float())


def test_timing_builds_and_runs_the_plan(
    trt: Any, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_tensorrt: Any
) -> None:
    from rt.cuda.host import HostDevice

    [found] = [each for each in fused_nodes(ir.load(fused)) if each.operator.kernel == "geglu"]
    ir.save(one_node(found), tmp_path / "one.onnx")
    device = HostDevice()
    content = fake_tensorrt.Plan(
        (("x0", "float16", (1, 256, 512)), ("y", "float16", (1, 256, 256)))
    ).to_bytes()
    monkeypatch.setattr(tune, "build_plan", lambda flavour, graph, plan, options: plan.write_bytes(content))
    monkeypatch.setattr(tune, "TensorRT", lambda flavour: tune_backend(flavour, device))
    shutil.copy(tmp_path / "one.onnx", tmp_path / "two.onnx")
    times = tune.time_graphs([tmp_path / "one.onnx", tmp_path / "two.onnx"], Options())
    assert len(times) == 2 and min(times) > 0
    assert len(trt.named("execute_async_v3")) == 2 * (1 + tune.RUNS)
    assert device.in_use == 0


def tune_backend(flavour: Any, device: Any) -> Any:
    from rt.backends.tensorrt import TensorRT

    return TensorRT(flavour, lambda: device)
