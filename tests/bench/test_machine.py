"""What a record says of the machine."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rt import machine as module
from rt import processors
from rt.machine import Machine


def test_here_is_complete() -> None:
    here = Machine.here()
    assert here.processor and here.system
    assert here.cores >= 1
    assert here.memory_gib > 0.1


def test_here_does_not_name_the_host() -> None:
    assert socket.gethostname() not in json.dumps(asdict(Machine.here()))


def test_machine_survives_json() -> None:
    here = replace(Machine.here(), features=("avx2", "sve"))
    assert Machine.from_json(json.loads(json.dumps(asdict(here)))) == here


@pytest.mark.parametrize(
    ("processor", "kind"),
    [
        ("AMD EPYC", "epyc"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "ryzen-9-7950x"),
        ("Intel(R) Xeon(R) Processor @ 2.10GHz", "xeon"),
        ("Intel(R) Xeon(R) Platinum 8488C", "xeon-platinum-8488c"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "core-i7-8700k"),
        ("", "unknown"),
        ("../../etc", "etc"),
    ],
)
def test_kind_is_a_file_name(processor: str, kind: str) -> None:
    assert replace(Machine.here(), processor=processor).kind == kind


@pytest.mark.parametrize("label", ["flags", "Features"])
def test_features_are_whole_words(label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(
        tmp_path, monkeypatch, f"model name\t: X\n{label}\t: avx512f avx512_bf16x sve2\n\nmodel name: Y\n"
    )
    here = Machine.here()
    assert here.processor == "X"
    assert here.features == ("avx512f",)


def test_a_system_without_cpuinfo_still_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(tmp_path, monkeypatch, None)
    here = Machine.here()
    assert here.processor
    assert here.features == ()


def made_up(root: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None) -> None:
    """A system with that file."""
    if cpuinfo is not None:
        (root / "proc").mkdir()
        (root / "proc" / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(module, "cpuinfo", lambda: processors.cpuinfo(root))
    monkeypatch.setattr(module, "processor_flags", lambda: processors.processor_flags(root))
