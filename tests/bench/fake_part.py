"""A part of the GPU benchmark that a test can make do anything."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rt.bench.gpu_parts.part import Context, Part
from rt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Fake(Part):
    """A part that does what its arguments say."""

    module: str = ""
    title: str = "Fake"
    minutes: float = 0.1

    def run(self, context: Context) -> Iterator[dict[str, int]]:
        yield {"figure": os.getpid() if "who" in self.arguments else context.seed}
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
        if "fail" in self.arguments:
            raise ConfigError("one line")
        print("all is well")
        yield {"figure": context.seed, "more": 1}
