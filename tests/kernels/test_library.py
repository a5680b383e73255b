"""The kernels of the loop, compiled into a folder and found there by the runtime."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from rt.cuda import KernelLibrary
from rt.cuda.host import HostDevice
from rt.cuda.library import INSTALLED as WHERE_THE_RUNTIME_LOOKS
from rt.kernels import library

DTYPE = "bfloat16"
ARGUMENTS = {
    "feed": "out",
    "guidance_rescale": "prediction",
    "guide_and_step": "latents",
    "select_rows": "table",
    "to_pixels": "x",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("kernels")
    names = library.compile_loop(made, [90], [DTYPE])
    assert len(names) == len(set(names)) == len(library.LOOP)
    return made


def test_the_runtime_finds_what_was_compiled(folder):
    device = HostDevice(dict.fromkeys(library.LOOP, lambda *_: None), capability=90)
    found = KernelLibrary.open(device, folder / "kernels.json")
    for name, argument in ARGUMENTS.items():
        image = found.get(name, dtypes={argument: DTYPE}, sizes={}).image
        assert image.kernel == name and image.capability == 90
        assert (folder / image.file).read_bytes().startswith(b"\x7fELF")
        assert not image.sizes, "its sizes are arguments"
    assert ARGUMENTS.keys() == set(library.LOOP)


def test_both_sides_mean_the_same_folder():
    assert WHERE_THE_RUNTIME_LOOKS == library.INSTALLED / "kernels.json"


def test_the_command_line(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(
        library, "compile_loop", lambda folder, capabilities: seen.append([*capabilities]) or ["a"]
    )
    assert library.main([]) == library.main(["90"]) == 0
    assert seen == [[*library.CAPABILITIES], [90]]
    assert "1 kernels in " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"usage: python -m rt\.kernels\.library"):
        library.main(["-h"])


def test_a_gpu_that_we_do_not_compile_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(library, "INSTALLED", tmp_path)
    assert library.main(["35"]) == 2
    assert "error: no kernels for compute capability 35" in capsys.readouterr().err
