"""New weights into a plan that was built refittable: seconds, where building it again would take minutes.

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html

A LoRA changes weights and nothing else. The graph is lowered again with it merged, and the refitter takes its weights
by the names of its initializers, which are those under which the plan keeps them.
"""

from __future__ import annotations

from pathlib import Path

from rt.backends.tensorrt import Flavour, library, log
from rt.errors import BuildError
from rt.export.tensorrt.plan import parser_error


def refit_plan(flavour: Flavour, old: Path, graph: Path, plan: Path) -> None:
    """Write `old` with the weights of `graph` as `plan`.

    Raises:
        BuildError: The plan does not load here, was not built refittable, or is of another graph.
    """
    trt = library(flavour)
    messages = log(trt)
    runtime = trt.Runtime(messages)
    engine = runtime.deserialize_cuda_engine(old.read_bytes())
    if engine is None:
        raise BuildError(f"{flavour.name} cannot load {old}: {messages.error}; build without --refit")
    if not engine.refittable:
        raise BuildError(
            f"{old} keeps its weights; build that bundle with --refittable, or this one without --refit"
        )
    refitter = trt.Refitter(engine, messages)
    parser = trt.OnnxParserRefitter(refitter, messages)
    if not parser.refit_from_file(str(graph)):
        raise BuildError(f"the weights of {graph.name} do not fit {old}: {parser_error(parser)}")
    missing = list(refitter.get_missing_weights())
    if missing:
        raise BuildError(
            f"{graph.name} lacks weights of {old}: {', '.join(missing[:3])}; build without --refit"
        )
    if not refitter.refit_cuda_engine():
        raise BuildError(f"{flavour.name} cannot refit {old}: {messages.error}")
    with plan.open("wb") as file:
        file.write(engine.serialize())
