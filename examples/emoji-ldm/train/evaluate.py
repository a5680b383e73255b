"""Measures a trained model: ``python evaluate.py MODEL BUNDLE``, where BUNDLE is what ``rt build MODEL`` made.

Every prompt is held out: its emoji were never seen with that background, in that corner or beside each other. Pictures
are drawn by rt. What is in them is found without a network: at the place that the caption names, the picture's pixels
are compared with the font's glyphs of all concepts, moved by up to 6 pixels, on the background
that the picture has; the nearest in mean squared error is what it shows. The background is the colour of the palette
nearest to the median of the picture's border.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

import rt
from autoencoder import psnr, to_bytes, to_signed
from render import Renderer
from rt.sheet import sheet
from world import COLOURS, Emoji, Placed, Scene, draw, load

SHIFT_PX = 6
MARGIN = 0.1
"""Around a glyph's box, in parts of the picture: what is compared."""


@dataclass(frozen=True)
class Verdict:
    """What a picture of `scene` shows: the nearest emoji at each of its places, and the nearest background."""

    scene: Scene
    picture: np.ndarray
    found: tuple[Emoji, ...]
    colour: str

    @property
    def concepts_right(self) -> bool:
        """Whether every emoji of the caption is the nearest at its place."""
        return self.found == self.scene.emoji

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return self.concepts_right and self.colour == self.scene.colour


class Judge:
    """Finds emoji in pictures of one size by their pixels."""

    def __init__(self, emoji: tuple[Emoji, ...], size: int):
        self._emoji, self._size, self._renderer = emoji, size, Renderer(size)
        self._templates = lru_cache(maxsize=None)(self._make_templates)

    def __call__(self, scene: Scene, picture: np.ndarray) -> Verdict:
        """Judge a picture, uint8 [H, W, 3]."""
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        background = np.median(border, axis=0)
        distances = {name: np.square(np.subtract(rgb, background)).sum() for name, rgb in COLOURS.items()}
        found = tuple(self._nearest(picture, placed, background) for placed in scene.placed)
        return Verdict(scene, picture, found, min(distances, key=distances.__getitem__))

    def _nearest(self, picture: np.ndarray, placed: Placed, background: np.ndarray) -> Emoji:
        rows, columns = self._box(placed)
        seen = _halved(picture[rows, columns].astype(np.float32))
        alpha, premultiplied, owner = self._templates(placed.centre, placed.side)
        expected = premultiplied + (1 - alpha) * background.astype(np.float32)
        errors = np.square(expected - seen).mean(axis=(1, 2, 3))
        return self._emoji[owner[errors.argmin()]]

    def _box(self, placed: Placed) -> tuple[slice, slice]:
        reach = placed.side / 2 + MARGIN
        edges = [
            [round(np.clip(centre + sign * reach, 0, 1) * self._size / 2) * 2 for sign in (-1, 1)]
            for centre in placed.centre
        ]
        return slice(*edges[1]), slice(*edges[0])

    def _make_templates(
        self, centre: tuple[float, float], side: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all emoji and shifts: alpha [N, h, w, 1], colour times alpha [N, h, w, 3], which emoji [N]."""
        rows, columns = self._box(Placed(self._emoji[0], centre, side))
        alphas, colours, owner = [], [], []
        for index, emoji in enumerate(self._emoji):
            glyph = self._renderer.glyph(emoji, round(side * self._size))
            for shift in itertools.product(range(-SHIFT_PX, SHIFT_PX + 1, 2), repeat=2):
                layer = Image.new("RGBA", (self._size, self._size))
                x, y = (
                    round(c * self._size - extent / 2) + by
                    for c, extent, by in zip(centre, glyph.size, shift, strict=True)
                )
                layer.paste(glyph, (x, y))
                pixels = np.asarray(layer, np.float32)[rows, columns]
                alpha = pixels[..., 3:] / 255
                alphas.append(_halved(alpha))
                colours.append(_halved(pixels[..., :3] * alpha))
                owner.append(index)
        return np.stack(alphas), np.stack(colours), np.array(owner)


def _halved(pixels: np.ndarray) -> np.ndarray:
    height, width, channels = pixels.shape
    return pixels.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))


def held_out(rng: np.random.Generator, emoji: tuple[Emoji, ...], count: int, pairs: bool) -> list[Scene]:
    """Different scenes that training never saw, of one emoji or of two."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = draw(rng, emoji, held_out=True)
        if (len(scene.emoji) == 2) == pairs:
            scenes[scene.caption] = scene
    return list(scenes.values())


@torch.no_grad()
def reconstruct(model: Path, pictures: np.ndarray) -> np.ndarray:
    """What the autoencoder gives back of pictures, uint8 [N, H, W, 3]."""
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    latents = [vae.encode(part).latent_dist.mode() for part in to_signed(pictures).split(32)]
    return np.concatenate([to_bytes(vae.decode(part).sample) for part in latents])


def told(verdict: Verdict) -> str:
    """The caption, and where something is wrong what was found instead."""
    if verdict.right:
        return verdict.scene.caption
    return f"{verdict.scene.caption} [{', '.join(emoji.name for emoji in verdict.found)}; {verdict.colour}]"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder that train.py wrote")
    parser.add_argument("bundle", type=Path, help="what `rt build` made of it")
    parser.add_argument("--out", type=Path, default=Path("."), help="for evaluation.json and the two sheets")
    parser.add_argument(
        "--singles", type=int, default=200, help="prompts with one emoji (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=200, help="prompts with two (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--scheduler", help="the model's own if left out")
    args = parser.parse_args()

    emoji = load(len((args.model / "names.txt").read_text(encoding="utf-8").splitlines()))
    pipe = rt.Pipeline.from_bundle(args.bundle)
    size = pipe.bundle.manifest.config.profiles[0].height
    judge, rng = Judge(emoji, size), np.random.default_rng(1)

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
    renderer = Renderer(size)
    truth = np.stack([renderer(verdict.scene, rng) for verdict in (*singles, *pairs)])

    def part(of: list[bool]) -> float:
        return round(100 * float(np.mean(of)), 1)

    figures = {
        "reconstruction_psnr_db": round(psnr(reconstruct(args.model, truth), truth), 2),
        "plain_top1_percent": part([v.concepts_right for v in plain]),
        "held_out_single_top1_percent": part([v.concepts_right for v in singles]),
        "held_out_pair_both_percent": part([v.concepts_right for v in pairs]),
        "held_out_background_percent": part([v.colour == v.scene.colour for v in coloured]),
        "prompts": {
            "plain": len(plain),
            "singles": len(singles),
            "pairs": len(pairs),
            "coloured": len(coloured),
        },
        "concepts": len(emoji),
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "scheduler": args.scheduler or "the model's own",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    everything = [*plain, *singles, *pairs]
    right, wrong = ([v for v in everything if v.right == wanted] for wanted in (True, False))
    for name, verdicts in (("right.png", right), ("wrong.png", wrong)):
        if verdicts:
            chosen = rng.permutation(len(verdicts))[:32]
            shown = [verdicts[i] for i in sorted(chosen)]
            pictures = [Image.fromarray(verdict.picture) for verdict in shown]
            sheet(pictures, [told(verdict) for verdict in shown]).save(args.out / name)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
