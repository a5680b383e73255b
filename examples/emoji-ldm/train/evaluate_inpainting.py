"""Measures the inpainting variant: ``python evaluate_inpainting.py MODEL BUNDLE``, BUNDLE being what rt made of MODEL.

From a picture of a pair that training never saw, the second emoji is cut out, and the model paints it from the caption.
Emoji are found by `judge.py`. What lies outside the hole should stay: its PSNR is given beside that of a picture
that only went through the autoencoder, which is the most that can be had.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import rt
from autoencoder import psnr
from evaluate import label, reconstruct
from inpainting import rectangle
from judge import Judge, held_out
from render import Renderer
from rt.bench.record import publish
from rt.sheet import sheet
from world import Scene, concepts

MARGIN = 0.05
"""Of a hole around its emoji, in parts of the picture."""


def cut(scene: Scene, size: int) -> np.ndarray:
    """The hole where the second emoji of a pair stands, float32 [size, size] of 0 and 1."""
    placed = scene.placed[1]
    return rectangle(np.array(placed.centre), np.full(2, placed.side / 2 + MARGIN), size)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder that train.py wrote")
    parser.add_argument("bundle", type=Path, help="what `rt build` made of it")
    parser.add_argument("--out", type=Path, default=Path("."), help="for the sheet")
    parser.add_argument("--font", default="", help="NotoColorEmoji.ttf, where it is not in the usual place")
    parser.add_argument("--records", type=Path, help="folder to keep the figures in, such as bench/results")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    args = parser.parse_args()

    emoji = concepts(args.model)
    pipe = rt.Pipeline.from_bundle(args.bundle)
    size = pipe.bundle.manifest.config.profiles[0].height
    renderer = Renderer(size, args.font)
    judge = Judge(emoji, renderer)
    scenes = held_out(np.random.default_rng(7), emoji, args.pairs, pairs=True)
    pictures = [renderer(scene) for scene in scenes]
    holes = [cut(scene, size) for scene in scenes]
    painted = [
        np.asarray(
            pipe(
                scene.caption,
                image=picture,
                mask_image=(hole * 255).astype(np.uint8),
                num_inference_steps=args.steps,
                guidance_scale=args.guidance_scale,
                seed=index,
            ).images[0]
        )
        for index, (scene, picture, hole) in enumerate(zip(scenes, pictures, holes, strict=True))
    ]
    verdicts = [judge(scene, picture) for scene, picture in zip(scenes, painted, strict=True)]
    outside = np.stack(holes) < 0.5
    truth = np.stack(pictures)[outside]
    right = [verdict.found[1] == verdict.scene.emoji[1] for verdict in verdicts]
    back = reconstruct(args.model, np.stack(pictures))
    figures = {
        "model": label(pipe),
        "settings": {"steps": args.steps, "guidance_scale": args.guidance_scale},
        "inpainting": {
            "painted_percent": round(100 * float(np.mean(right)), 1),
            "outside_psnr_db": round(psnr(np.stack(painted)[outside], truth), 2),
            "outside_psnr_of_autoencoder_db": round(psnr(back[outside], truth), 2),
        },
        "prompts": {"pair": len(scenes)},
    }
    if args.records:
        publish(f"inpainting {figures['model']}", figures, args.records)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [
        (np.where(hole[..., None] > 0.5, 128, picture).astype(np.uint8), filled)
        for picture, hole, filled in zip(pictures[:6], holes, painted, strict=False)
    ]
    captions = [scene.caption for scene in scenes[:6]]
    shown = [Image.fromarray(picture) for column in zip(*rows, strict=True) for picture in column]
    sheet(shown, ["" for _ in captions] + captions).save(args.out / "inpainting.png")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
