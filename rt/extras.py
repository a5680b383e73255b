"""The optional dependencies, as `pyproject.toml` names them: which one is missing and how to get it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires

from rt.errors import BackendUnavailableError

DISTRIBUTION = "rt-diffusion"


def requirements(extra: str) -> list[str]:
    """The requirements of one extra, such as `openvino>=2025.2`."""
    marker = re.compile(rf"""^([^;]+?)\s*;.*extra == ['"]{re.escape(extra)}['"]""")
    return [match[1] for line in requires(DISTRIBUTION) or () if (match := marker.match(line))]


def packages(extra: str) -> list[str]:
    """Their names alone."""
    return [re.split(r"[^\w-]", requirement)[0] for requirement in requirements(extra)]


def install_line(extra: str) -> str:
    """The command that installs one extra's packages, such as `pip install "openvino>=2025.2"`."""
    return " ".join(["pip install", *(f'"{requirement}"' for requirement in requirements(extra))])


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around imports that `what` needs from an extra.

    Raises:
        BackendUnavailableError: Instead of ModuleNotFoundError, with the command that helps.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "rt").partition(".")[0] == "rt":
            raise
        raise BackendUnavailableError(
            f"{what} needs {error.name}, which is not installed; run: {install_line(extra)}"
        ) from error
