"""Trains the model that `prepare.py` set up, and writes it as a folder that diffusers and rt read: RUN/model.

With ``--variant``, goes on to make one of the variants from it: RUN/inpainting, RUN/lcm or RUN/pixel-art.

``python train.py RUN`` on a GPU; on a CPU one worker a core is faster: ``torchrun --nproc-per-node 2 train.py RUN``.
Interrupted, it goes on from its last checkpoint when it is called again. Pictures of its progress appear in RUN.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from transformers import CLIPTokenizer

import model
from autoencoder import AutoencoderTask, DecoderTask, build_autoencoder
from config import Config
from dataset import encode_scenes
from diffusion import DiffusionTask
from inpainting import InpaintingTask, holes, widened
from lcm import LcmTask, walk_paths
from loop import Workers, train
from lora import LoraTask
from render import Renderer, pixel_art
from world import load

VAE_RATE, DECODER_RATE, UNET_RATE = 2e-3, 1e-3, 1e-3
VARIANT_RATES = {"inpainting": 5e-4, "lcm": 5e-4, "pixel-art": 2e-3}
PREVIEW_PROMPTS = [
    *("a red heart", "a pizza", "a cat", "a rocket", "a panda", "a sunflower"),
    *("a house", "a turtle", "a robot", "a banana", "a ghost", "a crown"),
    *("a fox on a blue background", "a lemon on a purple background", "a burger on a green background"),
    *("an owl on a yellow background", "a frog at the top left", "a moon above a pig"),
    *("a strawberry at the bottom right on a black background", "a dog and a donut", "a star above a car"),
    *("a penguin left of a tree on an orange background", "a lion and a red heart on a grey background"),
    "a mushroom right of a butterfly on a pink background",
]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder that prepare.py wrote")
    parser.add_argument("--variant", choices=VARIANT_RATES, help="made from the trained model")
    args = parser.parse_args()
    run, config, workers = args.run, Config.load(args.run), Workers()

    vae = build_autoencoder(config.vae_channels, config.size)
    pictures = (Renderer(config.size, config.font), load(config.emoji), config.vae_rows // workers.count)
    autoencoder = AutoencoderTask(vae, *pictures)
    train(autoencoder, run, workers, minutes=config.vae_minutes, rate=VAE_RATE)
    autoencoder.normalise()

    whole = model.build(config, CLIPTokenizer.from_pretrained(run / "tokenizer"), vae)
    examples = encode_scenes("latents", run, config, workers, whole)
    rows = config.unet_rows // workers.count
    task = DiffusionTask(whole, examples, rows, PREVIEW_PROMPTS)
    train(task, run, workers, minutes=config.unet_minutes, rate=UNET_RATE)
    train(DecoderTask(vae, *pictures), run, workers, minutes=config.decoder_minutes, rate=DECODER_RATE)

    if args.variant == "inpainting":
        examples = encode_scenes("holes", run, config, workers, whole, hole=holes(config.size))
        task = InpaintingTask(widened(whole), config, examples, rows, PREVIEW_PROMPTS)
    elif args.variant == "lcm":
        paths = walk_paths(run, config, workers, whole, examples)
        task = LcmTask(whole, paths, rows, PREVIEW_PROMPTS)
    elif args.variant == "pixel-art":
        examples = encode_scenes("pixel-art", run, config, workers, whole, style=pixel_art)
        task = LoraTask(whole, examples, rows, PREVIEW_PROMPTS)
    if args.variant:
        minutes, rate = config.variant_minutes[args.variant], VARIANT_RATES[args.variant]
        train(task, run, workers, minutes=minutes, rate=rate)
    if workers.first:
        folder = run / (args.variant or "model")
        task.export(folder)
        if args.variant in (None, "inpainting"):  # the others are additions to the model
            complete(folder, run, config)
        print(f"{folder}: done")


def complete(folder: Path, run: Path, config: Config) -> None:
    """Put right what diffusers writes: the tokenizer in CLIP's files, one dtype, the names of what can be drawn."""
    shutil.rmtree(folder / "tokenizer")  # transformers' own format, which few other programs read
    shutil.copytree(run / "tokenizer", folder / "tokenizer")
    # transformers loads a model as its config says, diffusers as float32: the two must agree.
    settings = folder / "text_encoder" / "config.json"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")
    names = [emoji.name for emoji in load(config.emoji)]
    (folder / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
