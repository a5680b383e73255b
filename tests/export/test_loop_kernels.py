"""The kernels of the loop in a bundle, found there by the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rt.backends import BACKENDS
from rt.backends.ort_cpu import OnnxRuntime
from rt.backends.views import DeviceSide
from rt.bundle import Bundle
from rt.cuda import KernelLibrary
from rt.cuda.host import HostDevice

pytest.importorskip("triton")
from rt.export.loop_kernels import NAMES


class OnDevice(OnnxRuntime):
    """ONNX Runtime as if it ran on a GPU."""

    name = "on-device"

    def open_device(self):
        return HostDevice({}, capability=90)

    def load_on(self, device, path, inputs, outputs, *, dtype):
        return DeviceSide(path.stem, self.load(path, inputs, outputs, dtype=dtype, threads=1), device)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    from rt.config import BuildConfig
    from rt.export.build import build

    from .test_build import SMALL, toy

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, OnDevice.name, OnDevice())
        config = BuildConfig(profiles=(SMALL,), backend=OnDevice.name)
        yield build(toy(), tmp_path_factory.mktemp("gpu") / "bundle", config)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120, 121, 130])
def test_the_runtime_finds_every_kernel_for_every_gpu(bundle: Bundle, capability: int) -> None:
    device = HostDevice(dict.fromkeys(NAMES, lambda *_: None), capability=capability)
    library = KernelLibrary(device, bundle.manifest.kernels, bundle.path)
    for name in NAMES:
        image = library.get(name, dtypes={}, sizes={}).image
        assert image.kernel == name and image.runs_on(capability)
        assert not image.sizes, "its sizes are arguments"
        assert image.file in bundle.manifest.files
        code = (bundle.path / image.file).read_bytes()
        assert image.is_ptx == (capability in (100, 103, 130)), "the driver assembles what we do not know"
        assert b"\n.target sm_80\n" in code if image.is_ptx else code.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("here", "problem"),
    [
        (0, ""),
        (75, "our kernels need a GPU of compute capability 8.0 or later, and this one has 7.5"),
        (80, ""),
    ],
)
def test_a_gpu_that_is_too_old_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: int, problem: str
) -> None:
    from rt.config import BuildConfig
    from rt.export import loop_kernels
    from rt.export.forms import Request
    from rt.export.target import refusal

    from .test_build import SMALL

    monkeypatch.setattr(loop_kernels, "gpu_capability", lambda: here)
    config = BuildConfig(profiles=(SMALL,), backend=OnDevice.name)
    said = refusal(OnDevice(), Request(stage=tmp_path, config=config))
    assert said.startswith(problem) and bool(said) == bool(problem)


def test_no_kernel_names_a_place_on_the_machine_that_built_it(bundle: Bundle) -> None:
    for image in bundle.manifest.kernels:
        code = (bundle.path / image.file).read_bytes()
        assert str(Path(__file__).parents[2]).encode() not in code and str(Path.home()).encode() not in code
