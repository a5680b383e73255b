"""The real device on a driver that records: which functions, in which order, with which arguments."""

from __future__ import annotations

import ctypes
import inspect
import re
import sys

import numpy as np
import pytest

from rt.cuda import DeviceArray, capture
from rt.cuda.driver import CudaDevice
from rt.errors import BackendError, BackendUnavailableError

from ..fake_driver import ENUMS, SIGNATURES, CUresult


@pytest.fixture
def gpu(driver):
    made = CudaDevice()
    driver.calls.clear()
    return made


def test_the_fake_has_the_signatures_of_the_real_module():
    """Parameters by name and in order, and the enums' values; the module imports without a driver."""
    real = pytest.importorskip("cuda.bindings.driver")
    for name, parameters in SIGNATURES.items():
        head = getattr(real, name).__doc__.partition("\n")[0]
        text = re.fullmatch(rf"{name}\((.*)\)", head)[1]
        text = re.sub(
            r"\[[^]]*\]", "", re.sub(r"\[[^]]*\]", "", text)
        )  # what is within brackets has commas, too
        real_names = [
            re.split(r"[ :]", part.partition(":")[0].strip())[-1] for part in text.split(",") if part
        ]
        assert [each.removeprefix("*") for each in real_names] == [*parameters], head
    for enum in ENUMS:
        for member in enum:
            assert int(getattr(getattr(real, enum.__name__), member.name)) == member


