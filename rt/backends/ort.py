"""What the backends of ONNX Runtime share: a graph that is loaded once and bound once to memory of a host or a device.

https://onnxruntime.ai/docs/api/python/api_summary.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rt.backends.base import failure
from rt.errors import BackendError
from rt.process import library

Provider = tuple[str, Mapping[str, str]]
"""Its name and its options, as the library wants them."""


class Memory(NamedTuple):
    """Where a tensor lies: its format as numpy's scalar type, its shape in elements, and its address."""

    kind: type[Any]
    shape: tuple[int, ...]
    address: int


class Session:
    """A graph whose inputs and outputs stay where they were bound.

    Args:
        path: The graph; its weights are found from there.
        provider: That computes it, all of it on a GPU.
        threads: Of the host.
        run: Options of every run.

    Raises:
        BackendError: The library refuses the graph, or cannot load the provider.
        MemoryError: There is no room for it.
    """

    def __init__(
        self, path: Path, provider: Provider, *, threads: int, run: Mapping[str, str] | None = None
    ) -> None:
        onnxruntime = imported()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # fatal only: it raises what it would log
        self._path, self._options = path, onnxruntime.RunOptions()
        for key, value in (run or {}).items():
            self._options.add_run_config_entry(key, value)
        name, given = provider
        try:
            with library:
                # Else it would go on with another provider, and print that it does.
                self._session = onnxruntime.InferenceSession(
                    path, options, providers=[(name, dict(given))], enable_fallback=0
                )
        except Exception as error:  # its exceptions share no base class but Exception
            raise failure(f"onnxruntime cannot load {path}", error, one_line(error)) from error
        if name not in self._session.get_providers():
            # A library that it needs is missing, which the session logs, and goes on without.
            raise BackendError(f"onnxruntime cannot load its {name}; rt doctor says what is missing")
        self._binding = self._session.io_binding()

    def bind(self, device: str, inputs: Mapping[str, Memory], outputs: Mapping[str, Memory]) -> None:
        """Have it read and write there from now on; `device` is "cpu" or "cuda".

        Raises:
            BackendError: The graph has no tensor of that name.
        """
        sides: Sequence[tuple[Any, Mapping[str, Memory]]] = (
            (self._binding.bind_input, inputs),
            (self._binding.bind_output, outputs),
        )
        for bind, tensors in sides:
            for name, memory in tensors.items():
                try:
                    bind(name, device, 0, memory.kind, memory.shape, memory.address)
                except Exception as error:
                    raise failure(f"{self._path} has no {name}", error, one_line(error)) from error

    def run(self) -> None:
        """Run once."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise failure("onnxruntime failed while running", error, one_line(error)) from error


def imported() -> Any:
    """The library, without its usage statistics: they use the network, and their threads keep a forked child alive.

    https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return import_module("onnxruntime")


def one_line(error: Exception) -> str:
    """What it says, without the line breaks."""
    return " ".join(str(error).split())
