"""A `tensorrt` that records what is asked of it. Its plans are text: one line a tensor, and what the engine needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class _Enum(SimpleNamespace):
    """Members by name, as pybind's enums have them."""

    @property
    def __members__(self) -> dict[str, Any]:
        return vars(self)


@dataclass
class Plan:
    """An engine in the file: what it needs while it runs, and its tensors as (name, dtype, shape)."""

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    needs: int = 0
    refittable: bool = False

    def to_bytes(self) -> bytes:
        return repr((self.tensors, self.needs, self.refittable)).encode()


@dataclass
class Fake:
    """The module's memory, and what tests bend.

    Attributes:
        calls: (what, arguments) in order.
        fails: Names of calls that fail, as the library fails: with None or False, and a line in its log.
        parser_errors: Of the ONNX parser: (description, operator, node).
        missing: Weights that a refit leaves out.
        run: What an engine does when it is executed, given the addresses of its tensors.
    """

    calls: list[tuple[str, Any]] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)
    parser_errors: list[tuple[str, str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    run: Callable[[dict[str, int]], None] = lambda addresses: None
    flags: tuple[str, ...] = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")

    def named(self, name: str) -> list[Any]:
        """Arguments of every call of that name."""
        return [arguments for called, arguments in self.calls if called == name]

    def module(self, name: str = "tensorrt") -> ModuleType:
        """To be put into `sys.modules`."""
        fake = self
        made: Any = ModuleType(name)
        made.__version__ = "11.4.0.106"
        for dtype in ("float32", "float16", "bfloat16", "int64"):
            setattr(made, dtype, dtype)
        made.NetworkDefinitionCreationFlag = _Enum(**{flag: 2 * i for i, flag in enumerate(fake.flags)})
        made.BuilderFlag = _Enum(
            TF32="TF32", REFIT="REFIT", REQUIRE_USER_ALLOCATION="REQUIRE_USER_ALLOCATION"
        )
        made.HardwareCompatibilityLevel = _Enum(AMPERE_PLUS="AMPERE_PLUS")
        made.ExecutionContextAllocationStrategy = _Enum(USER_MANAGED="USER_MANAGED")

        class ILogger:
            def __init__(self) -> None: ...

        def attempt(logger: Any, name: str, result: Any, *arguments: Any, failure: Any = None) -> Any:
            fake.calls.append((name, arguments))
            if name in fake.fails:
                logger.log(SimpleNamespace(name="ERROR"), f"{name} went\n wrong")
                return failure
            return result

        class Context:
            def __init__(self, logger: Any) -> None:
                self.logger, self.addresses = logger, dict[str, int]()

            def set_tensor_address(self, name: str, address: int) -> None:
                fake.calls.append(("set_tensor_address", (name, address)))
                self.addresses[name] = address

            def set_device_memory(self, address: int, size: int) -> None:
                fake.calls.append(("set_device_memory", (address, size)))

            def execute_async_v3(self, stream: int) -> bool:
                fake.run(self.addresses)
                return bool(attempt(self.logger, "execute_async_v3", True, stream, failure=False))

        class Engine:
            def __init__(self, logger: Any, raw: bytes) -> None:
                self.logger, self.raw = logger, raw
                self.tensors, self.device_memory_size_v2, self.refittable = eval(raw)
                self.kinds = {name: (kind, shape) for name, kind, shape in self.tensors}

            def get_tensor_dtype(self, name: str) -> str:
                return str(self.kinds[name][0])

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                return tuple(self.kinds[name][1])

            def create_execution_context(self, strategy: str) -> Any:
                return attempt(self.logger, "create_execution_context", Context(self.logger), strategy)

            def serialize(self) -> bytes:
                return self.raw + b" refitted"

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, raw: bytes) -> Any:
                made = None if "deserialize" in fake.fails else Engine(self.logger, raw)
                return attempt(self.logger, "deserialize", made)

        class Cache:
            def __init__(self, content: bytes) -> None:
                self.content = content

            def serialize(self) -> bytes:
                return self.content + b"+"

        class Config:
            def __init__(self) -> None:
                self.cache: Any = None

            def __setattr__(self, name: str, value: Any) -> None:
                if name == "hardware_compatibility_level":
                    fake.calls.append((name, (value,)))
                object.__setattr__(self, name, value)

            def clear_flag(self, flag: str) -> None:
                fake.calls.append(("clear_flag", (flag,)))

            def set_flag(self, flag: str) -> None:
                fake.calls.append(("set_flag", (flag,)))

            def create_timing_cache(self, content: bytes) -> Cache:
                return Cache(content)

            def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
                fake.calls.append(("set_timing_cache", (cache.content, ignore_mismatch)))
                if cache.content and "set_timing_cache" in fake.fails:
                    return False
                self.cache = cache
                return True

            def get_timing_cache(self) -> Cache:
                return self.cache

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def create_network(self, flags: int) -> object:
                fake.calls.append(("create_network", (flags,)))
                return object()

            def create_builder_config(self) -> Config:
                return Config()

            def build_serialized_network(self, network: object, config: Config) -> Any:
                return attempt(self.logger, "build", b"a plan")

        class Parser:
            def __init__(self, target: object, logger: Any) -> None: ...

            def parse_from_file(self, path: str) -> bool:
                fake.calls.append(("parse", (Path(path).name, Path(path).read_bytes())))
                return not fake.parser_errors

            refit_from_file = parse_from_file

            @property
            def num_errors(self) -> int:
                return len(fake.parser_errors)

            def get_error(self, index: int) -> Any:
                what, operator, node = fake.parser_errors[index]
                return SimpleNamespace(
                    desc=lambda: what, node_operator=lambda: operator, node_name=lambda: node
                )

        class Refitter:
            def __init__(self, engine: Engine, logger: Any) -> None:
                self.logger = logger

            def get_missing_weights(self) -> list[str]:
                return fake.missing

            def refit_cuda_engine(self) -> bool:
                return bool(attempt(self.logger, "refit", True, failure=False))

        for part in (ILogger, Runtime, Builder, Refitter):
            setattr(made, part.__name__, part)
        made.OnnxParser = made.OnnxParserRefitter = Parser
        return made  # type: ignore[no-any-return]
