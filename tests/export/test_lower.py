"""Graphs and their shared weights on disk."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from rt.backends import Form, get
from rt.bundle import Bundle
from rt.config import DType
from rt.export import torch_rework
from rt.export.checkpoint import open_checkpoint
from rt.export.lower import OPSET, WeightFile, lower
from rt.export.observe import observe
from rt.export.passes.cast import cast
from rt.export.program import Program
from rt.export.unet import trace_step
from rt.model import Component, Family
from rt.shapes import ShapeProfile, TensorSpec


def tensor(array: np.ndarray) -> ir.TensorProtocol:
    return ir.tensor(array, name="w")


def fresh(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng().normal(size=shape).astype(dtype)


def test_weights_are_written_once_on_pages_and_read_back(tmp_path: Path) -> None:
    first, second = fresh(33, 9), fresh(600, dtype=np.float16)
    with WeightFile(tmp_path / "w.weights") as store:
        references = [store.add(tensor(array)) for array in (first, second, first.copy())]
    assert [reference.offset for reference in references] == [0, 4096, 0]
    assert (tmp_path / "w.weights").stat().st_size == 4096 + second.nbytes
    for reference, array in zip(references, (first, second, first), strict=True):
        assert reference.location == "w.weights", "relative to the graph, so that a bundle can be moved"
        assert np.array_equal(reference.numpy(), array) and reference.numpy().dtype == array.dtype


def test_equal_bytes_of_another_type_or_shape_share_their_place_and_keep_what_they_are(
    tmp_path: Path,
) -> None:
    array = fresh(4, 6)
    with WeightFile(tmp_path / "w.weights") as store:
        plain, reshaped, whole = (
            store.add(tensor(value)) for value in (array, array.reshape(8, 3), array.view(np.int32))
        )
    assert (tmp_path / "w.weights").stat().st_size == array.nbytes
    assert np.array_equal(plain.numpy(), array)
    assert np.array_equal(reshaped.numpy(), array.reshape(8, 3))
    assert np.array_equal(whole.numpy(), array.view(np.int32))


def test_a_transposed_array_is_written_in_its_own_order(tmp_path: Path) -> None:
    array = fresh(4, 6)
    with WeightFile(tmp_path / "w.weights") as store:
        plain, transposed = store.add(tensor(array)), store.add(tensor(array.T))
    assert plain.offset != transposed.offset
    assert np.array_equal(transposed.numpy(), array.T)


def test_a_weight_file_never_writes_over_another(tmp_path: Path) -> None:
    (tmp_path / "w.weights").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        WeightFile(tmp_path / "w.weights")
    assert (tmp_path / "w.weights").read_bytes() == b"mine"


class Net(nn.Module):
    """One weight that is worth sharing, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.small(nn.functional.silu(self.large(x))),)


@pytest.fixture
def lowered(tmp_path: Path) -> Iterator[Callable[[nn.Module, int], Path]]:
    """`lowered(net, rows)`: the graph of `net` for that many rows, weights in `net.weights` beside it."""

    def call(net: nn.Module, rows: int) -> Path:
        inputs = {"x": torch.randn(rows, 64)}
        module = torch.export.export(net.eval(), (), inputs, strict=False).module(check_guards=False)
        program = Program(
            name="net",
            component=Component.UNET,
            profile=None,
            guided=False,
            module=module,  # type: ignore[arg-type]
            inputs=inputs,
            outputs=("y",),
        )
        lower(program, module, store, tmp_path / f"net-{rows}.onnx")
        return tmp_path / f"net-{rows}.onnx"

    with WeightFile(tmp_path / "net.weights") as store:
        yield call


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_lowered_graph_computes_what_torch_does(
    lowered: Callable[[nn.Module, int], Path], backend: str
) -> None:
    net = Net()
    path = lowered(net, 5)
    specs = (TensorSpec(name="x", shape=(5, 64)),), (TensorSpec(name="y", shape=(5, 3)),)
    engine = get(backend).load(path, *specs, dtype=DType.FP32, threads=1)
    x = torch.randn(5, 64)
    engine.inputs["x"][...] = x.numpy()
    engine.outputs["y"].fill(np.nan)
    engine.enqueue()
    with torch.no_grad():
        np.testing.assert_allclose(engine.outputs["y"], net(x)[0].numpy(), rtol=1e-5, atol=1e-5)


def test_two_shapes_share_the_file_of_weights_and_keep_small_ones_inside(
    lowered: Callable[[nn.Module, int], Path],
) -> None:
    net = Net()
    first = lowered(net, 1)
    size = first.with_name("net.weights").stat().st_size
    second = lowered(net, 3)
    assert size >= 64 * 64 * 4 and second.with_name("net.weights").stat().st_size == size
    for path in (first, second):
        graph = onnx.load(path, load_external_data=False)
        outside = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert [list(t.dims) for t in outside] == [[64, 64]]
        assert {entry.key: entry.value for entry in outside[0].external_data}["location"] == "net.weights"


