"""Work that torch repeats while it traces and exports, done once, or only where it has an effect.

Each `torch.onnx.export` parses the source of 500 translations, looks up every composite operator of the dispatcher
sixty times, and traces the program two more times to decompose operators without a translation, of which our programs
have none; each trace keeps for every operator where in the source it was called, which `lower` drops. That is most of
what an export takes, and a build has six to thirty. None of it is part of torch's interface: where a version of torch
has it elsewhere, it does it as often as it likes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

_EXPORTER = "torch.onnx._internal.exporter"
_TRANSLATIONS: dict[Any, Any] = {}
_LOCK = threading.RLock()  # two at once would take each other's replacements for torch's own


@contextmanager
def without_rework() -> Iterator[None]:
    """Traces and exports inside share their tables; what an export adds to one stays its own.

    A program whose operators all have translations is not decomposed. An error names no line of the model.
    """
    with _LOCK, ExitStack() as undo:
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
        old = vars(place)[name]
        new = replacement(getattr(place, name))  # of a class method, bound to the class
    except (ImportError, AttributeError, KeyError, TypeError):
        yield
        return
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

    def from_torchlib(*given: int, **named: int) -> Any:
        key = given, tuple(named.items())
        if key not in _TRANSLATIONS:
            _TRANSLATIONS[key] = make(*given, **named)
        registry = copy.copy(_TRANSLATIONS[key])
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
