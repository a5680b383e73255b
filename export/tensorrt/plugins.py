"""Our Triton kernels as quickly deployable plugins of TensorRT: their PTX becomes part of the plan.

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/extending-custom-layers.html

A plugin of this kind is one kernel, whose arguments are the inputs, 32-bit integers, the outputs: those of a
`KernelSpec`. Everything else is compiled in. Neither Python nor a plugin library is needed to run the plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from rt.errors import BuildError
from rt.export.operators import DOMAIN
from rt.export.tensorrt.operators import OPERATORS, FusedOperator
from rt.expression import evaluate
from rt.kernel_image import integers
from rt.kernels.aot import CAPABILITIES, Compiled, compile_case
from rt.kernels.registry import spec as kernel
from rt.kernels.spec import Case, KernelSpec

TACTIC = 1
"""The only one: a kernel comes in the form that its own tuning chose."""


@dataclass
class _Target:
    """What plugins are compiled for: they are registered once a process, which may build for several GPUs."""

    capability: int


_target = _Target(max(CAPABILITIES))


def register(capability: int) -> None:
    """Make the plugins known to TensorRT, compiled from now on for GPUs of `capability`.

    Raises:
        BuildError: There are no kernels for it.
    """
    oldest = min(CAPABILITIES)
    if capability < oldest:
        raise BuildError(f"no kernels for compute capability {capability}; they are for {[*CAPABILITIES]}")
    same = [known for known in CAPABILITIES if known // 10 == capability // 10 and known <= capability]
    # The plan holds PTX, and the oldest of ours is good for GPUs that we do not know.
    _target.capability = max(same, default=oldest)
    _register_once()


@cache
def _register_once() -> None:
    trt, plugin = import_module("tensorrt"), import_module("tensorrt.plugin")
    for operator in OPERATORS.values():
        _Plugin(trt, plugin, operator).register()


class _Plugin:
    """One operator in the terms of `tensorrt.plugin`.

    TensorRT reads parameters from the signatures of its callbacks, so these are given to functions of any arguments.
    """

    def __init__(self, trt: Any, plugin: Any, operator: FusedOperator) -> None:
        self._trt, self._plugin, self._operator = trt, plugin, operator
        self._spec: KernelSpec = kernel(operator.kernel)
        self._dtypes = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}

    def register(self) -> None:
        """Register, and say which formats there are and how it is launched."""
        plugin = self._plugin
        name = f"{DOMAIN}::{self._operator.kernel}"
        outputs = inspect.Parameter("outputs", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        tactic = inspect.Parameter("tactic", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=int)
        # As values: to a type checker they are whatever TensorRT has.
        launch: Any = tuple.__class_getitem__(
            (str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymExprs)
        )
        formats: Any = list.__class_getitem__(plugin.AutoTuneCombination)
        plugin.register(name)(self._signed(self._describe, [], plugin.TensorDesc))
        plugin.autotune(name)(self._signed(self._formats, [outputs], formats))
        plugin.aot_impl(name)(self._signed(self._launch, [outputs, tactic], launch))

    def _signed(
        self, function: Callable[..., Any], more: Sequence[inspect.Parameter], result: Any
    ) -> Callable[..., Any]:
        """`function` with the parameters that TensorRT expects: tensors, attributes, and `more`."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        tensors = [
            inspect.Parameter(argument.name, kind, annotation=self._plugin.TensorDesc)
            for argument in self._spec.inputs
        ]
        attributes = [
            inspect.Parameter(name, kind, annotation=annotation)
            for name, annotation in self._operator.attributes.items()
        ]

        def callback(*values: Any, **named: Any) -> Any:
            bound = signature.bind(*values, **named).arguments
            given = list(bound.values())
            count = len(tensors)
            chosen = {name: bound[name] for name in self._operator.attributes}
            return function(given[:count], chosen, *given[count + len(chosen) :])

        signature = inspect.Signature([*tensors, *attributes, *more], return_annotation=result)
        callback.__signature__ = signature  # type: ignore[attr-defined]
        return callback

    def _describe(self, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        """The output from the inputs: like the first, GEGLU half as wide."""
        output = tensors[0].like()
        if self._operator.kernel == "geglu":
            shape = output.shape_expr
            shape[len(shape) - 1] = shape[len(shape) - 1] // 2
        return output

    def _formats(
        self, tensors: Sequence[Any], attributes: Mapping[str, Any], outputs: Sequence[Any]
    ) -> list[Any]:
        """Both halves, row-major; what the spec fixes stays as it is."""
        both = "|".join(("FP16", "BF16"))
        arguments = (*self._spec.inputs, *self._spec.outputs)
        types = ", ".join(both if argument.dtype == "T" else "FP32" for argument in arguments)
        return [self._plugin.AutoTuneCombination(types, "LINEAR", [TACTIC])]

    def _launch(
        self, tensors: Sequence[Any], attributes: Mapping[str, Any], outputs: Sequence[Any], tactic: int
    ) -> tuple[str, str, Any, Any]:
        """The kernel for these shapes; grid and integers as formulas over them."""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if any(size < 0 for shape in shapes for size in shape):
            raise BuildError(f"plugin {self._operator.kernel} needs static shapes, got {shapes}")
        case = self._operator.case(self._without_zeros(shapes), attributes, self._dtypes[tensors[0].dtype])
        compiled = compiled_case(self._spec, case, _target.capability)
        image = compiled.image
        symbolic = self._operator.sizes(
            self._without_zeros([list(tensor.shape_expr) for tensor in tensors]), attributes
        )
        names = {**integers(self._spec.constants(case)), **symbolic}
        symbols = {name: self._symbol(number) for name, number in names.items()}
        functions = {"cdiv": self._plugin.cdiv, "min": self._plugin.min, "max": self._plugin.max}
        launch = self._plugin.KernelLaunchParams()
        for axis, text in zip(("grid_x", "grid_y", "grid_z"), image.grid, strict=False):
            setattr(launch, axis, evaluate(text, symbols, functions))
        launch.block_x = image.threads
        launch.shared_mem = image.shared_bytes
        scalars = self._plugin.SymIntExprs(len(image.scalars))
        for index, text in enumerate(image.scalars.values()):
            scalars[index] = self._plugin.SymInt32(evaluate(text, symbols, functions))
        return image.symbol, compiled.ptx, launch, scalars

    def _without_zeros(self, shapes: Sequence[Any]) -> list[Any]:
        """The shapes of what the node of the graph has."""
        added = {position for position, _ in self._operator.zeros}
        return [shape for position, shape in enumerate(shapes) if position not in added]

    def _symbol(self, number: Any) -> Any:
        """TensorRT's functions take no two plain integers, so all are made symbolic."""
        return self._plugin.ShapeExpr(number) if isinstance(number, int) else number


_COMPILED: dict[tuple[str, str, int], Compiled] = {}


def compiled_case(spec: KernelSpec, case: Case, capability: int) -> Compiled:
    """`compile_case`, once a case and process: TensorRT asks for the same kernel several times."""
    key = (spec.name, str(case), capability)
    if key not in _COMPILED:
        _COMPILED[key] = compile_case(spec, case, capability)
    return _COMPILED[key]
