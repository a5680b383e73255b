"""Prepares a training: ``python prepare.py RUN [--preset cpu|gpu]``.

Writes the run's configuration, its vocabulary and a sheet of scenes to look at. The scenes that are learned from are
drawn by `train.py`: that takes a quarter of a millisecond each.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

import vocabulary
from config import PRESETS, Config
from render import Renderer, grid
from world import COLOURS, CONTEXT, CORNERS, RELATIONS, Scene, draw, load


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the training, made if need be")
    parser.add_argument(
        "--preset", choices=PRESETS, default="cpu", help="sizes and budgets (default: %(default)s)"
    )
    parser.add_argument("--font", default="", help="NotoColorEmoji.ttf, where it is not in the usual place")
    args = parser.parse_args()

    config = replace(PRESETS[args.preset], font=args.font)
    emoji, renderer = load(config.emoji), Renderer(config.size, config.font)
    if (args.run / "config.json").exists() and Config.load(args.run) != config:
        raise SystemExit(f"error: {args.run} belongs to another configuration: choose another folder")
    args.run.mkdir(parents=True, exist_ok=True)
    config.save(args.run / "config.json")

    words = [
        *(Scene((one,), colour).caption for one in emoji for colour in COLOURS),
        *(Scene((emoji[0],), place=corner).caption for corner in CORNERS),
        *(Scene((emoji[0], emoji[1]), place=relation).caption for relation in RELATIONS),
    ]
    vocabulary.write(args.run / "tokenizer", words, CONTEXT)

    rng = np.random.default_rng(0)
    scenes = [draw(rng, emoji) for _ in range(96)]
    grid([renderer(scene, rng) for scene in scenes], 16, scale=1).save(args.run / "scenes.png")
    print(
        f"{args.run}: {len(emoji)} emoji at {config.size} x {config.size}; look at scenes.png, then run train.py"
    )


if __name__ == "__main__":
    main()
