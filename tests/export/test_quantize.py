"""int8 and fp8: what the pass rewrites, what engines make of it, and what calibration chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

from rt.backends import Form, get
from rt.bundle import Bundle
from rt.config import DType
from rt.export.calibrate import Calibration, costly
from rt.export.lower import WeightFile, lower
from rt.export.observe import observe
from rt.export.passes.cast import cast
from rt.export.passes.quantize import FP8, INT8, Range, products, quantize
from rt.export.program import Program
from rt.model import Component
from rt.shapes import TensorSpec
from rt.verify import TOLERANCE, compare


class Block(nn.Module):
    """A convolution, then queries, keys and values of one tensor, then a convolution of few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 4, 3, padding=1)
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h = nn.functional.silu(self.first(x))
        rows = h.flatten(2).transpose(1, 2)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(self.query(rows), self.key(rows), self.value(rows))
        return (self.last(h + mixed[:, 0].transpose(1, 2).reshape(h.shape)),)


@pytest.fixture
def program() -> Program:
    inputs = {"x": torch.randn(2, 32, 16, 16)}
    module = torch.export.export(Block().eval(), (), inputs, strict=False).module(check_guards=False)
    return Program(
        name="net",
        component=Component.UNET,
        profile=None,
        guided=False,
        module=module,  # type: ignore[arg-type]
        inputs=inputs,
        outputs=("y",),
    )


@pytest.fixture
def ranges(program: Program) -> dict[str, Range]:
    """Of what each product reads, from a run without the pass."""
    seen: dict[str, Range] = {}
    with torch.no_grad():
        env: dict[torch.fx.Node, Tensor] = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                env[n] = super().run_node(n)
                return env[n]

        Watch(program.module).run(*program.inputs.values())
        for name, node in products(program.module, INT8).items():
            seen[name] = Range.of(env[node.all_input_nodes[0]])
    return seen


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def written(program: Program, module: nn.Module, folder: Path) -> Path:
    with WeightFile(folder / "net.weights") as store:
        lower(program, module, store, folder / "net.onnx")
    return folder / "net.onnx"


def test_a_range_holds_zero_and_rounds_it_to_itself() -> None:
    assert Range.of(torch.tensor([2.0, 3.0])) == Range(0.0, 3.0)
    assert Range.of(torch.tensor([-2.0, -1.0])) == Range(-2.0, 0.0)
    assert Range(-1.0, 2.0) | Range(-3.0, 1.0) == Range(-3.0, 2.0)
    for low, high in [(-1.0, 0.0), (0.0, 1.0), (-0.28, 9.7), (0.0, 0.0)]:
        seen = Range(low, high)
        assert 0 <= seen.zero <= 255
        ends = torch.tensor([low, 0.0, high])
        rounded = torch.ops.rt.rounded(ends, seen.scale, seen.zero)
        assert rounded[1] == 0 and (rounded - ends).abs().max() <= seen.scale / 2


def test_products_are_close_in_int8_and_exact_where_not_chosen(
    program: Program, ranges: dict[str, Range]
) -> None:
    assert set(ranges) == {f"{layer}.weight" for layer in ("first", "query", "key", "value", "last")}
    code, weights = program.module.code, {k: v.clone() for k, v in program.module.state_dict().items()}
    with torch.no_grad():
        (exact,) = program.module(**program.inputs)
        everything = quantize(program.module, ranges)(**program.inputs)[0]
        one = quantize(program.module, ranges, {"query.weight"})(**program.inputs)[0]
        none = quantize(program.module, ranges, ())(**program.inputs)[0]
    assert torch.equal(none, exact)
    assert 1e-7 < distance(one, exact) < distance(everything, exact) < 2e-2
    assert distance(everything, exact) > 2e-3
    assert program.module.code == code
    assert all(torch.equal(value, weights[name]) for name, value in program.module.state_dict().items())


