"""What a run is made of: a preset for two CPU cores, one for a GPU, and one of seconds that tests whether all runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """Sizes and budgets of one training."""

    size: int
    """Height and width of the pictures in pixels."""
    emoji: int
    """How many of ``emoji.tsv``."""
    vae_channels: tuple[int, ...]
    unet_channels: tuple[int, ...]
    unet_attention: tuple[bool, ...]
    """Whether a level of the U-Net has cross-attention."""
    text_width: int
    text_layers: int
    vae_rows: int
    unet_rows: int
    """Rows of a batch, over all workers."""
    vae_minutes: float
    unet_minutes: float
    decoder_minutes: float
    variant_minutes: dict[str, float]
    """Of each variant, by its name."""
    scenes: int
    """Scenes whose latents the U-Net learns from; each is met again with other noise."""
    paths: int
    """Of the teacher, that the four-step student learns from."""
    font: str = ""
    """The font's file, where it is not in the usual place."""

    @property
    def factor(self) -> int:
        """Pixels a side that one latent stands for."""
        return 2 ** (len(self.vae_channels) - 1)

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, run: Path) -> Config:
        """The configuration that `prepare.py` wrote."""
        path = run / "config.json"
        if not path.exists():
            raise SystemExit(f"error: {path} does not exist: run `python prepare.py {run}` first")
        read = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
        )


PRESETS = {
    "cpu": Config(
        size=64,
        emoji=48,
        vae_channels=(32, 48, 96),
        unet_channels=(96, 128, 160),
        unet_attention=(False, True, True),
        text_width=192,
        text_layers=3,
        vae_rows=8,
        unet_rows=96,
        vae_minutes=10,
        unet_minutes=45,
        decoder_minutes=6,
        variant_minutes={"inpainting": 9, "lcm": 8, "pixel-art": 5},
        scenes=32_000,
        paths=9_600,
    ),
    "gpu": Config(
        size=128,
        emoji=128,
        vae_channels=(32, 64, 128, 128),
        unet_channels=(96, 160, 224),
        unet_attention=(True, True, True),
        text_width=192,
        text_layers=4,
        vae_rows=64,
        unet_rows=512,
        vae_minutes=8,
        unet_minutes=15,
        decoder_minutes=2,
        variant_minutes={"inpainting": 5, "lcm": 8, "pixel-art": 3},
        scenes=400_000,
        paths=60_000,
    ),
    "smoke": Config(
        size=64,
        emoji=6,
        vae_channels=(8, 8, 16),
        unet_channels=(32, 64),
        unet_attention=(False, True),
        text_width=48,
        text_layers=1,
        vae_rows=2,
        unet_rows=4,
        vae_minutes=0.02,
        unet_minutes=0.02,
        decoder_minutes=0.01,
        variant_minutes={"inpainting": 0.02, "lcm": 0.02, "pixel-art": 0.02},
        scenes=128,
        paths=128,
    ),
}
