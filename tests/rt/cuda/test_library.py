"""Which of the compiled kernels is loaded, and what is said when none fits."""

from __future__ import annotations

import json

import pytest

from rt.cuda import KernelLibrary
from rt.cuda.host import HostDevice
from rt.errors import BackendError, BackendUnavailableError, IntegrityError
from rt.kernel_image import TensorArgument

FORMATS = {"x": "float32"}


@pytest.fixture
def images(make_image):
    """For two architectures, two widths and two formats."""
    made = []
    for capability in (80, 90):
        for columns in (4, 8):
            for dtype in ("float32", "float16"):
                argument = TensorArgument(name="x", shape=("rows", "columns"), dtype=dtype)
                name = f"scale_{dtype}_{columns}_sm{capability}"
                made.append(
                    make_image(
                        name=name,
                        file=f"{name}.cubin",
                        capability=capability,
                        sizes={"columns": columns},
                        inputs=(argument,),
                    )
                )
    return made


@pytest.fixture
def folder(tmp_path, images):
    for image in images:
        (tmp_path / image.file).write_bytes(image.name.encode())
    (tmp_path / "kernels.json").write_text(json.dumps([image.to_json() for image in images]))
    return tmp_path


def names(device):
    return [call.subject for call in device.calls if call.name == "load"]


def test_what_fits_is_loaded_once(device, folder):
    library = KernelLibrary.open(device, folder / "kernels.json")
    for rows in (1, 2):
        kernel = library.get(
            "scale", dtypes=FORMATS, sizes={"rows": rows, "columns": 8}, constants={"factor": 3}
        )
        assert kernel.image.name == "scale_float32_8_sm90"
    library.get("scale", dtypes={"x": "float16"}, sizes={"columns": 4})
    assert names(device) == ["scale_float32_8_sm90", "scale_float16_4_sm90"]


def test_a_newer_gpu_of_the_same_major_version_runs_older_code(images, folder):
    device = HostDevice({"scale": lambda *_: None}, capability=86)
    kernel = KernelLibrary(device, images, folder).get("scale", dtypes=FORMATS, sizes={"columns": 4})
    assert kernel.image.capability == 80


def test_what_is_missing_is_named(images, folder):
    device = HostDevice({"scale": lambda *_: None}, capability=120)
    library = KernelLibrary(device, images, folder)
    for arguments, message in [
        (("rotate", FORMATS, {}), r"^there is no compiled kernel rotate; there are: scale\. Compile"),
        (
            ("scale", {"x": "bfloat16"}, {}),
            r"^scale was not compiled for x bfloat16; there are: scale_float16_4_sm80",
        ),
        (
            ("scale", FORMATS, {"columns": 5}),
            r"^scale was not compiled for x float32, columns 5; there are: ",
        ),
        (
            ("scale", FORMATS, {"columns": 4}),
            r"for compute capability 80, 90, and host has 120; compile the kernels",
        ),
    ]:
        kernel, dtypes, sizes = arguments
        with pytest.raises(BackendError, match=message):
            library.get(kernel, dtypes=dtypes, sizes=sizes)
    with pytest.raises(BackendError, match="was not compiled for x float32, factor 4;"):
        library.get("scale", dtypes=FORMATS, sizes={}, constants={"factor": 4})
    with pytest.raises(BackendError, match="there are: none"):
        KernelLibrary(device, [], folder).get("scale", dtypes=FORMATS, sizes={})


def test_files_that_are_missing_or_broken(device, images, folder):
    (folder / "scale_float32_4_sm90.cubin").unlink()
    with pytest.raises(
        IntegrityError, match=r"sm90\.cubin is missing, the code of scale_float32_4_sm90; compile"
    ):
        KernelLibrary(device, images, folder).get("scale", dtypes=FORMATS, sizes={"columns": 4})
    with pytest.raises(
        BackendUnavailableError, match="this installation has no GPU kernels; compile them with"
    ):
        KernelLibrary.open(device, folder / "none.json")
    for text in ("{", "[{}]", "[3]"):
        (folder / "kernels.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"is no list of kernels \(\w+: .*\); compile them again"):
            KernelLibrary.open(device, folder / "kernels.json")
