"""Measures a trained model: ``python evaluate.py MODEL BUNDLE``, where BUNDLE is what ``rt build MODEL`` made.

Every prompt but the plain names is held out: its emoji were never seen with that background, in that corner or beside
each other. Pictures are drawn by rt and judged by `judge.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

import rt
from autoencoder import psnr, to_bytes, to_signed
from judge import Judge, Verdict, distance, held_out
from render import Renderer
from rt.bench.record import publish
from rt.sheet import sheet
from world import Scene, concepts

SHOWN = 30
"""Pictures on a sheet. The worst are those that are wrong, then those farthest from the font's glyphs."""


@torch.no_grad()
def reconstruct(model: Path, pictures: np.ndarray) -> np.ndarray:
    """What the autoencoder gives back of pictures, uint8 [N, H, W, 3]."""
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    latents = [vae.encode(part).latent_dist.mode() for part in to_signed(pictures).split(32)]
    return np.concatenate([to_bytes(vae.decode(part).sample) for part in latents])


def label(pipe: rt.Pipeline) -> str:
    """The model's name, with those of the LoRAs in it."""
    source = pipe.bundle.manifest.source
    return " + ".join([source.name, *(Path(lora.name).stem for lora in source.loras)])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder that train.py wrote")
    parser.add_argument("bundle", type=Path, help="what `rt build` made of it")
    parser.add_argument("--out", type=Path, default=Path("."), help="for the two sheets")
    parser.add_argument("--font", default="", help="NotoColorEmoji.ttf, where it is not in the usual place")
    parser.add_argument("--records", type=Path, help="folder to keep the figures in, such as bench/results")
    parser.add_argument(
        "--singles", type=int, default=200, help="prompts with one emoji (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=200, help="prompts with two (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--scheduler", help="the model's own if left out")
    args = parser.parse_args()
    if min(args.singles, args.pairs) < 1:
        parser.error("--singles and --pairs take 1 or more")

    emoji = concepts(args.model)
    pipe = rt.Pipeline.from_bundle(args.bundle)
    size = pipe.bundle.manifest.config.profiles[0].height
    renderer = Renderer(size, args.font)
    judge, rng = Judge(emoji, renderer), np.random.default_rng(1)

    def judged(scenes: list[Scene]) -> list[Verdict]:
        drawn = pipe(
            [scene.caption for scene in scenes],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            scheduler=args.scheduler,
            seed=0,
        ).images
        return [judge(scene, np.asarray(picture)) for scene, picture in zip(scenes, drawn, strict=True)]

    plain = judged([Scene((one,)) for one in emoji])
    singles = judged(held_out(rng, emoji, args.singles, pairs=False))
    pairs = judged(held_out(rng, emoji, args.pairs, pairs=True))
    coloured = [verdict for verdict in (*singles, *pairs) if verdict.scene.colour != "white"]
    truth = np.stack([renderer(verdict.scene, rng) for verdict in (*singles, *pairs)])

    def part(of: list[bool]) -> float:
        return round(100 * float(np.mean(of)), 1)

    figures = {
        "model": label(pipe),
        "settings": {
            "steps": args.steps,
            "guidance_scale": args.guidance_scale,
            "scheduler": args.scheduler or pipe.bundle.manifest.model.scheduler["_class_name"],
            "dtype": pipe.bundle.manifest.config.dtype.value,
        },
        "quality": {
            "reconstruction_psnr_db": round(psnr(reconstruct(args.model, truth), truth), 2),
            "plain_percent": part([v.concepts_right for v in plain]),
            "single_percent": part([v.concepts_right for v in singles]),
            "pair_percent": part([v.concepts_right for v in pairs]),
            "background_percent": part([v.colour == v.scene.colour for v in coloured]),
            "distance": distance([*plain, *singles, *pairs]),
        },
        "concepts": len(emoji),
        "prompts": {
            "plain": len(plain),
            "single": len(singles),
            "pair": len(pairs),
            "background": len(coloured),
        },
    }
    if args.records:
        dtype = figures["settings"]["dtype"]
        publish(f"quality {figures['model']} {dtype} {args.steps} steps", figures, args.records)
    args.out.mkdir(parents=True, exist_ok=True)
    everything = [*plain, *singles, *pairs]
    drawn_by_lot = [everything[i] for i in sorted(rng.choice(len(everything), SHOWN, replace=False))]
    worst = sorted(everything, key=lambda verdict: (verdict.right, -verdict.distance))[:SHOWN]
    for name, shown in (("by-lot.png", drawn_by_lot), ("worst.png", worst)):
        pictures = [Image.fromarray(verdict.picture) for verdict in shown]
        sheet(pictures, [str(verdict) for verdict in shown]).save(args.out / name)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
