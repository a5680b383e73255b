"""The build of our bundle of a model, apart from its timing: a process that has compiled leaves memory taken.

It is a bundle for a benchmark, see `rt.bench.gpu_parts.bare`, max-autotune. Where a command has too little time for it,
the compilers' caches in the scratch folder let the next one begin where it ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from rt.bench.gpu_parts import bare
from rt.bench.gpu_parts.model import Model
from rt.bench.gpu_parts.ours import model_bundle
from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import find
from rt.bench.gpu_parts.settings import SETTINGS
from rt.bundle import Bundle
from rt.config import DType


def run(context: Context, setting: str, dtype: str = DType.FP16.value) -> Iterator[Figures]:
    """See the module. `bundle`, `programs`, `mib` and `seconds`, those of the build also where it was done before.

    Args:
        context: Of the run.
        setting: Its name.
        dtype: Of the build.
    """
    place = find(context)
    wanted = SETTINGS[setting]
    model = Model(setting=wanted.tiny() if context.dry else wanted, place=place, seed=context.seed)
    built = model_bundle(model, context.scratch, DType(dtype))
    make = partial(bare.build, model.checkpoint, guided=wanted.guided, beside=not context.dry)
    built.build(model.profile, make, max_autotune=not context.dry)
    size = sum(file.stat().st_size for file in built.path.rglob("*") if file.is_file())
    yield {
        "bundle": built.path.name,
        "programs": len(Bundle.open(built.path).manifest.engines),
        "mib": size / 2**20,
        "seconds": built.seconds,
    }