def test_weights_are_a_quarter_and_tensors_that_are_read_thrice_are_rounded_once(
    program: Program, ranges: dict[str, Range], tmp_path: Path
) -> None:
    module = quantize(program.module, ranges, ranges.keys() - {"last.weight"})
    kinds = {name: value.dtype for name, value in module.named_parameters()}
    assert [kinds[f"{name}_weight_int8"] for name in ("first", "query", "key", "value")] == [torch.int8] * 4
    assert kinds["last.weight"] == torch.float32 and "first.weight" not in kinds
    path = written(program, module, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    counts = {kind: sum(node.op_type == kind for node in graph.node) for kind in ("QuantizeLinear", "Conv")}
    assert counts == {"QuantizeLinear": 2, "Conv": 2}
    int8 = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sorted(int(np.prod(tensor.dims)) for tensor in int8) == [64 * 64] * 3 + [64 * 32 * 9]


def test_engines_agree_with_torch_on_an_int8_graph(
    program: Program, ranges: dict[str, Range], tmp_path: Path
) -> None:
    module = quantize(program.module, ranges)
    with torch.no_grad():
        (expected,) = module(**program.inputs)
    path = written(program, module, tmp_path)
    feed = {"x": program.inputs["x"].numpy()}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    options = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "PERFORMANCE"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    for got in (session.run(None, feed)[0], compiled(feed)[0]):
        # A value halfway between two steps goes either way.
        assert distance(torch.from_numpy(got), expected) < 5e-3


def test_openvino_runs_every_chosen_product_in_an_int8_kernel(
    program: Program, ranges: dict[str, Range], tmp_path: Path
) -> None:
    path = written(program, quantize(program.module, ranges, ranges.keys() - {"last.weight"}), tmp_path)
    compiled = openvino.Core().compile_model(path, "CPU", {"PERF_COUNT": True})
    request = compiled.create_infer_request()
    request.infer({"x": program.inputs["x"].numpy()})
    ran = [
        (info.node_type, info.exec_type.endswith("_I8"))
        for info in request.profiling_info
        if info.node_type in ("Convolution", "FullyConnected")
    ]
    assert ran.count(("FullyConnected", True)) == 3
    assert sorted(int8 for kind, int8 in ran if kind == "Convolution") == [False, True]


class Diluted(nn.Module):
    """Most of the work is `large`, and nearly all of the result `small`; the other small ones hardly count."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(512, 512), nn.Linear(512, 2)
        self.others = nn.ModuleList(nn.Linear(512, 2) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        faint = self.large(x)[:, :2] + sum(other(x) for other in self.others)
        return (self.small(x) + 1e-3 * faint,)


def test_what_costs_much_error_and_saves_little_work_stays_in_floats() -> None:
    x = torch.randn(8, 512)
    module = torch.export.export(Diluted().eval(), (), {"x": x}, strict=False).module(check_guards=False)
    seen = dict.fromkeys((name for name, _ in module.named_parameters() if "weight" in name), Range.of(x))
    with torch.no_grad():
        kept = costly(module, seen, {"x": x})  # type: ignore[arg-type]
    calibration = Calibration(bits=INT8, ranges=seen, kept=kept)
    (words,) = calibration.islands(module)  # type: ignore[arg-type]
    assert calibration.chosen == seen.keys() - {"small.weight"}
    assert words == "1 of 5 products: 100% of its squared error, 0.4% of the work"


def test_a_cheap_product_that_costs_nothing_goes_to_int8() -> None:
    x = torch.randn(8, 512)
    net = Diluted().eval()
    with torch.no_grad():
        net.small.weight /= 1e6
    module = torch.export.export(net, (), {"x": x}, strict=False).module(check_guards=False)
    seen = dict.fromkeys((name for name, _ in module.named_parameters() if "weight" in name), Range.of(x))
    with torch.no_grad():
        kept = costly(module, seen, {"x": x})  # type: ignore[arg-type]
    assert "small.weight" not in kept


@pytest.fixture
def linear(ranges: dict[str, Range]) -> dict[str, Range]:
    """What fp8 covers."""
    return {f"{name}.weight": ranges[f"{name}.weight"] for name in ("query", "key", "value")}


def test_linear_layers_are_close_in_fp8_and_convolutions_stay(
    program: Program, ranges: dict[str, Range], linear: dict[str, Range]
) -> None:
    assert products(program.module, FP8).keys() == linear.keys()
    with torch.no_grad():
        (exact,) = program.module(**program.inputs)
        module = quantize(program.module, ranges, bits=FP8)
        assert torch.equal(
            quantize(program.module, linear, bits=FP8)(**program.inputs)[0], module(**program.inputs)[0]
        )
        error = distance(module(**program.inputs)[0], exact)
    kinds = {name: value.dtype for name, value in module.named_parameters()}
    assert [kinds[f"{name}_weight_fp8"] for name in ("query", "key", "value")] == [torch.float8_e4m3fn] * 3
    assert kinds["first.weight"] == torch.float32
    assert 1e-4 < error < 3e-2


@pytest.mark.parametrize("end", [1.0, 448.0, 1e4, 1e-4])
def test_a_range_in_fp8_keeps_its_ends_and_saturates_beyond(end: float) -> None:
    seen = Range.of(torch.tensor([-end, end / 3]))
    x = torch.tensor([-end, 0.0, end, 2 * end, end / 16])
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    rounded = torch.ops.rt.linear_fp8(x[:, None], one, None, seen.largest / 448, 1.0)[:, 0]
    torch.testing.assert_close(rounded, torch.tensor([-end, 0.0, end, end, end / 16]), rtol=2**-4, atol=0.0)
    assert rounded[:4].tolist() == pytest.approx([-end, 0.0, end, end], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_products_of_tensor_cores_are_those_of_the_reference(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from rt.export.gpu_operators import linear_fp8

    x, bias = torch.randn(2, 40, 64).to(dtype), torch.randn(32)
    weight = torch.randn(32, 64).clamp(-448, 448).to(torch.float8_e4m3fn)
    for offset in (None, bias):
        expected = torch.ops.rt.linear_fp8(x, weight, offset, 3 / 448, 0.02)
        got = linear_fp8(x, weight, offset, 3 / 448, 0.02)
        assert got.shape == expected.shape == (2, 40, 32) and got.dtype == dtype
        assert distance(got.float(), expected.float()) < 1e-3


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_agree_with_torch_on_an_fp8_graph_whose_rest_is_fp16(
    program: Program, linear: dict[str, Range], tmp_path: Path, name: str
) -> None:
    module, islands = cast(
        quantize(program.module, linear, bits=FP8), DType.FP8, observe(program, torch.float16)
    )
    assert islands == ()
    with torch.no_grad():
        (expected,) = module(**program.inputs)
        (exact,) = program.module(**program.inputs)
    path = written(program, module, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    stored = [tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) == 64 * 64]
    assert stored == [onnx.TensorProto.FLOAT8E4M3FN] * 3
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path)).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    reads = [types[node.input[0]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert reads == [onnx.TensorProto.FLOAT16], "queries, keys and values read one tensor, in half"
    specs = [TensorSpec(name=key, shape=tuple(value.shape)) for key, value in program.inputs.items()]
    outputs = [TensorSpec(name="y", shape=tuple(expected.shape))]
    engine = get(name).load(path, specs, outputs, dtype=DType.FP8, threads=1)
    np.copyto(engine.inputs["x"], program.inputs["x"].numpy())
    engine.enqueue()
    got = torch.from_numpy(engine.outputs["y"])
    assert distance(got, expected) < 1e-2
    assert distance(got, exact) < 3e-2


class Loud(nn.Module):
    """Its first layer gives values beyond fp16, and the second brings them back."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.rise.weight.mul_(1e6)
            self.fall.weight.mul_(1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.fall(self.rise(x)),)


def test_an_fp8_layer_whose_values_leave_fp16_is_an_island(tmp_path: Path) -> None:
    net, x = Loud().eval(), torch.randn(32, 64)
    module = torch.export.export(net, (), {"x": x}, strict=False).module(check_guards=False)
    loud = Program(
        name="net", component=Component.UNET, profile=None, guided=False, module=module, inputs={"x": x},
        outputs=("y",),
    )  # fmt: skip
    with torch.no_grad():
        seen = {"rise.weight": Range.of(x), "fall.weight": Range.of(net.rise(x))}
        rounded = quantize(module, seen, bits=FP8)  # type: ignore[arg-type]
        (expected,) = rounded(x=x)
        half, islands = cast(rounded, DType.FP8, observe(loud, torch.float16))
        (got,) = half(x=x)
    assert [island.partition(": reach ")[0] for island in islands] == ["2 linear_fp8"]
    kinds = {name: weight.dtype for name, weight in half.named_parameters()}
    assert [kind for name, kind in kinds.items() if name.endswith("fp8")] == [torch.float8_e4m3fn] * 2
    session = onnxruntime.InferenceSession(written(loud, half, tmp_path), providers=["CPUExecutionProvider"])
    for result in (got, torch.from_numpy(session.run(None, {"x": x.numpy()})[0])):
        assert distance(result, expected) < 5e-3


@pytest.mark.slow
def test_an_fp8_bundle_has_its_linear_layers_in_fp8_and_is_near(
    build_bundle: Callable[..., Path], demo_model: Path
) -> None:
    path = build_bundle(demo_model, dtype="fp8")
    for record in Bundle.open(path).manifest.engines:
        kinds = {tensor.data_type for tensor in onnx.load(path / record.forms[Form.ONNX]).graph.initializer}
        assert (onnx.TensorProto.FLOAT8E4M3FN in kinds) == (record.component is Component.UNET)
        assert (onnx.TensorProto.FLOAT16 in kinds) == (record.component is not Component.UNET_TIME)
        assert max(record.error.values()) < TOLERANCE[DType.FP8] / 2
        if record.component is Component.UNET:
            assert max(record.error.values()) > 2e-3


@pytest.fixture(scope="module")
def int8_bundle(build_bundle: Callable[..., Path], demo_model: Path) -> Path:
    return build_bundle(demo_model, dtype="int8")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_an_int8_bundle_is_as_near_as_it_says_in_every_engine(int8_bundle: Path, backend: str) -> None:
    bundle = Bundle.open(int8_bundle)
    for record in bundle.manifest.engines:
        engine = get(backend).load(
            bundle.path / record.forms[Form.ONNX],
            record.inputs,
            record.outputs,
            dtype=record.dtype,
            threads=1,
        )
        errors = compare(engine, bundle.path / record.reference, name=record.name, dtype=record.dtype)
        assert max(errors.values()) < 1.5 * max(record.error.values()) + 1e-6


@pytest.mark.slow
def test_an_int8_bundle_has_its_unet_in_int8_and_says_what_is_not(
    int8_bundle: Path, demo_bundle: Path
) -> None:
    manifest, full = Bundle.open(int8_bundle).manifest, Bundle.open(demo_bundle).manifest
    for record in manifest.engines:
        kinds = {
            tensor.data_type for tensor in onnx.load(int8_bundle / record.forms[Form.ONNX]).graph.initializer
        }
        assert (onnx.TensorProto.INT8 in kinds) == (record.component is Component.UNET)
        assert record.dtype is (DType.FP32 if record.component is Component.UNET_TIME else DType.INT8)
        assert bool(record.islands) == (record.component is Component.UNET)
        if record.component is Component.UNET:
            assert 5e-3 < max(record.error.values()) < TOLERANCE[DType.INT8] / 2
            assert " of 106 products: " in record.islands[0]
    size = {
        name: bundle.files["engines/unet.weights"].size_bytes
        for name, bundle in (("int8", manifest), ("full", full))
    }
    assert size["int8"] < 0.35 * size["full"]
