"""Threads and instruction sets, from made-up trees of /proc and /sys."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rt import processors
from rt.backends import BACKENDS, choose, choose_target
from rt.config import DType
from rt.errors import BackendUnavailableError
from rt.machine import Machine
from rt.processors import Processors, cgroup_quota, cpu_count, lacks_avx2

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = (
    "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n30 1 0:1 / / rw - ext4 /dev/vda rw\n"
)
AT2, AT1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(own: str, mounts: str = V2 + OTHER, **quotas: str) -> dict[str, str]:
    """The files of a process in group `own`; each quota is of the folder that its name says, `__` for `/`."""
    groups = {f"{AT2}/{name.replace('__', '/').strip('/')}/cpu.max": text for name, text in quotas.items()}
    return {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": mounts, **groups}


def v1(own: str, top: str = "/", **quotas: str) -> dict[str, str]:
    files = {
        "proc/self/cgroup": f"9:memory:/elsewhere\n4:cpu,cpuacct:{own}\n1:name=systemd:/x:y\n0::/\n",
        "proc/self/mountinfo": OTHER + V1.format(top=top),
    }
    for name, text in quotas.items():
        folder = f"{AT1}/{name.replace('__', '/').strip('/')}"
        quota, period = text.split()
        files |= {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}
    return files


@pytest.mark.parametrize(
    ("files", "share"),
    [
        (v2("/a", a="50000 100000\n"), 0.5),
        (v2("/a", a="max 100000\n"), None),
        (v2("/a", a="250000\n"), 2.5),
        (v2("/a/b/c", a="200000 100000", a__b="max 100000", a__b__c="300000 100000"), 2.0),
        (v2("/a/b/c", a="400000 100000", a__b__c="150000 50000"), 3.0),
        (v2("/a/b", a__c="10000 100000"), None),  # a neighbour's
        (v2("/", __="100000 100000"), 1.0),  # a name space of its own
        (v2("/../..", __="100000 100000"), 1.0),  # moved out of it
        (v2("/pod/x", V2.replace("0:28 /", "0:28 /pod/x"), __="100000 50000"), 2.0),
        (v2("/pod/x", V2.replace("0:28 /", "0:28 /other"), __="100000 50000"), 2.0),
        (v2("/pod/gone", __="100000 50000"), 2.0),  # a group whose folder is not to be seen
        (v2("/a", a="junk\n"), None),
        (v2("/a", a=""), None),
        (v2("/a", a="0 0\n"), None),
        (v2("/a", a="100000 0\n"), None),
        (v2("/a", a="-5 100000\n"), None),
        (v2("/a", a="9" * 5000), None),
        (v2("/a", "no table of mounts\n - \n", a="100000 100000"), None),
        (v1("/docker/x", docker__x="150000 100000"), 1.5),
        (v1("/docker/x", docker__x="-1 100000", docker="200000 100000"), 2.0),
        (v1("/docker/x", docker__x="50000 100000", docker="-1 100000"), 0.5),
        (v1("/docker/x", "/docker/x", __="50000 100000"), 0.5),  # a container's own group on top of its mount
        (v1("/docker/x", __="-1 100000"), None),
        (v1("/a", a="100000 0"), None),
        ({"proc/self/cgroup": "\0\xff::\n:::\n\n4\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_is_the_smallest_on_the_way_up(
    tmp_path: Path, files: dict[str, str], share: float | None
) -> None:
    assert cgroup_quota(tree(tmp_path, files)) == share


def test_both_versions_at_once(tmp_path: Path) -> None:
    files = v1("/a", a="300000 100000")
    files["proc/self/mountinfo"] += V2.replace("/sys/fs/cgroup ", r"/sys/fs/with\040space ")
    assert cgroup_quota(tree(tmp_path, files)) == 3.0
    assert cgroup_quota(tree(tmp_path, {"sys/fs/with space/cpu.max": "200000 100000"})) == 2.0


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    root = tree(tmp_path, v2("/a", __="200000 100000"))
    (root / AT2 / "a" / "cpu.max").mkdir(parents=True)
    assert cgroup_quota(root) == 2.0
    (root / "proc/self/cgroup").write_bytes(b"0::/\xff\xfe\n")
    assert cgroup_quota(root) == 2.0
    (root / "proc/self/mountinfo").unlink()
    (root / "proc/self/mountinfo").symlink_to("mountinfo")
    assert cgroup_quota(root) is None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """64 processors, of which the affinity leaves 16."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("quota", "usable", "said"),
    [
        ("max 100000", 16, "16 of 64 processors (affinity)"),
        ("3200000 100000", 16, "16 of 64 processors (affinity)"),
        ("200000 100000", 2, "2 of 64 processors (cgroup quota)"),
        ("150000 100000", 2, "2 of 64 processors (cgroup quota)"),
        ("50000 100000", 1, "1 of 64 processors (cgroup quota)"),
        ("1000 100000", 1, "1 of 64 processors (cgroup quota)"),
    ],
)
def test_the_smaller_of_affinity_and_quota(
    tmp_path: Path, machine: pytest.MonkeyPatch, quota: str, usable: int, said: str
) -> None:
    here = Processors.here(tree(tmp_path, v2("/a", a=quota)))
    assert (here.usable, here.threads, str(here)) == (usable, usable, said)


