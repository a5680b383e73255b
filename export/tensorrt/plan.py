"""An ONNX graph to a plan: parse, build, serialize.

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html

Networks are strongly typed: the formats of the graph are those of the engine, so casts and fp32 islands hold. TF32 is
off, because fp32 means fp32 here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rt.backends.base import failure
from rt.backends.engine_cache import user_cache
from rt.backends.tensorrt import CLASSIC, RTX, Flavour, library, log
from rt.cuda.probe import gpu_problem
from rt.errors import BuildError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What shapes a plan besides its graph.

    Attributes:
        refittable: Whether its weights can be replaced (`rt.export.tensorrt.refit`); costs some fusions.
        portable: Classic: whether it runs on every GPU since Ampere. For RTX every plan runs on every GPU it supports.
        timing_cache: Classic: where measured timings of tactics are kept from build to build.
    """

    refittable: bool = False
    portable: bool = False
    timing_cache: Path | None = None


def check_machine(flavour: Flavour, options: Options) -> None:
    """Say before any work that this machine cannot build such a plan.

    Raises:
        ConfigError: It has no GPU, and building needs one: always for classic, for RTX if the plan is refittable.
    """
    if flavour is CLASSIC and (problem := gpu_problem()):
        raise ConfigError(
            f"{flavour.name} times its kernels while it builds and {problem}; "
            f"build there, or with --backend {RTX.name}, which builds anywhere"
        )
    if options.refittable and (problem := gpu_problem()):
        raise ConfigError(f"--refittable {problem}; build there, or without it")


def build_plan(flavour: Flavour, graph: Path, plan: Path, options: Options) -> None:
    """Write the plan of `graph`, an ONNX file whose weights may lie beside it.

    Raises:
        BackendUnavailableError: The library is not installed.
        BuildError: It cannot read the graph, with the node, or finds no engine for it, with its reason.
    """
    trt = library(flavour)
    messages = log(trt)
    builder = trt.Builder(messages)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, messages)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(f"{flavour.name} cannot read {graph.name}: {parser_error(parser)}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if flavour is RTX:
        # Without it an engine allocates while it runs, and no graph can capture that.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if flavour is CLASSIC and options.portable:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    with _timings(config, options.timing_cache):
        built = builder.build_serialized_network(network, config)
    if built is None:
        raise failure(f"{flavour.name} cannot build {graph.name}", messages.error, str(messages.error))
    with plan.open("wb") as file:
        file.write(built)


def parser_error(parser: Any) -> str:
    """What an ONNX parser, or refitter, stumbled over: its first error in one line, with the node where it has one."""
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    what = " ".join(str(error.desc()).split())
    operator, name = error.node_operator(), error.node_name()
    return f"node {name!r} ({operator}): {what}" if operator else what


def timing_cache_file(flavour: Flavour, gpu: str) -> Path:
    """In the user's cache folder, one a version of the library and model of GPU."""
    version = library(flavour).__version__
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower())
    return user_cache() / f"{flavour.name}-{version}-{model}.timing"


def _network_flags(trt: Any) -> int:
    """Strong typing, which version 10 asks for by name; and our kernels as code in the plan, not as calls of Python."""
    known = trt.NetworkDefinitionCreationFlag.__members__
    flags = [known[name] for name in ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS") if name in known]
    return sum(1 << int(flag) for flag in flags)


@contextlib.contextmanager
def _timings(config: Any, file: Path | None) -> Iterator[None]:
    """Let the builder read and extend `file`. One of another version or GPU, which it refuses, is begun anew."""
    if file is None:
        yield
        return
    cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    file.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: another build may be reading it.
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(memoryview(config.get_timing_cache().serialize()))
    fresh.replace(file)
