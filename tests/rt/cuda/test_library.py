"""Which of the compiled kernels is loaded, and what is said when none fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rt.cuda import KernelLibrary
from rt.cuda.host import HostDevice
from rt.errors import BackendError, IntegrityError
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
    return tmp_path


def names(device):
    return [call.subject for call in device.calls if call.name == "load"]


def test_what_fits_is_loaded_once(device, images, folder):
    library = KernelLibrary(device, images, folder)
    for rows in (1, 2):
        kernel = library.get("scale", dtypes=FORMATS, sizes={"rows": rows, "columns": 8})
        assert kernel.image.name == "scale_float32_8_sm90"
    library.get("scale", dtypes={"x": "float16"}, sizes={"columns": 4})
    assert names(device) == ["scale_float32_8_sm90", "scale_float16_4_sm90"]


def test_a_newer_gpu_of_the_same_major_version_runs_older_code(images, folder):
    device = HostDevice({"scale": lambda *_: None}, capability=86)
    kernel = KernelLibrary(device, images, folder).get("scale", dtypes=FORMATS, sizes={"columns": 4})
    assert kernel.image.capability == 80


def test_ptx_serves_gpus_that_no_cubin_is_for(images, folder):
    ptx = replace(images[0], name="scale_float32_4_compute80", file="scale.ptx")
    (folder / ptx.file).write_text(".version 8.7")
    for capability, chosen in [
        (75, None),
        (80, images[0]),
        (86, images[0]),
        (90, images[4]),
        (100, ptx),
        (130, ptx),
    ]:
        device = HostDevice({"scale": lambda *_: None}, capability=capability)
        library = KernelLibrary(device, [ptx, *images], folder)
        if chosen is None:
            with pytest.raises(BackendError, match="and host has 75; build the bundle again"):
                library.get("scale", dtypes=FORMATS, sizes={"columns": 4})
        else:
            assert library.get("scale", dtypes=FORMATS, sizes={"columns": 4}).image is chosen


def test_what_is_missing_is_named(images, folder):
    device = HostDevice({"scale": lambda *_: None}, capability=120)
    library = KernelLibrary(device, images, folder)
    for arguments, message in [
        (("rotate", FORMATS, {}), r"^there is no compiled kernel rotate; there are: scale\. Build"),
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
            r"for compute capability 80, 90, and host has 120; build the bundle",
        ),
    ]:
        kernel, dtypes, sizes = arguments
        with pytest.raises(BackendError, match=message):
            library.get(kernel, dtypes=dtypes, sizes=sizes)
    with pytest.raises(BackendError, match="there are: none"):
        KernelLibrary(device, [], folder).get("scale", dtypes=FORMATS, sizes={})


def test_files_that_are_missing_or_broken(device, images, folder):
    (folder / "scale_float32_4_sm90.cubin").unlink()
    with pytest.raises(
        IntegrityError, match=r"sm90\.cubin is missing, the code of scale_float32_4_sm90; build"
    ):
        KernelLibrary(device, images, folder).get("scale", dtypes=FORMATS, sizes={"columns": 4})
