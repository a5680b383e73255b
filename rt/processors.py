"""How many processors this process may keep busy, and what they can do.

A container is limited in two ways: by a set of processors, which its affinity shows, and by a quota of processor time
in a control group, which nothing but the group's own files shows: with more threads than that the kernel stops all of
them for the rest of each period. https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files and
https://docs.kernel.org/scheduler/sched-bwc.html (version 1).
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class Processors:
    """What a process may use of a machine.

    Attributes:
        installed: Processors of the machine.
        usable: Of these, the smaller of affinity and quota; of a quota with a fraction the next whole number, as Java
            and Go count it.
        limit: What makes it fewer: "affinity", "cgroup quota", or "".
        asked: OMP_NUM_THREADS, as far as there are processors installed for it; None where it says nothing.
    """

    installed: int
    usable: int
    limit: str
    asked: int | None

    @classmethod
    def here(cls, root: Path = ROOT) -> Processors:
        """Of this process, now: others may change its groups."""
        online = os.cpu_count() or 1
        affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
        installed = max(online, affine)  # python -X cpu_count
        share = cgroup_quota(root)
        quota = installed if share is None else max(1, math.ceil(share))
        asked = _omp_num_threads(os.environ.get("OMP_NUM_THREADS", ""))
        return cls(
            installed=installed,
            usable=min(affine, quota),
            limit="cgroup quota" if quota < affine else "affinity" if affine < installed else "",
            asked=None if asked is None else min(asked, installed),
        )

    @property
    def threads(self) -> int:
        """To start where nobody says how many."""
        return self.usable if self.asked is None else self.asked

    def __str__(self) -> str:
        """Such as `2 of 64 processors (cgroup quota), 1 thread (OMP_NUM_THREADS)`."""
        processors = "1 processor" if self.installed == 1 else f"{self.installed} processors"
        used = f"{self.usable} of {processors} ({self.limit})" if self.limit else processors
        threads = (
            "" if self.asked is None else f", {self.asked} thread{'s' * (self.asked > 1)} (OMP_NUM_THREADS)"
        )
        return used + threads


def cpu_count() -> int:
    """Threads to compute with: OMP_NUM_THREADS, or the smaller of affinity and the quota of the control group."""
    return Processors.here().threads


def cgroup_quota(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the strictest group on the way from this process's own to the topmost allows.

    None where none sets a limit, or nothing can be read.
    """
    allowed = [share for folder in _groups(root) if (share := _share(folder)) is not None]
    return min(allowed, default=None)


def processor_flags(root: Path = ROOT) -> frozenset[str]:
    """Instruction sets as /proc/cpuinfo names them; empty where there is no such file."""
    info = cpuinfo(root)
    return frozenset(f"{info.get('flags', '')} {info.get('Features', '')}".split())


def cpuinfo(root: Path = ROOT) -> dict[str, str]:
    """The first processor's entry, where the system has one."""
    pairs = (line.partition(":") for line in _read(root / "proc/cpuinfo").partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def lacks_avx2(root: Path = ROOT) -> bool:
    """Whether this is a processor of x86 without AVX2, as before 2013 and in some virtual machines."""
    flags = processor_flags(root)
    return platform.machine() in ("x86_64", "AMD64") and bool(flags) and "avx2" not in flags


def _groups(root: Path) -> Iterator[Path]:
    """Folders of every control group that this process is in and that may have a quota, of both versions."""
    mounts = list(_mounts(root))
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if number == "0" and not controllers:
            kind = "cgroup2"
        elif "cpu" in controllers.split(","):
            kind = "cgroup"
        else:
            continue
        yield from _chain(PurePosixPath(own), [(top, at) for type_, top, at in mounts if type_ == kind])


def _chain(own: PurePosixPath, mounts: list[tuple[PurePosixPath, Path]]) -> Iterator[Path]:
    """A group and those above it, as far as they are mounted; where it is not, as far as anything is."""
    inside = [(top, at) for top, at in mounts if own.is_relative_to(top) and ".." not in own.parts]
    for top, at in inside:
        relative = own.relative_to(top)
        yield from (at / group for group in (relative, *relative.parents))
    if not inside:  # a container that sees its own group as the top, and /proc of the machine
        yield from (at for _, at in mounts)


def _mounts(root: Path) -> Iterator[tuple[str, PurePosixPath, Path]]:
    """File system, which group it shows on top, and where, of every mounted hierarchy that has quotas."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, dash, after = line.partition(" - ")
        place, kind = before.split(" "), after.split(" ")
        if not dash or len(place) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and "cpu" in kind[-1].split(",")):
            top, at = (_unescaped(path) for path in place[3:5])
            yield kind[0], PurePosixPath(top), root / at.lstrip("/")


def _share(folder: Path) -> float | None:
    """Quota through period of one group; None without a limit."""
    text = _read(folder / "cpu.max") or (
        f"{_read(folder / 'cpu.cfs_quota_us').strip()} {_read(folder / 'cpu.cfs_period_us').strip()}"
    )
    numbers = re.fullmatch(r"\s*(\d{1,18})(?:\s+(\d{1,18}))?\s*", text)  # neither "max" nor -1
    if not numbers:
        return None
    quota, period = int(numbers[1]), int(numbers[2] or 100_000)
    return quota / period if quota and period else None


def _omp_num_threads(text: str) -> int | None:
    """The outermost level of the list that the variable may be; None unless that is a whole number above 0."""
    first = text.partition(",")[0].strip()
    return int(first) if re.fullmatch(r"\+?0*[1-9][0-9]{0,8}", first) else None


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)


def _read(path: Path) -> str:
    """Of a file of the kernel; "" where that does not answer."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""
