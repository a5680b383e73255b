"""What a compile takes of the machine: found wherever it is, and named with the command that brings it where not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rt.backends import get
from rt.config import BuildConfig
from rt.errors import BackendUnavailableError
from rt.export import toolchain
from rt.export.forms import Request, check_options
from rt.export.one_line import one_line
from rt.shapes import ShapeProfile


def request(stage: Path) -> Request:
    return Request(stage=stage, config=BuildConfig(profiles=(ShapeProfile(64, 64),)))


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(BackendUnavailableError, match="there is no compiler; install g"):
        check_options(get("inductor-cpu"), request(tmp_path))


def test_without_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        BackendUnavailableError, match="cleaned with strip, and there is none; install binutils"
    ):
        check_options(get("inductor-cpu"), request(tmp_path))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of CUDA that torch's packages make, without a header, on a machine with a GPU and no toolkit."""
    site = tmp_path / "site-packages"
    (site / "nvidia/cublas").mkdir(parents=True)
    (site / "nvidia/cuda_runtime").mkdir()
    home = site / "nvidia/cu13"
    home.mkdir()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr("torch.__file__", str(site / "torch/__init__.py"))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(toolchain, "TOOLKIT", tmp_path / "default")
    return home


def bring(home: Path, *headers: str) -> None:
    for name in headers:
        file = home / "include" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_headers_that_are_missing_are_named_with_what_brings_them(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(packages, "cuda_runtime_api.h")  # all that torch asks for
    with pytest.raises(BackendUnavailableError) as error:
        check_options(get("inductor"), request(tmp_path))
    assert str(error.value) == (
        "inductor compiles C++ with CUDA's headers, and there is no crt/host_defines.h, nv/target; run: pip install "
        '"nvidia-cuda-crt==13.0.*" "nvidia-cuda-cccl==13.0.*", or install the CUDA toolkit 13.0 and set CUDA_HOME to it'
    )
    bring(packages, "crt/host_defines.h")
    with pytest.raises(BackendUnavailableError, match=r'no nv/target; run: pip install "nvidia-cuda-cccl=='):
        toolchain.cuda_home()
    monkeypatch.setattr("torch.version.cuda", "12.8")  # whose packages have other names and folders
    with pytest.raises(
        BackendUnavailableError, match=r"no nv/target; install the CUDA toolkit 12\.8 and set"
    ):
        toolchain.cuda_home()


def test_a_toolkit_comes_first_if_it_is_complete(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(tmp_path / "default", *toolchain.HEADERS)
    assert toolchain.cuda_home() == tmp_path / "default"
    bring(packages, *toolchain.HEADERS)
    assert toolchain.cuda_home() == packages, "they are of torch's own release"
    toolkit = tmp_path / "cuda"
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(toolkit))
    bring(toolkit, "cuda_runtime_api.h", "crt/host_defines.h")
    assert toolchain.cuda_home() == packages
    bring(toolkit, "nv/target")
    assert toolchain.cuda_home() == toolkit


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file by the name that drivers have, in a folder that no linker searches; to the loader it is not a driver."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    path = folder / "libcuda.so.1"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-Wl,-soname,librt_test.so", "-o", str(path)]
    subprocess.run(command, input='extern "C" int cuInit(unsigned) { return 0; }', text=True, check=True)
    monkeypatch.setattr(toolchain.driver_library, "__defaults__", (str(path),))
    return path


@pytest.mark.parametrize("before", [None, "/of/the/user"])
def test_the_driver_is_linked_with(
    packages: Path, driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    def link() -> subprocess.CompletedProcess[str]:
        code = 'extern "C" int cuInit(unsigned); int f() { return cuInit(0); }'
        command = [
            "g++",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            "-",
            "-Wl,-t",
            "-lcuda",
            "-o",
            str(tmp_path / "x.so"),
        ]
        return subprocess.run(command, input=code, text=True, capture_output=True)

    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    if before:
        monkeypatch.setenv("LIBRARY_PATH", before)
    bring(packages, *toolchain.HEADERS)
    with toolchain.cuda():
        assert str(packages) == torch.utils.cpp_extension.CUDA_HOME
        folder, stubs, *others = os.environ["LIBRARY_PATH"].split(":")
        assert Path(folder, "libcuda.so").resolve() == driver
        assert stubs == str(packages / "lib64/stubs") and others == ([before] if before else [])
        done = link()
        assert done.returncode == 0 and f"{folder}/libcuda.so" in done.stdout + done.stderr
    assert os.environ.get("LIBRARY_PATH") == before and not Path(folder).exists()
    assert torch.utils.cpp_extension.CUDA_HOME is None


def test_a_driver_that_is_not_there() -> None:
    assert toolchain.driver_library("libnot-there.so.1") is None
    assert toolchain.driver_library("libc.so.6") is None, "it has no cuInit"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "In file included from /tmp/a/b.cpp:3:\n/usr/cuda_runtime_api.h:148:10: fatal error: crt/host_defines.h: "
            "No such file or directory\n  148 | #include\ncompilation terminated.",
            ": fatal error: crt/host_defines.h: No such file or directory",
        ),
        (
            "x.cpp:1:2: warning: unused\nx.cpp:3:5: error: no such name\nx.cpp:4:5: error: nor this",
            ": error: no such name",
        ),
        (
            "/usr/bin/ld: warning: old\n/usr/bin/ld: cannot find -lcuda: No such file\ncollect2: error: ld returned 1",
            ": ld: cannot find -lcuda: No such file",
        ),
        ("collect2: error: ld returned 1 exit status", ""),
        ("Killed", ""),
    ],
)
def test_a_compile_that_failed_says_what_the_compiler_said(output: str, reason: str) -> None:
    from torch._inductor.exc import CppCompileError, InductorError

    error = CppCompileError(["g++", "-Werror: no"], output)
    assert one_line(error) == f"C++ compile error{reason}"
    wrapped = InductorError(error, None)
    assert one_line(wrapped) == f"CppCompileError: C++ compile error{reason}"


def test_ptxas_is_quoted_too() -> None:
    text = "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal   : Unresolved extern 'f'\n"
    assert one_line(RuntimeError(text)).endswith("codegen error: fatal   : Unresolved extern 'f'")


def test_other_messages_are_their_first_line(tmp_path: Path) -> None:
    assert one_line(ValueError("one: error: two\nerror: three")) == "one: error: two"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 999))) == 302


def test_variables_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RT_ONE", "1")
    monkeypatch.delenv("RT_TWO", raising=False)
    with pytest.raises(RuntimeError), toolchain.environment(RT_ONE="2", RT_TWO="2"):
        assert (os.environ["RT_ONE"], os.environ["RT_TWO"]) == ("2", "2")
        raise RuntimeError
    assert os.environ["RT_ONE"] == "1" and "RT_TWO" not in os.environ


@pytest.mark.slow
def test_a_look_for_the_compiler_chooses_no_folder_for_caches(tmp_path: Path) -> None:
    """In a process that has not imported torch's compiler yet, which would choose one."""
    code = "import os; from rt.export.toolchain import check_compiler as check; check(); "
    code += "print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    clean = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    for chosen in ({}, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**clean, **chosen}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(chosen.get("TORCHINDUCTOR_CACHE_DIR"))


def test_a_compile_that_failed_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rt.export.inductor import _folder

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="no such symbol"), _folder("unet") as folder:
        (folder / "half.cpp").touch()
        raise RuntimeError("no such symbol")
    assert not folder.exists() and not any(tmp_path.iterdir())
