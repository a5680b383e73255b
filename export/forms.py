"""What a build writes of a program beside ONNX, by the backend that it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from rt.backends import Form
from rt.config import BuildConfig
from rt.export.lower import WeightFile
from rt.export.program import Program

Writer = Callable[[Program, nn.Module, WeightFile, Path, BuildConfig], Mapping[Form, str]]
"""(program, the module that computes it in its final precision, the component's weights, folder, config) → form to the
name of the file that was written into the folder. In half precision a program with pixels comes channels last and with
the operators of `rt.export.operators`."""

WRITERS: Mapping[str, Writer] = {}
"""Name of a backend to what it wants; the others read ONNX alone."""
