"""A `Program` to an ONNX graph whose weights live in a file shared by all graphs of its component."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript.optimizer import optimize_ir
from torch import nn

from rt.export.operators import DOMAIN, functions, translations
from rt.export.passes.quantize import IN_ONNX
from rt.export.program import Program
from rt.export.torch_rework import without_rework

# The newest that every engine we target reads whole: GroupNormalization and Gelu stay single operators,
# attention becomes MatMul and Softmax, which they fuse themselves.
OPSET = 21
# onnxruntime maps weights from the file when they begin on a page.
_ALIGNMENT = 4096
_SMALL_ALIGNMENT = 64
INLINE_BYTES = 1024


class WeightFile:
    """Tensors in one file, each distinct content once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("xb")
        self._offsets: dict[bytes, int] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def flush(self) -> None:
        """Hand what was added to the file system, so that an engine can be loaded."""
        self._file.flush()

    def place(self, array: NDArray[Any]) -> int:
        """Write the bytes of `array` unless they are there already; gives their offset."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in self._offsets:
            alignment = _ALIGNMENT if len(data) > INLINE_BYTES else _SMALL_ALIGNMENT
            self._file.write(b"\0" * (-self._file.tell() % alignment))
            self._offsets[digest] = self._file.tell()
            self._file.write(data)
        return self._offsets[digest]

    def add(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """`tensor` as a reference into the file."""
        array = tensor.numpy()
        return ir.ExternalTensor(
            location=self.path.name,
            offset=self.place(array),
            length=array.nbytes,
            dtype=tensor.dtype,
            shape=ir.Shape(array.shape),
            name=tensor.name or "",
            base_dir=self.path.parent,
        )


def lower(program: Program, module: nn.Module, weights: WeightFile, path: Path) -> None:
    """Write `module`, which computes `program` in its final precision, as `path`."""
    with torch.no_grad(), _quiet(), without_rework():
        exported = torch.export.export(module, (), dict(program.inputs), strict=False)
        onnx_program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            output_names=list(program.outputs),
            optimize=False,
            verbose=False,
            custom_translation_table=translations() | IN_ONNX,
        )
    assert onnx_program is not None
    model = onnx_program.model
    # One round of folding and rewriting; a second takes as long and finds only names to drop.
    optimize_ir(model, num_iterations=1)
    for initializer in model.graph.initializers.values():
        value = initializer.const_value
        if value is not None and value.nbytes > INLINE_BYTES:
            initializer.const_value = weights.add(value)
    weights.flush()
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for function in functions():
        if function.name in used:
            model.functions[function.identifier()] = function
    _anonymise(model)
    ir.save(model, path)


def _anonymise(model: ir.Model) -> None:
    """Drop the stack traces that the exporter attaches: paths of the build machine, and most of the file."""
    model.producer_name, model.producer_version, model.doc_string = "rt", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals and of torchvision, which nobody here needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