@pytest.mark.parametrize(
    ("value", "threads"),
    [
        *[("1", 1), ("4", 4), ("4,2", 4), (" 3 ", 3), ("32", 32), ("+8", 8), ("1000", 64), ("999999999", 64)],
        *[
            (junk, 16)
            for junk in ("", "0", "-1", "00", "four", "1.5", ",2", "0,2", "9" * 30, "1e3", "٣", "0x2")
        ],
    ],
)
def test_omp_num_threads_is_honoured_and_junk_is_not(
    tmp_path: Path, machine: pytest.MonkeyPatch, value: str, threads: int
) -> None:
    machine.setenv("OMP_NUM_THREADS", value)
    machine.setattr(processors, "cgroup_quota", lambda root: None)
    assert cpu_count() == threads
    assert ("OMP_NUM_THREADS" in str(Processors.here())) is (threads != 16)


def test_this_machine_has_some() -> None:
    here = Processors.here()
    assert 1 <= here.usable <= here.installed
    assert Machine.here().cores == here.usable


def test_affinity_of_a_real_process() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from rt.backends import cpu_count; print(cpu_count())"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "1\n"


def cpuinfo(flags: str) -> dict[str, str]:
    entry = f"processor\t: 0\nmodel name\t: Pentium(R) Gold\nflags\t\t: {flags}\n\n"
    return {"proc/cpuinfo": entry + entry.replace("processor\t: 0", "processor\t: 1")}


def test_avx2_is_missed_only_where_it_could_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert not lacks_avx2(tmp_path)  # nothing is known
    assert lacks_avx2(tree(tmp_path, cpuinfo("fpu sse4_2 avx")))
    assert not lacks_avx2(tree(tmp_path, cpuinfo("fpu sse4_2 avx avx2")))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not lacks_avx2(tree(tmp_path, {"proc/cpuinfo": "Features\t: fp asimd\n"}))


def test_without_avx2_openvino_gives_way_to_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    from rt.backends import openvino_cpu

    monkeypatch.setattr(openvino_cpu, "lacks_avx2", lambda: True)
    openvino = openvino_cpu.OpenVINO()  # that has asked the library nothing yet
    monkeypatch.setitem(BACKENDS, "openvino", openvino)
    assert not openvino.available() and openvino.available().version
    backend, why = choose("auto", DType.FP32, preferred="openvino")
    assert backend.name == "onnxruntime"
    assert "not openvino (this processor has no AVX2" in why
    with pytest.raises(
        BackendUnavailableError, match=r"^openvino: this processor has no AVX2.*--backend onnxruntime"
    ):
        choose("openvino", DType.FP32)
    assert choose_target("openvino", DType.FP32)[0] is openvino  # its graphs are good for other machines
    assert openvino.arithmetic(DType.BF16) == "f32"  # without asking the library
