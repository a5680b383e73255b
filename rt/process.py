"""What calls into libraries with threads of their own must survive: a fork of the process, and its interpreter's end.

A child has none of the threads that its parent's libraries started: what was loaded before the fork never answers in
it, and whoever destroys it waits for ever. At its end Python stops every daemon thread that comes back from a library,
which C++ answers with `std::terminate`.
https://docs.python.org/3/c-api/init.html#c.PyEval_RestoreThread
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from rt.errors import BackendError

T = TypeVar("T")
R = TypeVar("R")


class Calls:
    """The calls of one owner into a library, each in a `with` of this.

    In a child that was forked since they raise, and the owner stays, whoever lets go of it. At the interpreter's end
    those of daemon threads begin no more, and it waits for those that are under way.

    Args:
        owner: What holds the library's objects.

    Attributes:
        forked: Whether this is such a child.
    """

    def __init__(self, owner: object) -> None:
        self.forked = False
        on_fork(owner, _keep)
        on_fork(self, Calls._lose)

    def check(self) -> None:
        """Raise BackendError in a child."""
        if self.forked:
            raise BackendError(
                "these engines were loaded before the process forked, and their threads are in the parent alone; "
                "open the bundle after the fork, in each process its own"
            )

    def __enter__(self) -> None:
        self.check()
        library.__enter__()

    def __exit__(self, *_: object) -> None:
        library.__exit__()

    def _lose(self) -> None:
        self.forked = True


class Library:
    """A `with` around a call that belongs to no engine yet, such as one that loads it; see `Calls`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}
        self._ended = False

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            while self._ended and thread not in self._inside and threading.current_thread().daemon:
                self._changed.wait()  # until the process is gone
            self._inside[thread] = self._inside.get(thread, 0) + 1

    def __exit__(self, *_: object) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._inside[thread] -= 1
            if not self._inside[thread]:
                del self._inside[thread]
                self._changed.notify_all()

    def end(self) -> None:
        """Let no daemon thread in any more, and wait until the last one is out."""
        own = threading.get_ident()
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: self._inside.keys() <= {own})

    def fork(self) -> None:
        """In a child: other threads are gone, with what they held."""
        own = threading.get_ident()
        self._changed = threading.Condition()
        self._inside = {thread: depth for thread, depth in self._inside.items() if thread == own}


library = Library()
"""Of all libraries: the threads that are in one of them."""


def on_fork(owner: Any, mend: Callable[[Any], None]) -> None:
    """Have `mend(owner)` called first thing in every child that is forked while `owner` lives."""
    _mends.setdefault(owner, []).append(mend)


def in_threads(function: Callable[[T], R], items: Iterable[T], count: int) -> list[R]:
    """As `map`, in at most `count` threads; all are done when it ends, also by an error, the first item's first.

    Unlike an executor's, these threads start after the main one has ended, too, while others still draw.
    """
    waiting = deque(enumerate(items))
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while waiting:
            try:
                index, item = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                results[index] = function(item)
            except BaseException as error:
                errors[index] = error

    threads = [threading.Thread(target=work) for _ in range(min(count, len(waiting)))]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        for thread in started:
            thread.join()
    finally:
        waiting.clear()  # of Ctrl-C; what runs is waited for
        for thread in started:
            thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[index] for index in sorted(results)]


_mends: WeakKeyDictionary[Any, list[Callable[[Any], None]]] = WeakKeyDictionary()


def _keep(owner: object) -> None:
    """Never destroy it, not at the end either."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _mend() -> None:
    library.fork()
    for owner, mends in list(_mends.items()):
        for mend in mends:
            mend(owner)


atexit.register(library.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mend)
