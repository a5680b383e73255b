"""ONNX Runtime on the CPU in fp32, all optimisations on.

https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html
"""

from __future__ import annotations

import onnxruntime

from rt.bench.peers.by_hand import ByHand, Graph
from rt.bench.peers.onnx_graphs import PARTS, export
from rt.bench.peers.peer import Float32, Setting


def prepare(setting: Setting) -> None:
    """Export the graphs."""
    export(setting.checkpoint, setting.work)


def load(setting: Setting) -> ByHand:
    """No options."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    folder = export(setting.checkpoint, setting.work)

    def open_graph(name: str) -> Graph:
        session = onnxruntime.InferenceSession(
            folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )

        def run(inputs: object) -> Float32:
            output: Float32 = session.run(None, inputs)[0]
            return output

        return run

    return ByHand(setting.checkpoint, {name: open_graph(name) for name in PARTS})
