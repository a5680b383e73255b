"""One run on one GPU: what each part found out or why it did not, and the file that keeps it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from rt.bench.gpu_parts.part import Figures
from rt.bench.record import Provenance, read
from rt.errors import ConfigError

SCHEMA = 1
KIND = "gpu"
"""The field by which a record of these is known among the others of `bench/results/`."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU and what drives it.

    Attributes:
        name: As its maker calls it.
        capability: Such as 90.
        memory_gib: All of its memory.
        multiprocessors: How many.
        l2_mib: Its last cache.
        versions: Of the newest CUDA that the driver runs, torch's CUDA, torch, Triton and diffusers.
    """

    name: str
    capability: int
    memory_gib: float
    multiprocessors: int
    l2_mib: float
    versions: Mapping[str, str]

    @property
    def kind(self) -> str:
        """Its name, fit for a file name: "NVIDIA H100 80GB HBM3" is "h100-80gb-hbm3"."""
        return "-".join(word for word in re.findall(r"[a-z0-9]+", self.name.lower()) if word != "nvidia")


DRY = Gpu(name="dry run", capability=0, memory_gib=0, multiprocessors=0, l2_mib=0, versions={})
"""Stands for the GPU where the CPU goes through the motions."""


class Status(str, Enum):
    """How a part ended."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    """At its limit of time; figures that it had by then are kept."""
    SKIPPED = "skipped"
    """It would not have fitted into the time that was left."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One part of a run.

    Attributes:
        status: See `Status`.
        reason: Why it is not done, else "".
        seconds: It took, with the start of its process.
        date: When it ran.
        commit: Of rt then.
        figures: What it found out.
    """

    status: Status
    reason: str = ""
    seconds: float = 0.0
    date: str
    commit: str | None
    figures: Figures = field(default_factory=dict)

    def supersedes(self, older: Outcome) -> bool:
        """Whether it is to be kept in the place of `older`: it is complete, or holds no fewer figures."""
        return self.status is Status.DONE or _count(self.figures) >= _count(older.figures)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """From the `asdict` of one."""
        return cls(**{**data, "status": Status(data["status"])})


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, which may have been broken off and taken up again.

    Attributes:
        provenance: Of its begin.
        gpu: Where; `DRY` for a run that measures nothing.
        seed: Of all inputs.
        parts: By name, in the order in which they ended.
    """

    provenance: Provenance
    gpu: Gpu
    seed: int
    parts: Mapping[str, Outcome] = field(default_factory=dict)

    @property
    def dry(self) -> bool:
        """Whether its figures mean nothing."""
        return self.gpu == DRY

    def with_part(self, name: str, outcome: Outcome) -> Run:
        """With that part's outcome, unless an older one of it has more to say."""
        if name in self.parts and not outcome.supersedes(self.parts[name]):
            return self
        return replace(self, parts={**self.parts, name: outcome})

    def done(self, name: str) -> bool:
        """Whether that part need not be run again."""
        return name in self.parts and self.parts[name].status is Status.DONE

    @property
    def stem(self) -> str:
        """Of the names of its files: DATE-gpu-GPU-HHMMSS."""
        begun = self.provenance.time.replace(":", "")
        return f"{self.provenance.date}-{KIND}-{self.gpu.kind}-{begun}"

    def save(self, folder: Path) -> Path:
        """Write it to a file in `folder`, over what was there of the same run."""
        path = folder / f"{self.stem}.json"
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        beside.replace(path)  # whole or not at all, whenever the machine is taken away
        return path

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """From what `to_json` gave.

        Raises:
            ConfigError: It is of another version.
        """
        if data.get("schema") != SCHEMA:
            raise ConfigError(f"a GPU record of schema {data.get('schema')}, not {SCHEMA}: measure again")
        return cls(
            provenance=Provenance.from_json(data["provenance"]),
            gpu=Gpu(**data[KIND]),
            seed=data["seed"],
            parts={name: Outcome.from_json(outcome) for name, outcome in data["parts"].items()},
        )


def runs(records: Iterable[Mapping[str, Any]]) -> list[Run]:
    """Those among the records of a folder that are of this kind, in their order."""
    return [Run.from_json(record) for record in records if KIND in record]


def newest(folders: Iterable[Path], gpu: Gpu) -> Run | None:
    """The last run on such a GPU with the same versions of everything; of one that several have, the last one's."""
    found = [run for folder in folders if folder.is_dir() for run in runs(read(folder)) if run.gpu == gpu]
    return max(reversed(found), key=lambda run: (run.provenance.date, run.provenance.time), default=None)


def _count(value: Any) -> int:
    """Of single values in JSON."""
    if isinstance(value, Mapping):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, (list, tuple)) else 1
