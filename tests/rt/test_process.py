"""A fork and the interpreter's end, while threads draw: an error or the picture, never a hang, never an abort."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from rt.backends import ON_HOST
from rt.errors import BackendError
from rt.process import Calls, Library, in_threads, on_fork

HOSTS = [name for name in ON_HOST if name != "inductor-cpu"]  # which needs a bundle of its own

FORKS = """
import gc, os, sys, threading, time, warnings
import rt
warnings.simplefilter("ignore")
bundle, backend = sys.argv[1:]

def open():
    return rt.Pipeline.from_bundle(bundle, backend=backend)

def draw(pipe):
    return pipe("a fox", num_inference_steps=2, seed=1, output_type="latent").images[0]

def child(what, act, leave=os._exit):
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        try:
            act()
        except rt.RtError as error:
            print(f"{what}: {type(error).__name__} {error}", flush=True)
            os._exit(0)
        print(what, flush=True)
        leave(0)
    assert os.waitpid(pid, 0)[1] == 0, what

pipe = open()

def as_its_own():
    first = draw(pipe)
    child("opened, its child draws", lambda: draw(pipe))
    assert (draw(pipe) == first).all()
    pipe.close()
    assert not pipe.engines._loaded

child("opened, draws", as_its_own)
expected = draw(pipe)

def own():
    assert (draw(open()) == expected).all()

def drop():
    global pipe
    pipe.close()
    del pipe
    gc.collect()

child("drawn, draws", lambda: draw(pipe))
child("drawn, opens its own", own)
child("drawn, lets go", drop, sys.exit)

drawing = threading.Event()
threading.Thread(target=lambda: [draw(pipe) for _ in iter(drawing.is_set, True)], daemon=True).start()
time.sleep(0.03)
child("drawing, draws", lambda: draw(pipe))
child("drawing, closes", pipe.close, sys.exit)
child("drawing, opens its own", own)
drawing.set()
assert (draw(pipe) == expected).all()
print("parent")
"""

SAID = "BackendError these engines were loaded before the process forked"


@pytest.mark.parametrize("backend", HOSTS)
def test_after_a_fork(demo_bundle: Path, backend: str) -> None:
    lines = run(FORKS, demo_bundle, backend)
    assert [line.partition(", and")[0] for line in lines] == [
        f"opened, its child draws: {SAID}",
        "opened, draws",
        f"drawn, draws: {SAID}",
        "drawn, opens its own",
        "drawn, lets go",
        f"drawing, draws: {SAID}",
        "drawing, closes",
        "drawing, opens its own",
        "parent",
    ]
    assert lines[0].endswith("; open the bundle after the fork, in each process its own")


ENDS = """
import sys, threading, time
import rt
pipe = rt.Pipeline.from_bundle(sys.argv[1], backend=sys.argv[2])
daemon, first, wait = sys.argv[3] == "daemon", threading.Event(), float(sys.argv[4])

def step(*_):
    first.set()

def loop():
    for _ in range(10**9 if daemon else 2):
        pipe("a fox", num_inference_steps=4, seed=1, callback_on_step_end=step)
    print("drawn", flush=True)

threading.Thread(target=loop, daemon=daemon).start()
if wait:
    first.wait()
    time.sleep(wait)
