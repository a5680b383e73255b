"""Run compiled latent-diffusion models.

>>> import rt
>>> pipe = rt.Pipeline.from_bundle("out/emoji")
>>> pipe("a red heart", num_inference_steps=20, seed=7).images[0].save("heart.png")
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rt.bundle import Bundle as Bundle
    from rt.errors import RtError as RtError
    from rt.pipeline import Pipeline as Pipeline
    from rt.pipeline import PipelineOutput as PipelineOutput
    from rt.samplers import Scheduler as Scheduler

__all__ = ["Bundle", "Pipeline", "PipelineOutput", "RtError", "Scheduler", "__version__"]
__version__ = "0.1.0"

_HOMES = {
    "Bundle": "rt.bundle",
    "Pipeline": "rt.pipeline",
    "PipelineOutput": "rt.pipeline",
    "RtError": "rt.errors",
    "Scheduler": "rt.samplers",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import rt` alone stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
