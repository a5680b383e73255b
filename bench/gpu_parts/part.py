"""A part of the measurement: its name, how long it takes, and where its code is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rt.errors import ConfigError, nearest

Figures = Mapping[str, Any]
"""What a part found out, as plain JSON values."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a part is told.

    Attributes:
        dry: Whether it runs at tiny size on the CPU, to see that it runs at all; its figures mean nothing.
        scratch: A folder for bundles, compiled kernels and compilers' caches, kept between runs.
        seed: Of all inputs.
        before: What the part found out at this commit before it was broken off; it may go on from there.
        packages: A folder of packages that were compiled elsewhere, see `rt.bench.gpu_parts.packages`.
    """

    dry: bool
    scratch: Path
    seed: int
    before: Figures = field(default_factory=dict)
    packages: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part; it runs in another process than the one that waits for it.

    Attributes:
        name: For `--only` and the record.
        title: For people.
        minutes: What it takes on an H200, estimated: what does not fit into the time that is left is not begun.
        module: Its file in this package, which has `run(context, **arguments)`.
        arguments: See there.
        dry_environment: What a dry run sets before that file and what it needs are imported.
        needs: The parts that make what this one reads from the scratch folder.
        least_capability: Of the GPU, such as 89; elsewhere it is skipped.
        reads_packages: Whether it is about packages that were compiled elsewhere; without any it is skipped.
        fresh: Whether its process may have done nothing before: memory and what libraries have found out by then count.
    """

    name: str
    title: str
    minutes: float
    module: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dry_environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    least_capability: int = 0
    reads_packages: bool = False
    fresh: bool = False

    def run(self, context: Context) -> Iterator[Figures]:
        """All figures so far, each time that there are more: what ends a run early does not take them along."""
        figures: Iterator[Figures] = import_module(f"rt.bench.gpu_parts.{self.module}").run(
            context, **self.arguments
        )
        return figures


def choose(parts: Sequence[Part], only: Sequence[str]) -> list[Part]:
    """Those named in `only` and what they need, in their own order, or all.

    Raises:
        ConfigError: There is no part of that name.
    """
    names = [part.name for part in parts]
    for name in only:
        if name not in names:
            raise ConfigError(f"no part {name!r}{nearest(name, names)}; there are: {', '.join(names)}")
    wanted = {*only, *(name for part in parts if part.name in only for name in part.needs)}
    return [part for part in parts if not only or part.name in wanted]
