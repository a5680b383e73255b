"""Everything that can go wrong, as a tree; catch the level that you can act on.

    RtError                        1   base of all below; `.exit_code` is what the command line returns
    ├─ ConfigError (ValueError)    2   an argument has no valid meaning
    │  ├─ ShapeError               2   a size that no profile of the bundle was built for
    │  └─ ArgumentError (TypeError)  2   a keyword that does not exist
    ├─ CheckpointError             1   the model to build cannot be read or is not what it says
    │  └─ PickleError              2   a file that could run code when read
    ├─ BuildError                  1   the build could not finish; nothing was left behind
    │  └─ AccuracyError            1   an engine differs from torch by more than its precision explains
    ├─ BundleError                 3   not a bundle
    │  ├─ IntegrityError           3   a file of the bundle is missing or changed
    │  └─ IncompatibleBundleError  3   a bundle that this version or engine cannot run
    ├─ BackendError                1   an engine failed
    │  └─ BackendUnavailableError  4   a package or device that is needed is not there
    └─ NumericsError               1   NaN or Inf in the output of a component

Exit code 5 is out of memory (Python's own `MemoryError`), 130 Ctrl-C.
Messages say what was got, what was expected and what to do, on one line.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class RtError(Exception):
    """Base of every error that rt raises on purpose."""

    exit_code = 1


class ConfigError(RtError, ValueError):
    """An argument has no valid meaning."""

    exit_code = 2


class ShapeError(ConfigError):
    """A size that the model cannot have or no profile of the bundle was built for."""


class ArgumentError(ConfigError, TypeError):
    """A keyword argument that does not exist."""


class CheckpointError(RtError):
    """The model to build cannot be read or is not what it says it is."""


class PickleError(CheckpointError):
    """A checkpoint format that can run code when it is read."""

    exit_code = 2


class BuildError(RtError):
    """A build could not finish; nothing was left behind."""


class AccuracyError(BuildError):
    """An engine differs from torch by more than its precision explains."""


class BundleError(RtError):
    """The path is not a bundle."""

    exit_code = 3


class IntegrityError(BundleError):
    """A file of the bundle is missing or is not the one that was built."""


class IncompatibleBundleError(BundleError):
    """A sound bundle that this version or this engine cannot run."""


class BackendError(RtError):
    """An engine failed to load or to run."""


class BackendUnavailableError(BackendError):
    """A package or a device that is needed is not there."""

    exit_code = 4


class NumericsError(RtError):
    """A component gave NaN or Inf."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean X?)` for the valid name closest to `name`, or nothing when none is close."""
    close = difflib.get_close_matches(name.lower(), [*valid], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def printable(text: str) -> str:
    """The text on one line: what would not print, or would steer a terminal, as Python writes it in a string."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def shown(value: object) -> str:
    """Any value for a message: as Python writes it, on one line and short, also where it cannot be written."""
    try:
        return printable(_SHORT.repr(value))
    except Exception:  # an object's own, and a whole number of more digits than Python writes
        return f"{type(value).__name__} of a kind that cannot be shown"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80
