"""For each fused operator and shape of a graph: is our plugin faster, or what TensorRT makes of standard operators?

A plugin is a wall to TensorRT's own fusion, and its own kernels are good, so neither is right for all. Each candidate
is a network of that one node, timed on the GPU; what was found is kept for later builds.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from rt.backends.tensorrt import CLASSIC, TensorRT
from rt.config import DType
from rt.cuda import Device, Graph, Stream, capture
from rt.export.lower import OPSET
from rt.export.operators import DOMAIN, VERSION, functions
from rt.export.tensorrt.graph import HALVES, FusedNode, fused_nodes, with_plugins
from rt.export.tensorrt.plan import Options, build_plan
from rt.kernels.library import source_digest
from rt.shapes import TensorSpec

RUNS, REPEATS = 20, 7
"""Runs in one graph, and how often that is timed."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was measured of one operator at one shape, in microseconds a run."""

    key: str
    plugin_us: float
    native_us: float

    @property
    def plugin(self) -> bool:
        """Whether ours is kept."""
        return self.plugin_us < self.native_us

    def __str__(self) -> str:
        kept = "plugin" if self.plugin else "native"
        return f"{self.key}: plugin {self.plugin_us:.1f} µs, native {self.native_us:.1f} µs, kept {kept}"

    @staticmethod
    def native(choices: Iterable[Choice]) -> set[str]:
        """Keys of those that stay standard operators."""
        return {choice.key for choice in choices if not choice.plugin}


Timer = Callable[[Sequence[Path]], Sequence[float]]
"""Graphs of one node each → microseconds a run, timed in turn."""


def choose_plugins(fused: Path, options: Options, timer: Timer | None = None) -> list[Choice]:
    """One choice for each operator and shape in the graph, in its order; those that are known are not timed again.

    Args:
        fused: A graph with nodes `rt::…`.
        options: As the plan will be built.
        timer: Of one-node graphs; on the GPU if left out.
    """
    known = _read(options)
    measure = timer or (lambda graphs: time_graphs(graphs, options))
    choices = {}
    for found in fused_nodes(ir.load(fused)):
        if found.key not in choices:
            choices[found.key] = known.get(found.key) or _measure(found, measure)
    _write(options, known | choices)
    return list(choices.values())


def one_node(found: FusedNode) -> ir.Model:
    """A graph of that node alone, every tensor an input, with the function that it stands for."""
    inputs = [
        ir.Value(name=f"x{index}", shape=value.shape, type=value.type)
        for index, value in enumerate(found.node.inputs)
        if value is not None
    ]
    output = ir.Value(name="y", shape=found.node.outputs[0].shape, type=found.node.outputs[0].type)
    node = ir.Node(
        DOMAIN,
        found.operator.node,
        inputs,
        list(found.node.attributes.values()),
        outputs=[output],
        name="node",
    )
    graph = ir.Graph(inputs, [output], nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION}, name="one")
    bodies = [function for function in functions() if function.name == found.operator.node]
    return ir.Model(graph, ir_version=10, functions=bodies)


def time_graphs(graphs: Sequence[Path], options: Options) -> list[float]:
    """Microseconds a run of each graph's plan on this machine's GPU, without launch overhead: medians, in turn."""
    with ExitStack() as stack:
        backend = TensorRT(CLASSIC)
        device = backend.open_device()
        stack.callback(device.close)
        stream = device.create_stream()
        stack.callback(device.destroy_stream, stream)
        runs = [_captured(graph, options, backend, device, stream, stack) for graph in graphs]
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(REPEATS):
            for run, taken in zip(runs, seconds, strict=True):
                started = time.perf_counter()
                run.launch(stream)
                device.synchronise(stream)
                taken.append(time.perf_counter() - started)
        return [statistics.median(taken) / RUNS * 1e6 for taken in seconds]


def _captured(
    graph: Path, options: Options, backend: TensorRT, device: Device, stream: Stream, stack: ExitStack
) -> Graph:
    """`RUNS` runs of the plan of `graph`, whatever it holds given back by `stack`."""
    plan = graph.with_suffix(".plan")
    build_plan(CLASSIC, graph, plan, options)
    inputs, outputs = _specs(ir.load(graph))
    engine = backend.load_on(device, plan, inputs, outputs, dtype=DType.FP16)
    stack.callback(engine.close)
    engine.enqueue(stream)
    device.synchronise(stream)

    def run_often() -> None:
        for _ in range(RUNS):
            engine.enqueue(stream)

    many = capture(device, stream, run_often)
    stack.callback(many.close)
    return many


def _measure(found: FusedNode, measure: Timer) -> Choice:
    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder, "native.onnx")
        ir.save(one_node(found), native)
        with with_plugins(native) as plugin:
            plugin_us, native_us = measure([plugin, native])
        return Choice(key=found.key, plugin_us=plugin_us, native_us=native_us)


def _specs(model: ir.Model) -> tuple[list[TensorSpec], list[TensorSpec]]:
    def spec(value: ir.Value) -> TensorSpec:
        assert value.shape is not None and value.dtype is not None
        kind = HALVES.get(value.dtype, "float32")
        return TensorSpec(name=str(value.name), shape=tuple(value.shape.numpy()), dtype=kind)

    return [spec(value) for value in model.graph.inputs], [spec(value) for value in model.graph.outputs]


def _file(options: Options) -> Path | None:
    """Beside the timings of tactics, for the same library and GPU; another one for other kernels or options."""
    if options.timing_cache is None:
        return None
    of = hashlib.sha256(f"{source_digest([])} {options.refittable} {options.portable}".encode()).hexdigest()
    return options.timing_cache.with_suffix(f".plugins-{of[:8]}.json")


def _read(options: Options) -> dict[str, Choice]:
    """What earlier builds found; a file that cannot be read is worth no more than none."""
    file = _file(options)
    try:
        entries = json.loads(file.read_text()) if file else []
        return {entry["key"]: Choice(**entry) for entry in entries}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write(options: Options, choices: dict[str, Choice]) -> None:
    file = _file(options)
    if file is None:
        return
    entries = [
        {"key": choice.key, "plugin_us": choice.plugin_us, "native_us": choice.native_us}
        for choice in choices.values()
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries, indent=1) + "\n")
