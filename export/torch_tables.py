"""Tables that torch makes anew all the time while it exports to ONNX, made once.

Each `torch.onnx.export` parses the source of 500 translations, and looks up every composite operator of the dispatcher
sixty times: three quarters of what exporting a small network takes, and a build exports six to thirty. Neither is part
of torch's interface. Where a version of torch has them elsewhere, it makes them as often as it likes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

_TRANSLATIONS: dict[int, Any] = {}


@contextmanager
def tables_made_once() -> Iterator[None]:
    """Exports inside share their tables; what an export adds to one stays its own."""
    with ExitStack() as undo:
        undo.enter_context(_replaced("torch._export.utils", "_materialize_cpp_cia_ops", _once))
        undo.enter_context(
            _replaced("torch.onnx._internal.exporter._registration:ONNXRegistry", "from_torchlib", _shared)
        )
        yield


@contextmanager
def _replaced(owner: str, name: str, replacement: Any) -> Iterator[None]:
    """`name` of a module, or of a class `module:Class`, replaced by what `replacement` makes of it."""
    module, _, kind = owner.partition(":")
    try:
        place = getattr(import_module(module), kind) if kind else import_module(module)
        new = replacement(getattr(place, name))
    except (ImportError, AttributeError):
        yield
        return
    old = place.__dict__[name]
    setattr(place, name, new)
    try:
        yield
    finally:
        setattr(place, name, old)


def _once(look_up: Any) -> Any:
    """All composite operators become attributes of `torch.ops` at the first call."""
    done: list[None] = []

    def look_up_once() -> None:
        if not done:
            done.append(look_up())

    return look_up_once


def _shared(make: Any) -> Any:
    """The registry of an opset: a copy, because `custom_translation_table` is written into it."""

    def from_torchlib(opset_version: int) -> Any:
        if opset_version not in _TRANSLATIONS:
            _TRANSLATIONS[opset_version] = make(opset_version=opset_version)
        registry = copy.copy(_TRANSLATIONS[opset_version])
        registry.functions = {target: [*found] for target, found in registry.functions.items()}
        return registry

    return staticmethod(from_torchlib)
