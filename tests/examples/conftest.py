"""The training code of the demo model, as modules, and what draws with its font."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

CODE = Path(__file__).parents[2] / "examples" / "emoji-ldm" / "train"


@pytest.fixture(scope="module")
def code() -> Iterator[SimpleNamespace]:
    """The modules of the training code, which are scripts beside each other and no package."""
    before = set(sys.modules)
    sys.path.insert(0, str(CODE))
    try:
        import evaluate_inpainting
        import judge
        import render
        import vocabulary
        import world

        yield SimpleNamespace(
            world=world,
            render=render,
            vocabulary=vocabulary,
            judge=judge,
            evaluate_inpainting=evaluate_inpainting,
        )
    finally:
        sys.path.remove(str(CODE))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(CODE)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture(scope="module")
def renderer(code: SimpleNamespace) -> Any:
    if not any(path.exists() for path in code.render.FONTS):
        pytest.skip("Noto Color Emoji is not installed")
    return code.render.Renderer(64)
