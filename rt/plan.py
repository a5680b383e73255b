"""Which program of the U-Net runs at each step, decided from the schedules of all rows before the first step.

A guided, full step is right for every row, and the others are cheaper. So a step is guided where any row that is still
running wants guidance, and full where any wants that, or where nothing has kept features for it: each program without
its deep levels reads those that the full one of the same guidance kept last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rt.model import Component
from rt.samplers import Schedule

StepProgram = tuple[Component, bool]
"""`UNET` or `UNET_SHALLOW`, and whether with guidance."""


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One call of the U-Net.

    Attributes:
        component: `UNET` for a full step, `UNET_SHALLOW` for one that reuses deep features.
        guided: Whether unconditional rows are computed, too.
        running: Indices of the rows that have not come to their end.
        takes_deep: Whether the features of the step before must be handed over first.
    """

    component: Component
    guided: bool
    running: tuple[int, ...]
    takes_deep: bool = False

    @property
    def program(self) -> StepProgram:
        """What is to be run."""
        return self.component, self.guided


def plan(schedules: Sequence[Schedule], *, guided: bool) -> list[PlannedStep]:
    """One entry a step, until the longest schedule ends.

    Args:
        schedules: One a row; row r is at position i in step i.
        guided: Whether the rows have an unconditional side at all.
    """
    steps: list[PlannedStep] = []
    for index in range(max(map(len, schedules))):
        running = tuple(row for row, schedule in enumerate(schedules) if index < len(schedule))
        wanted = guided and any(bool(schedules[row].guided[index]) for row in running)
        kept = bool(steps) and steps[-1].guided is wanted
        if not kept or any(schedules[row].full[index] for row in running):
            steps.append(PlannedStep(component=Component.UNET, guided=wanted, running=running))
        else:
            steps.append(
                PlannedStep(
                    component=Component.UNET_SHALLOW,
                    guided=wanted,
                    running=running,
                    takes_deep=steps[-1].component is Component.UNET,
                )
            )
    return steps
