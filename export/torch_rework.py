"""What torch does again and again while it traces and exports, done once or where it changes something.

Each `torch.onnx.export` parses the source of 500 translations, looks up every composite operator of the dispatcher
sixty times, and traces the program two more times to decompose what has no translation, of which our programs have
nothing; each trace keeps for every operator where in the source it was called, which `lower` drops. That is most of
what an export takes, and a build has six to thirty. None of it is part of torch's interface: where a version of torch
has it elsewhere, it does it as often as it likes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

_EXPORTER = "torch.onnx._internal.exporter"
_TRANSLATIONS: dict[int, Any] = {}


@contextmanager
def without_rework() -> Iterator[None]:
    """Traces and exports inside share their tables; what an export adds to one stays its own."""
    with ExitStack() as undo:
        for owner, name, replacement in (
            ("torch._export.utils", "_materialize_cpp_cia_ops", _once),
            (f"{_EXPORTER}._registration:ONNXRegistry", "from_torchlib", _shared),
            (f"{_EXPORTER}._fx_passes", "decompose_with_registry", _where_needed),
            ("torch.fx.config", "do_not_emit_stack_traces", lambda emitted: True),
        ):
            undo.enter_context(_replaced(owner, name, replacement))
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


def _where_needed(decompose: Any) -> Any:
    """A program whose every operator has a translation, and leaves its inputs alone, stays as it is."""

    def decompose_where_needed(program: Any, registry: Any) -> Any:
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        ready = all(registry.is_registered(target) and not _writes(target) for target in targets)
        return program if ready else decompose(program, registry)

    return decompose_where_needed


def _writes(target: Any) -> bool:
    """Whether it is an operator that changes an input in place, which decomposing makes one that does not."""
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))
