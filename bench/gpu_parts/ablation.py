"""What each pass and each way of launching is worth: the guided step of SD 1.5.

Passes: the step's program after each pass of a build, in fp16, run operator by operator in a CUDA graph. No compiler
fuses anything here, so what a pass saves is what it saves by itself; the programs must agree with the first one. Fused
operators are our Triton kernels; in a dry run they are their references.

Launching: the compiled step of the bundle as the loop runs it, so many times one after the other: enqueued anew in each
step, as a graph a step, and as one graph of all steps. By the clock of the host, until the device is idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rt.bench.gpu_parts.model import Model
from rt.bench.gpu_parts.ours import Ours
from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import Place, find, relative_error
from rt.bench.gpu_parts.programs import UNSEEN
from rt.bench.gpu_parts.settings import SETTINGS
from rt.bench.timing import elapsed, interleave
from rt.config import DType
from rt.cuda import Device, Graph, Stream, capture
from rt.cuda.host import HostDevice
from rt.export import gpu_operators
from rt.export.operators import ops
from rt.export.passes.cast import cast
from rt.export.passes.cost import cost
from rt.export.passes.fuse import fuse
from rt.export.passes.layout import channels_last
from rt.export.passes.sink import sink
from rt.export.program import Program
from rt.export.unet import split_context, split_time, trace_step
from rt.kernels import launch
from rt.kernels.registry import spec
from rt.kernels.spec import Case
from rt.model import Component

SETTING = "sd15"
_ROUNDS, _STEPS = 7, 20


def _group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, epsilon: float, silu: bool) -> Tensor:
    """`rt::group_norm` as our kernel."""
    batch, channels = x.shape[0], x.shape[-1]
    bias = torch.zeros(batch, channels, device=x.device)
    case = Case(
        sizes={"batch": batch, "pixels": x.numel() // batch // channels, "channels": channels},
        dtype=str(x.dtype).removeprefix("torch."),
        attributes={"groups": groups, "eps": epsilon, "silu": silu},
    )
    return _launched("group_norm", case, x, bias, scale.float(), shift.float()).reshape(x.shape)


def _geglu(x: Tensor) -> Tensor:
    """`rt::geglu` as our kernel."""
    sizes = {"rows": x.numel() // x.shape[-1], "features": x.shape[-1] // 2}
    case = Case(sizes=sizes, dtype=str(x.dtype).removeprefix("torch."))
    return _launched("geglu", case, x).reshape(*x.shape[:-1], -1)


def _launched(name: str, case: Case, *inputs: Tensor) -> Tensor:
    """The one output of a kernel."""
    kernel = spec(name)
    [output] = kernel.outputs
    result = inputs[0].new_empty(kernel.extent(output, case))
    names = [argument.name for argument in (*kernel.inputs, output)]
    values = [*(tensor.contiguous() for tensor in inputs), result]
    launch.run(kernel, case, dict(zip(names, values, strict=True)))
    return result


_KERNELS: Mapping[Any, Callable[..., Tensor]] = {
    ops.attention.default: gpu_operators.attention,
    ops.group_norm.default: _group_norm,
    ops.geglu.default: _geglu,
}
"""All that `fuse` makes."""


def run(context: Context) -> Iterator[Figures]:
    """See the module. `passes`, each with those before it, and `launching`."""
    place = find(context)
    setting = SETTINGS[SETTING].tiny() if context.dry else SETTINGS[SETTING]
    model = Model(setting=setting, place=place, seed=context.seed)
    ours = Ours(model, context.scratch)  # says at once where its bundle is not there
    passes: list[dict[str, Any]] = []
    first: Tensor | None = None
    for name, program in _programs(model):
        with nullcontext() if place.dry else _Kernels():
            output, row = _pass(place, program)
        first = output if first is None else first
        passes.append({"pass": name, **row, "error": relative_error(output, first)})
        yield {"passes": passes}
    yield {"passes": passes, "launching": _launching(ours)}


def _programs(model: Model) -> Iterator[tuple[str, Program]]:
    """In the order of a build. A pass may change the graph in place, so each is used up before the next is made."""
    unet = model.checkpoint.load(Component.UNET)
    step = trace_step(unet, model.checkpoint.spec, model.profile, {}, guided=True)
    yield "as traced", step
    step = step.rewritten("sink", sink)
    yield "sink", step
    step = split_time(split_context(step)[1])[1]
    yield "hoist", step
    step = step.rewritten("layout", channels_last)
    yield "layout", step
    yield "fuse", step.rewritten("fuse", fuse)


def _pass(place: Place, program: Program) -> tuple[Tensor, dict[str, Any]]:
    """What it gives, in the host's memory, and what it costs."""
    work = cost(program.module)
    module = _on(place, program)
    inputs = {name: value.to(place.device) for name, value in program.inputs.items()}

    @torch.no_grad()
    def call() -> Any:
        return module(**inputs)

    output: Tensor = call()[0].cpu()
    samples = place.compare({"step": place.graph(call)}, _ROUNDS)["step"]
    return output, {"nodes": work.nodes, "flops": work.flops, "time": samples.to_json()}


def _on(place: Place, program: Program) -> Any:
    """The program in fp16 on the GPU, or as it is on the CPU."""
    if place.dry:
        return program.module
    module: Any = cast(program.module, DType.FP16, UNSEEN)[0].to(place.device)
    for (
        node
    ) in module.graph_module.graph.nodes:  # a constant is made where it was traced, unless a pass freed it
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", place.device)
    return module


class _Kernels(TorchFunctionMode):
    """Fused operators run our kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _KERNELS.get(func, func)(*args, **(kwargs or {}))


def _launching(ours: Ours) -> dict[str, Any]:
    """Way → times of a step."""
    engines, profile = ours.pipe.engines, ours.model.profile
    device: Device
    if engines.place is None:  # the CPU's engine behind the stand-in for a device
        host = HostDevice()
        device, stream = host, host.create_stream()
        enqueue = engines.get(Component.UNET, profile, guided=True).enqueue
        work: Callable[[], None] = lambda: host.run("step", enqueue, stream)  # noqa: E731
    else:
        device, stream = engines.place.device, engines.place.stream
        engine = engines.on_device(Component.UNET, profile, guided=True)
        work = lambda: engine.enqueue(stream)  # noqa: E731
    steps = 2 if ours.model.place.dry else _STEPS
    step = capture(device, stream, work)
    loop = device.chain([step] * steps)

    def timed(launch: Callable[[], None], count: int) -> Callable[[], float]:
        def run() -> None:
            for _ in range(count):
                launch()
            device.synchronise(stream)

        return lambda: elapsed(run) / steps

    calls = {
        "no graph": timed(work, steps),
        "a graph a step": timed(_launcher(step, stream), steps),
        "one graph of all steps": timed(_launcher(loop, stream), 1),
    }
    for call in calls.values():
        call()
    rounds = 1 if ours.model.place.dry else _ROUNDS
    return {name: samples.to_json() for name, samples in interleave(calls, rounds).items()}


def _launcher(graph: Graph, stream: Stream) -> Callable[[], None]:
    return lambda: graph.launch(stream)
