"""Arrays of a device, what a launch is held to, and the device on the host, which must be as late as a GPU may be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rt.cuda import DeviceArray, capture
from rt.cuda.host import HostDevice
from rt.errors import BackendError
from rt.kernel_image import TensorArgument


@pytest.fixture
def stream(device):
    return device.create_stream()


def put(device, stream, values, dtype="float32"):
    source = device.pinned(values.shape, dtype)
    source[...] = values
    array = device.allocate(values.shape, dtype)
    device.upload(array, source, stream)
    return array, source


def get(device, stream, array):
    target = device.pinned(array.shape, array.dtype)
    device.download(target, array, stream)
    device.synchronise(stream)
    return target


def test_views_of_an_array():
    array = DeviceArray(1000, (4, 3, 2), "bfloat16")
    assert (array.size, array.nbytes, len(array)) == (24, 48, 4)
    assert array.reshape(2, -1) == DeviceArray(1000, (2, 12), "bfloat16")
    assert array.part(1, 3) == DeviceArray(1012, (2, 3, 2), "bfloat16")
    assert array[3] == DeviceArray(1036, (3, 2), "bfloat16")
    assert [row.pointer for row in array] == [1000, 1012, 1024, 1036]
    assert array.part(4, 4).size == 0
    with pytest.raises(BackendError, match=r"\(4, 3, 2\) cannot become \(5, -1\): it has 24 elements"):
        array.reshape(5, -1)
    with pytest.raises(BackendError, match=r"rows 2 to 5 are not in an array \(4, 3, 2\)"):
        array.part(2, 5)


def test_other_libraries_read_an_array_by_its_interface():
    interface = DeviceArray(4096, (2, 3), "float16").__cuda_array_interface__
    assert interface["data"] == (4096, False)
    assert interface["shape"] == (2, 3)
    assert np.dtype(interface["typestr"]) == np.float16
    assert np.dtype(DeviceArray(0, (1,), "bfloat16").__cuda_array_interface__["typestr"]) == np.dtype("V2")


def test_nothing_runs_before_the_host_waits(device, stream, make_image):
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    x, source = put(device, stream, values)
    source[...] = 7  # too early, as the stream shows
    assert (get(device, stream, x) == 7).all()
    y = device.allocate((2, 4), "float32")
    assert np.isnan(device.view(y)).all(), "fresh memory is no zeros"
    kernel = device.load(make_image(), b"")
    kernel.launch(stream, {"rows": 2}, [x], [y])
    assert np.isnan(device.view(y)).all()
    assert (get(device, stream, y) == 21).all()


def test_an_event_is_waited_for_and_no_more(device, stream):
    x, y = device.allocate((1,), "float32"), device.allocate((1,), "float32")
    event = device.create_event()
    device.wait(event)  # never recorded: nobody to wait for
    device.record(event, stream)
    device.clear(x, stream)
    device.record(event, stream)
    device.clear(y, stream)
    device.wait(event)
    assert device.view(x) == 0 and np.isnan(device.view(y))
    device.synchronise(stream)
    assert device.view(y) == 0


def test_a_stream_follows_another_up_to_where_it_was_then(device, stream):
    x, y = device.allocate((1,), "float32"), device.allocate((1,), "float32")
    event, other = device.create_event(), device.create_stream()
    device.clear(x, stream)
    device.record(event, stream)
    device.follow(other, event)
    device.record(event, stream)  # of which the other stream knows nothing
    device.clear(y, stream)
    device.synchronise(other)
    assert device.view(x) == 0 and np.isnan(device.view(y))


def test_a_graph_does_its_work_as_often_as_it_is_launched(device, stream, make_image):
    kernel = device.load(make_image(), b"")
    x, _ = put(device, stream, np.ones((1, 4), np.float32))
    y = device.allocate((1, 4), "float32")

    def work():
        kernel.launch(stream, {"rows": 1}, [x], [y])
        device.copy(x, y, stream)

    graph = capture(device, stream, work)
    device.synchronise(stream)
    assert (device.view(x) == 1).all(), "captured work does not run"
    graph.launch(stream)
    device.chain([graph, graph]).launch(stream)
    assert (get(device, stream, x) == 27).all()
    assert [call.name for call in device.calls if not call.captured].count("graph") == 2
    graph.close()
    with pytest.raises(BackendError, match="launch of a graph that is closed"):
        graph.launch(stream)


def test_a_capture_that_fails_ends(device, stream):
    with pytest.raises(BackendError, match="allocate while a stream is being captured"):
        capture(device, stream, lambda: device.allocate((1,), "float32"))
    device.allocate((1,), "float32")
    capture(device, stream, lambda: None).launch(stream)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, s: d.synchronise(s), "synchronise while a stream is being captured"),
        (lambda d, s: d.wait(d.create_event()), "wait while a stream is being captured"),
        (lambda d, s: d.begin_capture(s), "begin_capture of a stream that is being captured"),
        (lambda d, s: d.pinned((1,), "uint8"), "pinned while a stream is being captured"),
    ],
)
def test_what_a_capture_forbids(device, stream, call, message):
    with pytest.raises(BackendError, match=message):
        capture(device, stream, lambda: call(device, stream))


def test_mistakes_that_a_gpu_would_not_report(device, stream):
    array = device.allocate((2,), "float32")
    with pytest.raises(BackendError, match="is not 8 contiguous bytes of pinned memory"):
        device.upload(array, np.zeros(2, np.float32), stream)
    with pytest.raises(BackendError, match="is not 8 contiguous bytes of pinned memory"):
        device.download(device.pinned((4,), "float32")[::2], array, stream)
    with pytest.raises(BackendError, match="not as many bytes"):
        device.copy(array, array.part(0, 1), stream)
    with pytest.raises(BackendError, match="end_capture of a stream that is not being captured"):
        device.end_capture(stream)
    with pytest.raises(BackendError, match="is not allocated"):
        device.view(DeviceArray(array.pointer, (3,), "float32"))
    with pytest.raises(BackendError, match="is not allocated"):
        device.free(DeviceArray(array.pointer + 4, (1,), "float32"))
    with pytest.raises(BackendError, match="unpin of an array that is not pinned"):
        device.unpin(np.zeros(1))
    device.clear(array, stream)
    with pytest.raises(BackendError, match="work is under way"):
        device.free(array)
    with pytest.raises(BackendError, match="work is under way"):
        device.destroy_stream(stream)
    device.synchronise(stream)
    device.free(array)
    device.destroy_stream(stream)


def in_another_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_a_thread_activates_the_device_first(device, stream):
    """As a context of CUDA, which is current in the thread that made it and in those that ask for it."""
    array, pinned, event = (
        device.allocate((2,), "float32"),
        device.pinned((2,), "float32"),
        device.create_event(),
    )
    calls = {
        "allocate": lambda: device.allocate((2,), "float32"),
        "free": lambda: device.free(array),
        "pinned": lambda: device.pinned((2,), "float32"),
        "unpin": lambda: device.unpin(pinned),
        "create_stream": device.create_stream,
        "destroy_stream": lambda: device.destroy_stream(stream),
        "upload": lambda: device.upload(array, pinned, stream),
        "clear": lambda: device.clear(array, stream),
        "create_event": device.create_event,
        "destroy_event": lambda: device.destroy_event(event),
        "record": lambda: device.record(event, stream),
        "wait": lambda: device.wait(event),
        "synchronise": lambda: device.synchronise(stream),
        "begin_capture": lambda: device.begin_capture(stream),
        "end_capture": lambda: device.end_capture(stream),
        "chain": lambda: device.chain([]),
        "close": device.close,
    }
    before = device.in_use
    for name, call in calls.items():
        with pytest.raises(BackendError, match=f"^{name} in a thread that has not activated the device$"):
            in_another_thread(call)
    assert device.in_use == before
    in_another_thread(lambda: (device.activate(), device.allocate((2,), "float32")))
    assert device.in_use == before + 1


def test_memory_that_is_full():
    device = HostDevice(memory=100)
    first = device.allocate((20,), "float32")
    with pytest.raises(MemoryError, match="allocate of 40 bytes: memory of host is full"):
        device.allocate((10,), "float32")
    device.free(first)
    device.allocate((25,), "float32")
    assert (device.allocated, device.in_use) == (100, 1)


def test_a_launch_is_held_to_the_image(device, stream, make_image):
    kernel = device.load(make_image(), b"")
    x, y = device.allocate((2, 4), "float32"), device.allocate((2, 4), "float32")
    half = device.allocate((2, 4), "float16")
    for arguments, message in [
        (({"rows": 2, "columns": 5}, [x], [y]), "was compiled for columns = 4, not 5"),
        (({"rows": 2}, [x, x], [y]), r"takes 1 inputs \(x\), not 2"),
        (({"rows": 2}, [x], []), r"takes 1 outputs \(y\), not 0"),
        (({"rows": 2}, [half], [y]), r"takes x as float32 \(2, 4\), not float16 \(2, 4\)"),
        (({"rows": 3}, [x], [y]), r"takes x as float32 \(3, 4\), not float32 \(2, 4\)"),
    ]:
        with pytest.raises(BackendError, match=f"scale_float32_sm90 {message}"):
            kernel.launch(stream, *arguments)
    kernel.launch(
        stream, {"rows": 2}, [x.reshape(8)], [y]
    )  # shapes are how a kernel sees memory, not what it is


def test_a_kernel_without_an_implementation(device, make_image):
    odd = make_image(kernel="odd", inputs=(TensorArgument(name="x", shape=("1",), dtype="uint8"),))
    with pytest.raises(BackendError, match="odd has no implementation here"):
        device.load(odd, b"")