def test_a_graph_is_valid_of_one_opset_and_anonymous(lowered: Callable[[nn.Module, int], Path]) -> None:
    path = lowered(Net(), 2)
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path, load_external_data=False)
    assert {(o.domain, o.version) for o in graph.opset_import if o.domain == ""} == {("", OPSET)}
    assert (graph.producer_name, graph.producer_version, graph.doc_string) == ("rt", "", "")
    raw = path.read_bytes()
    for word in (os.getcwd(), __file__, "site-packages", "stack_trace", "test_lower"):
        assert word.encode() not in raw


def test_every_graph_of_a_bundle_is_valid(demo_bundle: Path) -> None:
    for record in Bundle.open(demo_bundle).manifest.engines:
        onnx.checker.check_model(demo_bundle / record.forms[Form.ONNX])
        graph = onnx.load(demo_bundle / record.forms[Form.ONNX], load_external_data=False)
        assert [value.name for value in graph.graph.input] == [spec.name for spec in record.inputs]
        assert [value.name for value in graph.graph.output] == [spec.name for spec in record.outputs]
        assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_the_tables_of_torch_are_made_once_and_no_export_writes_into_those_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration

    made = []
    original = _registration.ONNXRegistry.__dict__["from_torchlib"]
    monkeypatch.setattr(torch_rework, "_TRANSLATIONS", {})
    monkeypatch.setattr(
        _registration.ONNXRegistry,
        "from_torchlib",
        classmethod(lambda cls, **how: made.append(1) or original.__get__(None, cls)(**how)),
    )
    counted = _registration.ONNXRegistry.__dict__["from_torchlib"]
    look_up = utils._materialize_cpp_cia_ops
    with torch_rework.without_rework():
        first = _registration.ONNXRegistry.from_torchlib(opset_version=21)
        first.register_op(torch.ops.aten.relu.default, lambda x: x)
        second = _registration.ONNXRegistry.from_torchlib(opset_version=21)
    with torch_rework.without_rework():
        third = _registration.ONNXRegistry.from_torchlib(opset_version=21)
    assert len(made) == 1
    relu = torch.ops.aten.relu.default
    assert [table.get_decomps(relu)[0].is_custom for table in (first, second, third)] == [True, False, False]
    assert _registration.ONNXRegistry.__dict__["from_torchlib"] is counted
    assert utils._materialize_cpp_cia_ops is look_up


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).mul_(2)


class Untranslated(nn.Module):
    """`aten.to.dtype` has no translation by that name."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.to.dtype(x, torch.float64) + 1


@pytest.mark.filterwarnings("ignore")  # the exporter's, of its own internals
@pytest.mark.parametrize(("module", "decomposed"), [(nn.Linear(8, 8), 0), (Writes(), 1), (Untranslated(), 1)])
def test_what_has_a_translation_is_not_decomposed(
    module: nn.Module, decomposed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx._internal.exporter import _fx_passes

    done = []
    original = _fx_passes.decompose_with_registry
    monkeypatch.setattr(
        _fx_passes, "decompose_with_registry", lambda *given: done.append(1) or original(*given)
    )
    x = torch.randn(8, 8)
    exported = torch.export.export(module.eval(), (x,), strict=False)
    with torch_rework.without_rework():
        made = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)
    assert made is not None and len(done) == decomposed
    (got,) = made(x)
    torch.testing.assert_close(got, module(x))


def test_no_step_of_a_unet_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Callable[[Family], Path]
) -> None:
    """Nor in half precision, whose casts torch's own tracing writes with an operator that has no translation."""
    from torch.onnx._internal.exporter import _fx_passes

    monkeypatch.setattr(
        _fx_passes, "decompose_with_registry", lambda *given: pytest.fail("a program was decomposed")
    )
    checkpoint = open_checkpoint(str(folder(Family.SDXL)))
    step = trace_step(checkpoint.load(Component.UNET), checkpoint.spec, ShapeProfile(16, 16), {}, guided=True)
    half, _ = cast(step.module, DType.BF16, observe(step, torch.bfloat16))
    with WeightFile(tmp_path / "x.weights") as weights:
        for name, module in (("fp32", step.module), ("bf16", half)):
            lower(step, module, weights, tmp_path / f"{name}.onnx")


class Served(ModuleType):
    """A module whose values are nobody's attributes, as those of torch's configs."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return False


@pytest.mark.parametrize("without", [ModuleType, Served])
def test_a_torch_without_these_exports_as_it_likes(
    without: type[ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [
        *("torch._export.utils", "torch.onnx._internal.exporter._registration"),
        *("torch.onnx._internal.exporter._fx_passes", "torch.fx.config"),
    ]
    for name in names:
        monkeypatch.setitem(sys.modules, name, without(name))
    with torch_rework.without_rework():
        assert not any(vars(sys.modules[name]).keys() - vars(ModuleType("x")).keys() for name in names)


def test_two_threads_leave_torch_as_it_was() -> None:
    from torch._export import utils

    before, entered, leave = utils._materialize_cpp_cia_ops, threading.Event(), threading.Event()

    def other() -> None:
        with torch_rework.without_rework():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with torch_rework.without_rework():
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(60)
    leave.set()
    thread.join()
    assert utils._materialize_cpp_cia_ops is before
