"""What the machine is, as far as it explains a figure measured on it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rt.decode import decode
from rt.processors import Processors, cpuinfo, processor_flags

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8", "sve")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A computer without its name.

    Attributes:
        system: Such as "Linux x86_64".
        processor: Its name, as the maker writes it.
        cores: Processors that this process may use.
        memory_gib: All of its memory.
        features: Instruction sets that decide how fast a network runs, as /proc/cpuinfo spells them.
    """

    system: str
    processor: str
    cores: int
    memory_gib: float
    features: tuple[str, ...]

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        flags = processor_flags()
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            processor=cpuinfo().get("model name") or platform.processor() or platform.machine(),
            cores=Processors.here().usable,
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            features=tuple(feature for feature in _FEATURES if feature in flags),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Machine:
        """From the `asdict` of one; raises as `decode`."""
        return decode(cls, data, "machine")

    @property
    def kind(self) -> str:
        """The processor's name, fit for a file name: "Intel(R) Xeon(R) CPU @ 2.10GHz" is "xeon"."""
        words = re.sub(r"\((r|tm)\)|@.*|\b(amd|intel|cpu|processor|\d+-core)\b", " ", self.processor.lower())
        return "-".join(re.findall(r"[a-z0-9]+", words)) or "unknown"
