"""The most memory that this process held, stage by stage where the kernel can forget the last peak."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def reset_peak() -> bool:
    """Forget the peak so far; returns whether the kernel lets us (Linux 4.0, /proc/self/clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_mib() -> float:
    """Peak of the resident set since `reset_peak`, or since the process began where that does nothing."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) / 2**10
