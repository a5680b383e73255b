"""Where a figure comes from, and the file it is kept in."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

import rt
from rt.backends import BACKENDS
from rt.machine import Machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a figure depends on besides the thing that was measured.

    Attributes:
        date: Such as 2026-11-22.
        time: Such as 17:04:59, or "" in records that did not keep it.
        commit: Of rt, with "-dirty" when files differ from it; without a repository what RT_COMMIT says, or None.
        machine: Without its name.
        versions: Of rt, Python, numpy and each engine that is installed.
    """

    date: str
    commit: str | None
    machine: Machine
    versions: Mapping[str, str]
    time: str = ""

    @classmethod
    def now(cls) -> Provenance:
        """Of a measurement that is being taken."""
        engines = {name: backend.available().version for name, backend in BACKENDS.items()}
        now = datetime.now()
        return cls(
            date=now.date().isoformat(),
            time=now.strftime("%H:%M:%S"),
            commit=commit(),
            machine=Machine.here(),
            versions={
                "rt": rt.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                **{name: version for name, version in engines.items() if version},
            },
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        """From the `asdict` of one."""
        return cls(**{**data, "machine": Machine.from_json(data["machine"])})


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All records of a folder, the oldest first."""
    records: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(
        records, key=lambda record: (record["provenance"]["date"], record["provenance"].get("time", ""))
    )


def commit() -> str | None:
    """Of the checkout; where the files came without their history, what the environment variable RT_COMMIT says."""
    root = Path(rt.__file__).parents[1]
    if not (root / ".git").exists():
        return os.environ.get("RT_COMMIT") or None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def publish(name: str, figures: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write figures with their provenance to `folder`/DATE-NAME-PROCESSOR.json, the name fit for a file."""
    provenance = Provenance.now()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
    path = folder / f"{provenance.date}-{slug}-{provenance.machine.kind}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": asdict(provenance), **figures}, indent=1) + "\n")
    return path
