"""Work that is launched again and again: captured into a graph, unless an engine in it launches a graph of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rt.backends import DeviceEngine, OwnGraph
from rt.cuda import Graph, Stream, capture
from rt.engines import Place


class Direct:
    """See `Graph`: enqueued anew, call by call, whenever it is launched.

    Args:
        work: What that is, in the stream that it is launched in.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def launch(self, stream: Stream) -> None:
        """See `Graph`."""
        self._work()

    def close(self) -> None:
        """It holds nothing."""


def recorded(engine: DeviceEngine, place: Place, work: Callable[[], None]) -> Graph:
    """What `work` enqueues in the stream of `place`, the engine among it."""
    if isinstance(engine, OwnGraph):
        return Direct(work)
    return capture(place.device, place.stream, work)


def chained(place: Place, parts: Sequence[Graph]) -> Graph:
    """All of them one after the other: as one graph, where all of them are graphs."""
    if any(isinstance(part, Direct) for part in parts):

        def work() -> None:
            for part in parts:
                part.launch(place.stream)

        return Direct(work)
    return place.device.chain(parts)
