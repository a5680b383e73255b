"""OpenVINO on the CPU, called by hand: from the ONNX graphs, or from its own format with weights in fp16.

https://docs.openvino.ai/2026/openvino-workflow/running-inference.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from rt.bench.peers.by_hand import ByHand, Graph
from rt.bench.peers.once import make_once
from rt.bench.peers.onnx_graphs import PARTS, export
from rt.bench.peers.peer import Float32, Setting


def prepare(setting: Setting) -> None:
    """Export the graphs, and convert them where the IR is asked for."""
    _graphs(setting)


def load(setting: Setting) -> ByHand:
    """Options: `precision` as OpenVINO names it; `ir`, whether to read its own format with fp16 weights."""
    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": setting.options["precision"],
        "INFERENCE_NUM_THREADS": setting.threads,
    }
    graphs = _graphs(setting)
    return ByHand(setting.checkpoint, {name: _open(core, graphs[name], options) for name in PARTS})


def _open(core: openvino.Core, graph: Path, options: Mapping[str, Any]) -> Graph:
    request = core.compile_model(graph, "CPU", options).create_infer_request()

    def run(inputs: Mapping[str, Any]) -> Float32:
        request.get_output_tensor().data[...] = np.nan  # an output that is left alone must not pass
        output: Float32 = request.infer(inputs)[0]
        return output

    return run


def _graphs(setting: Setting) -> dict[str, Path]:
    onnx = export(setting.checkpoint, setting.work)
    if not setting.options.get("ir"):
        return {name: onnx / f"{name}.onnx" for name in PARTS}

    def write(folder: Path) -> None:
        core = openvino.Core()
        for name in PARTS:
            openvino.save_model(
                core.read_model(onnx / f"{name}.onnx"), folder / f"{name}.xml", compress_to_fp16=True
            )

    ir = make_once(setting.work / "ir", write)
    return {name: ir / f"{name}.xml" for name in PARTS}
