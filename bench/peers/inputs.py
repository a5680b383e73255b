"""Inputs of each turn, drawn from a seed that differs from run to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rt.bench.bundle import PROMPT
from rt.bench.peers.peer import Inputs


def draw(checkpoint: Path, *, count: int, steps: int, seed: int) -> list[Inputs]:
    """`count` of them for the shapes of a diffusers folder; what the text encoder would give is normal noise."""
    unet, text = (_config(checkpoint, part) for part in ("unet", "text_encoder"))
    tokens, words = text["max_position_embeddings"], text["vocab_size"]
    latents = (1, unet["in_channels"], unet["sample_size"], unet["sample_size"])
    rng = np.random.default_rng(seed)
    return [
        Inputs(
            tokens=rng.integers(words, size=(1, tokens)),
            latents=rng.standard_normal(latents, np.float32),
            timestep=int(rng.integers(1, 1000)),
            context=rng.standard_normal((2, tokens, unet["cross_attention_dim"]), np.float32),
            noise=rng.standard_normal(latents, np.float32),
            prompt=PROMPT,
            steps=steps,
        )
        for _ in range(count)
    ]


def picture_size(checkpoint: Path) -> int:
    """Pixels along one side."""
    halvings = len(_config(checkpoint, "vae")["block_out_channels"]) - 1
    size: int = _config(checkpoint, "unet")["sample_size"] * 2**halvings
    return size


def _config(checkpoint: Path, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / part / "config.json").read_bytes())
    return config
