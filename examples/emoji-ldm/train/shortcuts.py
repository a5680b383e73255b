"""What step caching and guidance intervals do to a model: ``python shortcuts.py MODEL BUNDLE``.

BUNDLE is what ``rt build MODEL --step-cache`` made. The same held-out prompts and seeds under each setting, judged by
`judge.py`; PSNR is against the full run. Time is that of the sampling loop of one picture, medians, settings in turn.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import rt
from autoencoder import psnr
from evaluate import label
from judge import Judge, distance, held_out
from render import Renderer
from rt.bench.record import publish
from rt.bench.timing import interleave
from world import concepts

STEPS, GUIDANCE = 20, 4.0
FULL: dict[str, Any] = {}
SETTINGS = [
    FULL,
    *({"step_cache": every} for every in (2, 3, 5)),
    *({"guidance_interval": interval} for interval in ((0.0, 0.5), (0.2, 0.8), (0.0, 0.8), (0.2, 1.0))),
    *({"guidance_interval": (0.2, 0.8), "step_cache": every} for every in (2, 3)),
]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder that train.py wrote")
    parser.add_argument("bundle", type=Path, help="what `rt build --step-cache` made of it")
    parser.add_argument(
        "--prompts", type=int, default=48, help="with one emoji and with two, each (default: 48)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each setting (default: 15)")
    parser.add_argument("--font", default="", help="NotoColorEmoji.ttf, where it is not in the usual place")
    parser.add_argument("--records", type=Path, help="folder to keep the figures in, such as bench/results")
    args = parser.parse_args()

    emoji = concepts(args.model)
    rng = np.random.default_rng(5)
    scenes = [
        *held_out(rng, emoji, args.prompts, pairs=False),
        *held_out(rng, emoji, args.prompts, pairs=True),
    ]
    pipe = rt.Pipeline.from_bundle(args.bundle)
    size = pipe.bundle.manifest.config.profiles[0].height
    judge = Judge(emoji, Renderer(size, args.font))

    def draw(prompts: list[str], setting: dict[str, Any]) -> Any:
        return pipe(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=0, **setting)

    pictures = [
        np.stack([np.asarray(picture) for picture in draw([s.caption for s in scenes], setting).images])
        for setting in SETTINGS
    ]
    calls = {
        str(index): lambda setting=setting: draw([scenes[0].caption], setting).timings.denoise_s
        for index, setting in enumerate(SETTINGS)
    }
    interleave(calls, 2)
    seconds = interleave(calls, args.rounds)
    results = []
    for index, setting in enumerate(SETTINGS):
        verdicts = [judge(scene, picture) for scene, picture in zip(scenes, pictures[index], strict=True)]
        pairs = zip(seconds["0"].seconds, seconds[str(index)].seconds, strict=True)
        results.append(
            {
                **setting,
                "right_percent": round(100 * float(np.mean([v.concepts_right for v in verdicts])), 1),
                "distance": distance(verdicts),
                "psnr_db": round(psnr(pictures[index], pictures[0]), 1) if setting else None,
                "loop_s": seconds[str(index)].median,
                "speedup": round(median(full / own for full, own in pairs), 2),
            }
        )
    model = label(pipe)
    figures = {
        "model": model,
        "settings": {
            "steps": STEPS,
            "guidance_scale": GUIDANCE,
            "dtype": pipe.bundle.manifest.config.dtype.value,
        },
        "prompts": len(scenes),
        "shortcuts": results,
    }
    if args.records:
        publish(f"shortcuts {model}", figures, args.records)
    print("\n".join(map(str, results)))


if __name__ == "__main__":
    main()