print("end", flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("backend", HOSTS)
@pytest.mark.parametrize("wait", ["0", "0.001", "0.011"])
def test_the_interpreter_ends_while_a_daemon_draws(demo_bundle: Path, backend: str, wait: str) -> None:
    assert run(ENDS, demo_bundle, backend, "daemon", wait, code=7) == ["end"]


@pytest.mark.parametrize("backend", HOSTS)
def test_a_thread_that_is_no_daemon_draws_to_its_end(demo_bundle: Path, backend: str) -> None:
    """Its engines load after the main thread has ended."""
    assert run(ENDS, demo_bundle, backend, "thread", "0", code=7) == ["end", "drawn"]


LATE = """
import atexit, sys
from concurrent.futures import ThreadPoolExecutor
import rt
pipe = rt.Pipeline.from_bundle(sys.argv[1], backend=sys.argv[2])

def draw(when):
    pipe("a fox", num_inference_steps=2, seed=1)
    print(when, flush=True)

atexit.register(draw, "at exit")
ThreadPoolExecutor().submit(draw, "pool")
"""


def test_a_pool_and_an_exit_handler_still_draw(demo_bundle: Path) -> None:
    assert run(LATE, demo_bundle, "openvino") == ["pool", "at exit"]


def run(program: str, *arguments: object, code: int = 0) -> list[str]:
    """Lines that it prints; nothing on stderr. The limit of the test ends it, and its children."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (code, "")
    return out.splitlines()


def in_child(act: Callable[[], None]) -> str:
    """What `act` raises in a forked child, or ""; the limit of the test ends the child."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            act()
        except BackendError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    try:
        with os.fdopen(read) as file:
            said = file.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        status = os.waitpid(pid, 0)[1]
    assert status == 0
    return said


class Owner:
    def __init__(self, destroyed: Callable[[], None] = int) -> None:
        self.calls = Calls(self)
        self._destroyed = destroyed

    def __del__(self) -> None:
        self._destroyed()


def test_calls_of_before_a_fork_raise_in_the_child_alone() -> None:
    owner = Owner()

    def act() -> None:
        with Calls(Owner()):  # what is made after the fork is sound
            pass
        with owner.calls:
            pass

    assert "open the bundle after the fork" in in_child(act)
    with owner.calls:
        pass


def test_what_was_loaded_before_a_fork_is_never_destroyed_in_the_child() -> None:
    destroyed: list[int] = []
    owner = [Owner(lambda: destroyed.append(1))]

    def act() -> None:
        owner.clear()
        if destroyed:
            raise BackendError("destroyed")

    assert in_child(act) == ""
    owner.clear()
    assert destroyed


def test_mending_is_for_those_that_live() -> None:
    mended: list[str] = []

    class Name(str):
        __slots__ = ("__weakref__",)

    gone, here = Name("gone"), Name("here")
    for name in (gone, here):
        on_fork(name, mended.append)
    del gone, name

    def act() -> None:
        if mended != ["here"]:
            raise BackendError(str(mended))

    assert in_child(act) == ""
    assert mended == []


def test_the_end_waits_for_calls_and_lets_no_daemon_in() -> None:
    library, events = Library(), []
    inside, leave = threading.Event(), threading.Event()

    def call() -> None:
        with library, library:
            inside.set()
            leave.wait()
            events.append("out")

    def late() -> None:
        with library:
            events.append("late")

    threading.Thread(target=call, daemon=True).start()
    inside.wait()
    threading.Timer(0.05, leave.set).start()
    library.end()
    assert events == ["out"]
    threading.Thread(target=late, daemon=True).start()  # for ever
    other = threading.Thread(target=late, daemon=False)
    other.start()
    other.join()
    late()
    time.sleep(0.05)
    assert events == ["out", "late", "late"]


def test_in_threads_is_a_map() -> None:
    assert in_threads(lambda item: item * 2, range(50), 4) == [2 * item for item in range(50)]
    assert in_threads(str, [], 4) == []
    names = in_threads(lambda _: (time.sleep(0.01), threading.current_thread().name)[1], range(8), 3)
    assert len(set(names)) == 3


def test_in_threads_raises_the_first_items_error_when_all_are_done() -> None:
    done = []

    def work(item: int) -> None:
        if item in (1, 3):
            time.sleep(0.05 * (item == 1))
            raise BackendError(str(item))
        done.append(item)

    with pytest.raises(BackendError, match=r"^1$"):
        in_threads(work, range(6), 3)
    assert sorted(done) == [0, 2, 4, 5]
