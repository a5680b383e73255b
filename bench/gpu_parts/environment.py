"""What a build will find on this machine: known in seconds, where a build that fails takes minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rt.bench.gpu_parts.part import Context, Figures

_LIMIT_S = 60
_COMMANDS = {
    "GPU": (
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,memory.used,clocks.max.sm,clocks.sm,power.limit",
        "--format=csv,noheader",
    ),
    "nvcc": ("nvcc", "--version"),
    "g++": ("g++", "--version"),
    "strip": ("strip", "--version"),
}
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "onnx", "cuda-bindings", "tensorrt")
_HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h", "nv/target", "cuda_fp8.h")
_FINE = "yes"


def run(context: Context) -> Iterator[Figures]:
    """See the module. `facts`, name to what was found, of a command its last line that says something."""
    facts = {"Python": sys.version.split()[0], "processors": str(os.cpu_count())}
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    yield {"facts": facts}
    for name, command in _COMMANDS.items():
        facts[name] = _said(command)
        yield {"facts": facts}
    facts["links with -lcuda"] = _compiled("int main() {}", "-lcuda")
    includes = [f"-I{folder}" for folder in _includes()]
    facts["CUDA's headers compile"] = _compiled(
        "".join(f"#include <{name}>\n" for name in _HEADERS) + "int main() {}", "-fsyntax-only", *includes
    )
    facts["headers from"] = " ".join(map(str, _includes())) or "nowhere"
    yield {"facts": facts}
    facts["build for a GPU"] = _refusal()
    yield {"facts": facts}


def _said(command: tuple[str, ...]) -> str:
    """The first line of a program, of `nvcc` the last, which has the version."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    except FileNotFoundError:
        return "not found"
    except subprocess.TimeoutExpired:
        return f"says nothing for {_LIMIT_S} seconds"
    lines = (done.stdout or done.stderr).strip().splitlines() or ["says nothing"]
    return lines[-1 if command[0] == "nvcc" else 0].strip()


def _compiled(code: str, *options: str) -> str:
    """Whether g++ takes it, or the first line of why not that names an error."""
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", *options, "-o", str(Path(folder, "out"))]
        try:
            done = subprocess.run(command, input=code, capture_output=True, text=True, timeout=_LIMIT_S)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            return f"no: {type(error).__name__}"
    if done.returncode == 0:
        return _FINE
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"no: {next((line for line in lines if 'error' in line or 'cannot' in line), lines[0])}"


def _includes() -> list[Path]:
    """Where CUDA's headers may be: a toolkit, and what Python packages bring."""
    nvcc = shutil.which("nvcc")
    toolkits = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    toolkits += [Path(nvcc).resolve().parents[1]] if nvcc else []
    toolkits += [Path("/usr/local/cuda")]
    packages = [found for folder in sys.path for found in sorted(Path(folder, "nvidia").glob("cu*"))]
    folders = dict.fromkeys(home / "include" for home in (*toolkits, *packages))
    return [folder for folder in folders if (folder / _HEADERS[0]).is_file()]


def _refusal() -> str:
    """What a build by inductor says before it begins."""
    from rt.backends import get
    from rt.config import BuildConfig, DType
    from rt.errors import RtError
    from rt.export.forms import Request, writer
    from rt.shapes import ShapeProfile

    backend = get("inductor")
    config = BuildConfig(profiles=(ShapeProfile(512, 512),), dtype=DType.FP16, backend=backend.name)
    further = writer(backend)
    try:
        if further is not None:
            further.check(Request(stage=Path(), config=config))
    except RtError as error:
        return f"no: {error}"
    return _FINE
