"""A part of the GPU benchmark that a test can make do anything, and several parts in one process."""

from __future__ import annotations

import os
import subprocess
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from rt.bench.gpu_parts.part import Context, Figures, Part


@dataclass(frozen=True, kw_only=True)
class Fake(Part):
    """A part that does what its arguments say."""

    module: str = ""
    title: str = "Fake"
    minutes: float = 0.1

    def run(self, context: Context) -> Iterator[dict[str, int]]:
        yield {"figure": context.seed}
        if "sleep" in self.arguments:
            child = subprocess.Popen(["sleep", "600"])
            yield {"figure": context.seed, "child": child.pid}
            time.sleep(600)
        if "go on" in self.arguments:
            yield {"figure": context.seed, "before": context.before.get("more", 0)}
        if "raise" in self.arguments:
            raise ValueError("the first line\nthe second")
        if "die" in self.arguments:
            os._exit(3)
        print("all is well")
        yield {"figure": context.seed, "more": 1}


@dataclass(frozen=True)
class Together:
    """Parts one after the other."""

    parts: tuple[Part, ...]

    def run(self, context: Context) -> Iterator[tuple[str, Figures | str]]:
        """The name of each and its last figures, or its error."""
        for part in self.parts:
            try:
                *_, figures = part.run(context)
            except Exception:
                yield part.name, traceback.format_exc()
            else:
                yield part.name, figures
