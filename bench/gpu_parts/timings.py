"""Every kernel at the workloads of the models: checked, then timed against what torch has for the same work.

A time is that of a launch among many in a CUDA graph, in turn with the alternatives, over input sets that together are
twice as large as the L2 cache. Some workloads are so small that no practical number of sets is; they are marked. The
largest workload of each kernel comes first, then the others, the largest first. In a dry run Triton interprets the
smallest test case of each kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import Call, Place, find
from rt.bench.gpu_parts.settings import COMPILED, OURS
from rt.bench.timing import Samples
from rt.kernels import launch, registry
from rt.kernels.spec import Case, KernelSpec

_ROUNDS = 7
_MOST_SETS = 1024
"""A graph has a node a set."""


def run(context: Context, chosen: Sequence[tuple[str, str]] = ()) -> Iterator[Figures]:
    """See the module. `workloads`, those in `context.before` kept, and `left_out`.

    Args:
        context: Of the run.
        chosen: Kernels and workloads, in their order and without the compiler; all when left out.
    """
    place = find(context)
    workloads: list[dict[str, Any]] = [*context.before.get("workloads", [])]
    known = {(row["kernel"], row["workload"]) for row in workloads}
    listed = [(registry.spec(kernel), name) for kernel, name in chosen] or _ordered(registry.specs().values())
    if context.dry:
        kernels = dict.fromkeys(spec.name for spec, _ in listed)
        listed = [(spec, _smallest(spec)) for spec in map(registry.spec, kernels)]
    wanted = [(spec, name) for spec, name in listed if (spec.name, _label(spec, name)) not in known]
    while wanted:
        spec, name = wanted.pop(0)
        first = not chosen and spec.name not in [row["kernel"] for row in workloads]
        try:
            workloads.append(_workload(place, spec, name, context.seed, compiled=first))
        except Exception as error:  # of a compiler or a driver; the other kernels still count
            workloads.append(_failed(spec, name, error))
        yield {"workloads": workloads, "left_out": [f"{s.name} {name}" for s, name in wanted]}
    yield {"workloads": workloads, "left_out": []}  # also where none was left


def _ordered(specs: Iterable[KernelSpec]) -> list[tuple[KernelSpec, str]]:
    """The largest workload of each kernel, then the others, the largest first."""
    named = [(spec, name) for spec in specs for name in spec.workloads]
    named.sort(key=lambda pair: -pair[0].bytes(pair[0].workloads[pair[1]]))
    largest = list({spec.name: (spec, name) for spec, name in reversed(named)}.values())
    return [*largest, *(pair for pair in named if pair not in largest)]


def _smallest(spec: KernelSpec) -> str:
    """The name under which `_case` finds the smallest of its test cases."""
    return str(min(spec.cases, key=spec.bytes))


def _label(spec: KernelSpec, name: str) -> str:
    """For the record."""
    return name if name in spec.workloads else "smallest case"


def _case(spec: KernelSpec, name: str) -> Case:
    return {**{str(case): case for case in spec.cases}, **spec.workloads}[name]


def _workload(place: Place, spec: KernelSpec, name: str, seed: int, *, compiled: bool) -> dict[str, Any]:
    """One workload, checked and timed; `compiled` also times torch.compile of the first alternative."""
    case = _case(spec, name)
    drawn = {key: value.to(place.device) for key, value in launch.draw(spec, case, seed).items()}
    error, tolerance = _error(place, spec, case, drawn), spec.tolerance[case.dtype]
    count, cached = (1, False) if place.dry else sets_of(spec.bytes(case), _l2_bytes(place))
    sets = [_tensors(place, spec, case, drawn) for _ in range(count)]
    calls: dict[str, Call] = {
        OURS: partial(_each, partial(launch.run, spec, case), [(each,) for each in sets])
    }
    operands = [[tensors[argument.name] for argument in spec.read] for tensors in sets]
    for label, function in _alternatives(spec, compiled=compiled and not place.dry).items():
        calls[label] = partial(_each, partial(function, **case.attributes), operands)
    graphs, problems = _graphs(place, calls)
    times = {
        label: Samples(tuple(seconds / count for seconds in samples.seconds)).to_json()
        for label, samples in place.compare(graphs, _ROUNDS).items()
    }
    return {
        "kernel": spec.name,
        "workload": _label(spec, name),
        "case": str(case),
        "error": error,
        "tolerance": tolerance,
        "passed": error <= tolerance,
        "bytes": spec.bytes(case),
        "flops": spec.flops(case),
        "sets": count,
        "cached": cached,
        "times": times,
        "problems": problems,
    }


def sets_of(size: int, cache: int) -> tuple[int, bool]:
    """How many sets of `size` bytes are timed, and whether they are so few that what is read is still in the cache."""
    enough = max(1, -(-2 * cache // size))
    return min(enough, _MOST_SETS), enough > _MOST_SETS


def _l2_bytes(place: Place) -> int:
    size: int = torch.cuda.get_device_properties(place.device).L2_cache_size
    return size


def _each(function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> None:
    """One call a set of arguments."""
    for arguments in sets:
        function(*arguments)


def _failed(spec: KernelSpec, name: str, error: Exception) -> dict[str, Any]:
    """A row as `_workload` gives it, without figures."""
    note = f"{type(error).__name__}: {error}".partition("\n")[0]
    row = {
        "kernel": spec.name,
        "workload": _label(spec, name),
        "case": str(_case(spec, name)),
        "passed": False,
    }
    return {**row, "error": None, "times": {}, "problems": {OURS: note}}


def _error(place: Place, spec: KernelSpec, case: Case, drawn: Mapping[str, Tensor]) -> float:
    """Largest difference from the reference, which runs in fp32, relative to the largest value expected."""
    tensors = _tensors(place, spec, case, drawn)
    launch.run(spec, case, tensors)
    exact = [value.float() if value.is_floating_point() else value for value in drawn.values()]
    expected = spec.reference(*exact, **case.attributes)
    return max(
        _difference(tensors[argument.name], value)
        for argument, value in zip(spec.outputs, expected, strict=True)
    )


def _difference(result: Tensor, expected: Tensor) -> float:
    """NaN counts as infinite, so that it is the largest of all."""
    difference = (result.double() - expected.to(result.device).double()).abs().max()
    scale = float(expected.double().abs().max()) or 1.0
    return float(torch.nan_to_num(difference, nan=torch.inf)) / scale


def _tensors(place: Place, spec: KernelSpec, case: Case, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what was drawn, and outputs full of NaN."""
    tensors = {name: value.clone() for name, value in drawn.items()}
    for argument in spec.outputs:
        if argument.name not in tensors:
            dtype = getattr(torch, spec.dtype(argument, case))
            poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
            tensors[argument.name] = torch.full(
                spec.extent(argument, case), poison, dtype=dtype, device=place.device
            )
    return tensors


def _alternatives(spec: KernelSpec, *, compiled: bool) -> dict[str, Callable[..., Any]]:
    """What else a user could run: the kernel's own list, each of torch's attentions, and the compiler."""
    found = dict(spec.alternatives)
    first = next(iter(spec.alternatives.values()), None)
    if first is not None and spec.name == "attention":
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ):
            found[f"torch {backend.name.split('_')[0].lower()}"] = _under(backend, first)
    elif first is not None and compiled:
        found[COMPILED] = torch.compile(first, dynamic=False, mode="max-autotune-no-cudagraphs")
    return found


def _under(backend: SDPBackend, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*operands: Tensor, **attributes: Any) -> Any:
        with sdpa_kernel(backend):
            return function(*operands, **attributes)

    return call


def _graphs(place: Place, calls: Mapping[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Each as a graph; an alternative that this GPU or this shape does not have is a problem, not an end."""
    graphs, problems = {}, {}
    for label, call in calls.items():
        try:
            call()
            graphs[label] = place.graph(call)
        except Exception as error:
            if label == OURS:
                raise
            problems[label] = str(error).strip().partition("\n")[0]
    return graphs, problems
