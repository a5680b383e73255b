"""An `onnxruntime` for GPUs that records; it computes with the real one, when the device's stream comes to that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


@dataclass
class Fake:
    """The module's memory, and what tests bend.

    Attributes:
        device: A `HostDevice`, in whose streams sessions run.
        calls: (what, arguments) in order.
        offered: Providers that the wheel has.
        loads: Providers whose libraries are found.
        failing: Call ("InferenceSession" or "run") to the error that it raises.
        compile: What a provider does with its options while a session is made.
        folder: Where the package lies.
    """

    device: Any
    calls: list[tuple[str, Any]] = field(default_factory=list)
    offered: tuple[str, ...] = (TENSORRT, CUDA, CPU)
    loads: tuple[str, ...] = (TENSORRT, CUDA)
    failing: dict[str, Exception] = field(default_factory=dict)
    compile: Callable[[Mapping[str, str]], None] = lambda options: None
    folder: Path = Path("/nowhere")

    def named(self, name: str) -> list[Any]:
        """Arguments of every call of that name."""
        return [arguments for called, arguments in self.calls if called == name]

    def module(self) -> ModuleType:
        """To be put into `sys.modules`."""
        fake = self
        made: Any = ModuleType("onnxruntime")
        made.__file__ = str(self.folder / "__init__.py")
        made.cuda_version, made.fake = "13.0", fake
        made.get_available_providers = lambda: list(fake.offered)
        made.SessionOptions = onnxruntime.SessionOptions

        class RunOptions:
            def __init__(self) -> None:
                self.entries = dict[str, str]()

            def add_run_config_entry(self, key: str, value: str) -> None:
                self.entries[key] = value

        class Binding:
            def __init__(self, real: Any) -> None:
                self.real = real

            def bind_input(self, *tensor: Any) -> None:
                self.bind("bind_input", *tensor)

            def bind_output(self, *tensor: Any) -> None:
                self.bind("bind_output", *tensor)

            def bind(self, how: str, name: str, device: str, index: int, *where: Any) -> None:
                fake.calls.append((how, (name, device, index, *where)))
                getattr(self.real, how)(name, "cpu", 0, *where)

        class InferenceSession:
            def __init__(self, path: Path, options: Any, *, providers: Any, enable_fallback: int) -> None:
                [(self.provider, given)] = providers
                assert not enable_fallback, "with it, the library goes on with another provider"
                fake.calls.append(("InferenceSession", (Path(path).name, self.provider, given)))
                fake.compile(given)
                if "InferenceSession" in fake.failing:
                    raise fake.failing["InferenceSession"]
                self.stream = int(given.get("user_compute_stream", 0))
                self.real = onnxruntime.InferenceSession(path, options, providers=[CPU])

            def get_providers(self) -> list[str]:
                return [*({self.provider} & {*fake.loads}), CPU]

            def io_binding(self) -> Binding:
                return Binding(self.real.io_binding())

            def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
                fake.calls.append(("run", (self.stream, options.entries)))
                if "run" in fake.failing:
                    raise fake.failing["run"]
                if self.provider == CPU:
                    self.real.run_with_iobinding(binding.real)
                    return
                fake.device._outside_capture("the provider's graph")  # CUDA failure 900
                fake.device.run("session", lambda: self.real.run_with_iobinding(binding.real), self.stream)

        def preload_dlls() -> None:
            print("Failed to load somewhere/libcufft.so.12")  # as the real one does
            fake.calls.append(("preload_dlls", ()))

        for part in (RunOptions, InferenceSession, preload_dlls):
            setattr(made, part.__name__, part)
        return made  # type: ignore[no-any-return]