def test_the_primary_context_is_retained_and_made_current(driver):
    gpu = CudaDevice()
    assert (gpu.name, gpu.capability) == ("A GPU", 90)
    names = [name for name, _ in driver.calls]
    assert names[:3] == ["cuInit", "cuDeviceGetCount", "cuDeviceGet"]
    assert names[-2:] == ["cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert "cuCtxCreate" not in names
    gpu.close()
    assert driver.calls[-1][0] == "cuDevicePrimaryCtxRelease"


def test_memory(gpu, driver):
    array = gpu.allocate((3, 5), "bfloat16")
    assert array == DeviceArray(array.pointer, (3, 5), "bfloat16") and array.pointer
    nothing = gpu.allocate((0, 5), "float32")
    assert driver.named("cuMemAlloc") == [(30,), (1,)]
    stream = gpu.create_stream()
    assert driver.named("cuStreamCreate") == [(1,)], "it must not wait for the default stream"
    pinned = gpu.pinned((3, 5), "bfloat16")
    pinned[...] = 7
    address = pinned.ctypes.data
    assert driver.named("cuMemHostAlloc") == [(30, 0)]
    gpu.upload(array, pinned, stream)
    gpu.download(pinned[1:], array.part(1, 3), stream)
    gpu.copy(array[0], array[1], stream)
    gpu.clear(array, stream)
    assert driver.calls[-4:] == [
        ("cuMemcpyHtoDAsync", (array.pointer, address, 30, stream)),
        ("cuMemcpyDtoHAsync", (address + 10, array.pointer + 10, 20, stream)),
        ("cuMemcpyDtoDAsync", (array.pointer, array.pointer + 10, 10, stream)),
        ("cuMemsetD8Async", (array.pointer, 0, 30, stream)),
    ]
    gpu.unpin(pinned)
    assert driver.named("cuMemFreeHost") == [(address,)]
    for each in (array, nothing):
        gpu.free(each)
    gpu.destroy_stream(stream)
    assert driver.named("cuMemFree") == [(array.pointer,), (nothing.pointer,)]


def test_ptx_ends_with_a_zero_byte(gpu, driver, make_image):
    gpu.load(make_image(file="scale.ptx"), b".version 8.7\n")
    assert driver.named("cuModuleLoadData") == [(b".version 8.7\n\0",)]


def test_a_launch(gpu, driver, make_image):
    kernel = gpu.load(make_image(), b"\x7fELF")
    assert driver.named("cuModuleLoadData") == [(b"\x7fELF",)]
    assert driver.named("cuModuleGetFunction")[0][1] == b"scale_kernel"
    assert not driver.named("cuFuncSetAttribute")
    x, y = gpu.allocate((6, 4), "float32"), gpu.allocate((6, 4), "float32")
    stream = gpu.create_stream()
    kernel.launch(stream, {"rows": 6}, [x], [y])
    _, *grid, shared, on, (values, types), extra = driver.named("cuLaunchKernel")[0]
    assert grid == [6, 2, 1, 128, 1, 1]
    assert (shared, on, extra) == (64, stream, 0)
    assert values == (x.pointer, 24, y.pointer)
    assert types == (ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
    with pytest.raises(BackendError, match="takes x as float32"):
        kernel.launch(stream, {"rows": 5}, [x], [y])
    gpu.close()
    assert len(driver.named("cuModuleUnload")) == 1


@pytest.mark.parametrize(("shared", "asked"), [(49152, []), (49153, [49153])])
def test_much_shared_memory_is_asked_for(gpu, driver, make_image, shared, asked):
    gpu.load(make_image(shared_bytes=shared), b"")
    assert [value for _, _, value in driver.named("cuFuncSetAttribute")] == asked


def test_events_block_rather_than_spin(gpu, driver):
    event, stream = gpu.create_event(), gpu.create_stream()
    gpu.record(event, stream)
    gpu.wait(event)
    gpu.synchronise(stream)
    gpu.destroy_event(event)
    assert driver.calls == [
        ("cuEventCreate", (3,)),
        ("cuStreamCreate", (1,)),
        ("cuEventRecord", (event, stream)),
        ("cuEventSynchronize", (event,)),
        ("cuStreamSynchronize", (stream,)),
        ("cuEventDestroy", (event,)),
    ]


def test_a_stream_follows_another_without_the_host(gpu, driver):
    event, stream, other = gpu.create_event(), gpu.create_stream(), gpu.create_stream()
    gpu.record(event, stream)
    gpu.follow(other, event)
    assert driver.calls[-2:] == [("cuEventRecord", (event, stream)), ("cuStreamWaitEvent", (other, event, 0))]


def test_graphs(gpu, driver):
    stream, array = gpu.create_stream(), gpu.allocate((1,), "float32")
    driver.calls.clear()
    graph = capture(gpu, stream, lambda: gpu.clear(array, stream))
    graph.launch(stream)
    assert [name for name, _ in driver.calls] == [
        "cuStreamBeginCapture",
        "cuMemsetD8Async",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphLaunch",
    ]
    chain = gpu.chain([graph, graph, graph])
    nodes = driver.named("cuGraphAddChildGraphNode")
    assert [child for *_, child in nodes] == [graph.handle] * 3
    assert [count for _, _, count, _ in nodes] == [0, 1, 1]
    assert nodes[0][1] is None and nodes[1][1] != nodes[2][1], "each waits for the one before"
    assert {whole for whole, *_ in nodes} == {chain.handle}
    for each in (graph, chain):
        each.close()
    assert len(driver.named("cuGraphExecDestroy")) == len(driver.named("cuGraphDestroy")) == 2


@pytest.mark.parametrize("function", ["cuGraphInstantiate", "cuGraphAddChildGraphNode"])
def test_a_graph_that_cannot_be_made_is_destroyed(gpu, driver, function):
    stream = gpu.create_stream()
    part = capture(gpu, stream, lambda: None)
    driver.failing[function] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    driver.calls.clear()
    with pytest.raises(MemoryError, match=function):
        gpu.chain([part])
    assert len(driver.named("cuGraphDestroy")) == len(driver.named("cuGraphCreate")) == 1
    assert driver.named("cuGraphDestroy") != [(part.handle,)]


@pytest.mark.parametrize("second", [CUresult.CUDA_ERROR_INVALID_VALUE, CUresult.CUDA_ERROR_OUT_OF_MEMORY])
def test_a_capture_that_the_driver_broke_off_keeps_the_first_error(gpu, driver, second):
    stream, array = gpu.create_stream(), gpu.allocate((1,), "float32")
    driver.failing["cuMemsetD8Async"] = CUresult.CUDA_ERROR_INVALID_VALUE
    driver.failing["cuStreamEndCapture"] = second
    with pytest.raises(BackendError, match="cuMemsetD8Async failed"):
        capture(gpu, stream, lambda: gpu.clear(array, stream))


def test_errors_have_the_drivers_name_and_text(gpu, driver, make_image):
    driver.failing["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(
        BackendError, match=r"^cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS: a text of the driver$"
    ):
        gpu.synchronise(gpu.create_stream())
    driver.failing["cuModuleLoadData"] = CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    with pytest.raises(
        BackendError, match=r"^loading kernel scale_float32_sm90 failed: CUDA_ERROR_NO_BINARY"
    ):
        gpu.load(make_image(), b"")


def test_an_error_that_the_driver_cannot_name(gpu, driver, monkeypatch):
    driver.failing["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    unknown = lambda code: (CUresult.CUDA_ERROR_INVALID_VALUE, None)  # noqa: E731
    monkeypatch.setattr(driver, "cuGetErrorName", unknown, raising=False)
    with pytest.raises(BackendError, match="error 700, which this driver has no name for"):
        gpu.synchronise(gpu.create_stream())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cuMemAlloc", "cuMemAlloc of 40 bytes: memory of A GPU is full"),
        ("cuMemHostAlloc", "cuMemHostAlloc of 40 bytes: page-locked host memory is full"),
        ("cuGraphInstantiate", "cuGraphInstantiate: memory of A GPU is full"),
    ],
)
def test_memory_that_is_full(gpu, driver, function, message):
    driver.failing[function] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    work = {
        "cuMemAlloc": lambda: gpu.allocate((10,), "float32"),
        "cuMemHostAlloc": lambda: gpu.pinned((10,), "float32"),
        "cuGraphInstantiate": lambda: capture(gpu, gpu.create_stream(), lambda: None),
    }[function]
    with pytest.raises(MemoryError, match=message):
        work()


def test_no_gpu(driver, monkeypatch):
    with pytest.raises(
        BackendUnavailableError, match="GPU 3 is not there; this process sees 1, counted from 0"
    ):
        CudaDevice(3)
    driver.failing["cuInit"] = CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(
        BackendUnavailableError, match="the NVIDIA driver does not start: CUDA_ERROR_NO_DEVICE: a text"
    ):
        CudaDevice()

    def missing(flags):
        raise RuntimeError('"cuda" is an NVIDIA driver library\nand can only be found via system search.')

    monkeypatch.setattr(driver, "cuInit", missing, raising=False)
    with pytest.raises(
        BackendUnavailableError, match=r"^no NVIDIA driver: .* system search; install the driver$"
    ):
        CudaDevice()


def test_without_cuda_bindings(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        BackendUnavailableError, match=r'a GPU needs cuda.*run: pip install "cuda-bindings>=12\.9"'
    ):
        CudaDevice()


def test_the_real_module_without_a_driver():
    """What this machine says, where it has cuda-bindings and no GPU."""
    pytest.importorskip("cuda.bindings.driver")
    try:
        CudaDevice()
    except BackendUnavailableError as error:
        assert "NVIDIA driver" in str(error) and "\n" not in str(error)


def test_both_devices_have_every_method_of_the_seam():
    from rt.cuda.device import Device
    from rt.cuda.host import HostDevice

    for name, method in inspect.getmembers(Device, inspect.isfunction):
        if name.startswith("_"):
            continue
        for kind in (CudaDevice, HostDevice):
            assert [*inspect.signature(getattr(kind, name)).parameters] == [
                *inspect.signature(method).parameters
            ]


def test_pinned_memory_is_what_it_says(gpu):
    array = gpu.pinned((2, 3), "float16")
    assert (
        array.shape == (2, 3)
        and array.dtype == np.float16
        and array.flags.c_contiguous
        and array.flags.writeable
    )
