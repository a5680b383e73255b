"""What steps, samplers, guidance and precision do to a model: ``python compare.py MODEL BUNDLE [BUNDLE ...]``.

The same held-out prompts and seeds under each setting, judged by `judge.py`. PSNR is against the first bundle at the
same setting, so that it shows the precision alone.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import rt
from autoencoder import psnr
from evaluate import label
from judge import Judge, distance, held_out
from render import Renderer
from rt.bench.record import publish
from rt.samplers import SAMPLERS
from world import concepts

STEPS, GUIDANCE, SAMPLER_STEPS = 20, 4.0, 12


@dataclass(frozen=True)
class Result:
    """How one setting did: how many pictures are right, how far they are from the font's glyphs (root mean square in
    levels of 255), and the PSNR in dB where it was compared.
    """

    varied: str
    value: str
    right_percent: float
    distance: float
    psnr_db: float | None = None


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder that train.py wrote")
    parser.add_argument(
        "bundles", type=Path, nargs="+", help="what `rt build` made of it, the reference first"
    )
    parser.add_argument(
        "--prompts", type=int, default=48, help="with one emoji and with two, each (default: 48)"
    )
    parser.add_argument("--font", default="", help="NotoColorEmoji.ttf, where it is not in the usual place")
    parser.add_argument("--records", type=Path, help="folder to keep the figures in, such as bench/results")
    args = parser.parse_args()

    emoji = concepts(args.model)
    rng = np.random.default_rng(5)
    scenes = [
        *held_out(rng, emoji, args.prompts, pairs=False),
        *held_out(rng, emoji, args.prompts, pairs=True),
    ]
    pipes = [rt.Pipeline.from_bundle(bundle) for bundle in args.bundles]
    size = pipes[0].bundle.manifest.config.profiles[0].height
    judge = Judge(emoji, Renderer(size, args.font))

    def drawn(pipe: rt.Pipeline, **settings: Any) -> np.ndarray:
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **settings}
        pictures = pipe([scene.caption for scene in scenes], seed=0, **settings).images
        return np.stack([np.asarray(picture) for picture in pictures])

    def result(varied: str, value: str, pictures: np.ndarray, psnr_db: float | None = None) -> Result:
        verdicts = [judge(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)]
        right = 100 * float(np.mean([verdict.concepts_right for verdict in verdicts]))
        return Result(varied, value, round(right, 1), distance(verdicts), psnr_db)

    results = []
    reference = drawn(pipes[0])
    for pipe in pipes:
        pictures = reference if pipe is pipes[0] else drawn(pipe)
        near = None if np.array_equal(pictures, reference) else round(psnr(pictures, reference), 1)
        results.append(result("precision", pipe.bundle.manifest.config.dtype.value, pictures, near))
    for steps in (2, 4, 8, 12, 20, 50):
        results.append(result("steps", str(steps), drawn(pipes[0], num_inference_steps=steps)))
    for scale in (1.0, 2.0, 4.0, 7.5):
        results.append(result("guidance", f"{scale:g}", drawn(pipes[0], guidance_scale=scale)))
    for name in SAMPLERS:
        pictures = drawn(pipes[0], scheduler=name, num_inference_steps=SAMPLER_STEPS)
        results.append(result(f"sampler, {SAMPLER_STEPS} steps", name, pictures))

    model = label(pipes[0])
    figures = {"model": model, "prompts": len(scenes), "comparison": [asdict(result) for result in results]}
    if args.records:
        publish(f"comparison {model}", figures, args.records)
    print("\n".join(str(result) for result in results))


if __name__ == "__main__":
    main()
