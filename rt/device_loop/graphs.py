"""What a loop launches: a graph a program, one for each change of programs, and one for a whole run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rt.cuda import Graph, capture
from rt.device_loop.buffers import Buffers
from rt.device_loop.kernels import LoopKernels
from rt.device_loop.launches import chained, recorded
from rt.engines import Place
from rt.plan import PlannedStep, StepProgram


class StepGraphs:
    """Graphs on one set of buffers, each captured when it is first needed, and kept."""

    def __init__(self, place: Place, buffers: Buffers, kernels: LoopKernels) -> None:
        self._place, self._stream = place, place.stream
        self._buffers, self._kernels = buffers, kernels
        self._graphs: dict[Hashable, Graph] = {}
        self._whole: tuple[Hashable, Graph] | None = None

    def of(self, before: PlannedStep | None, step: PlannedStep, *, rescaled: bool) -> list[Graph]:
        """What to launch for a step.

        Args:
            before: The step before, None at the first.
            step: The step.
            rescaled: Whether any row of the run rescales its guidance.
        """
        graphs = []
        if before is not None and before.program != step.program:
            graphs.append(self._take_over(before.program, step.program))
        return [*graphs, self._step(step.program, rescaled=rescaled)]

    def whole(self, steps: Sequence[PlannedStep], *, rescaled: bool) -> Graph:
        """One graph for all of them; the last one is kept, as it is large."""
        key = (tuple(step.program for step in steps), rescaled)
        if self._whole is None or self._whole[0] != key:
            parts = []
            for before, step in zip([None, *steps[:-1]], steps, strict=True):
                parts += self.of(before, step, rescaled=rescaled)
            self._forget_whole()  # before the next: there may not be room for both
            self._whole = key, chained(self._place, parts)
        return self._whole[1]

    def close(self) -> None:
        """Give all of them back."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._forget_whole()

    def _forget_whole(self) -> None:
        if self._whole is not None:
            (_, graph), self._whole = self._whole, None
            graph.close()

    def _step(self, program: StepProgram, *, rescaled: bool) -> Graph:
        """Time features, network, guidance and sampler; the position of each row is read on the device."""
        key = program, rescaled
        if key in self._graphs:
            return self._graphs[key]
        unet, buffers, kernels = self._buffers.step(program), self._buffers, self._kernels
        before = [
            kernels.select_rows(
                features.table.array, features.owner.array, buffers.upcoming, features.out, buffers.position
            )
            for features in unet.times
        ]
        after = [
            kernels.guide_and_step(
                unet.prediction,
                buffers.factor.array,
                buffers.table.array,
                buffers.length.array,
                buffers.position,
                buffers.noise.array,
                buffers.state,
                unet.latents,
                buffers.upcoming,
                buffers.broken.array,
            )
        ]
        if rescaled:
            rescale = kernels.guidance_rescale(
                unet.prediction,
                buffers.table.array,
                buffers.length.array,
                buffers.position,
                buffers.factor.array,
            )
            after.insert(0, rescale)

        def work() -> None:
            for launch in before:
                launch.enqueue(self._stream)
            unet.engine.enqueue(self._stream)
            for launch in after:
                launch.enqueue(self._stream)

        self._graphs[key] = recorded(unet.engine, self._place, work)
        return self._graphs[key]

    def _take_over(self, before: StepProgram, program: StepProgram) -> Graph:
        key = before, program
        if key in self._graphs:
            return self._graphs[key]
        unet, other = self._buffers.step(program), self._buffers.step(before)
        self._graphs[key] = capture(self._place.device, self._stream, lambda: unet.take_over(other))
        return self._graphs[key]
