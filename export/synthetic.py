"""Models of real shape with random weights: to measure speed and to test everything but pictures.

`synthetic:sd15` is Stable Diffusion 1.5 tensor by tensor. The weights are the libraries' initial ones under a
fixed seed, the same bits in every process of one version of torch; no file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rt.errors import CheckpointError, nearest
from rt.export.architectures import ARCHITECTURES, PAD_TOKENS, Architecture
from rt.export.facts import FOLDERS
from rt.export.weights import build, build_empty
from rt.model import Component
from rt.tokenizer import Tokenizer

SEED = 0


@dataclass(frozen=True)
class Synthetic:
    """A random model; see `rt.export.source.Source`."""

    architecture: Architecture
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Path]
    revision: str | None = None
    licence: str | None = None

    def headers(self, component: Component) -> Mapping[str, Tensor]:
        """Shapes and dtypes of the component's tensors."""
        return build_empty(component, self.configs[FOLDERS[component]]).state_dict()

    def tensors(self, component: Component) -> Mapping[str, Tensor]:
        """The component's random weights, which do not depend on what was loaded before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return build(component, self.configs[FOLDERS[component]]).state_dict()

    def tokenizer(self, component: Component, max_length: int) -> Tokenizer:
        """A tokenizer of single bytes, without merges; start and end are the encoder's last two ids."""
        config = self.configs[FOLDERS[component]]
        encoders = (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2)
        bos, eos = "<|startoftext|>", "<|endoftext|>"
        return Tokenizer.build(
            {**byte_vocabulary(), bos: config["bos_token_id"], eos: config["eos_token_id"]},
            [],
            max_length=max_length,
            bos_token=bos,
            eos_token=eos,
            pad_token=PAD_TOKENS[self.architecture.family][encoders.index(component)],
        )


def open_synthetic(name: str) -> Synthetic:
    """The random model of the architecture `name`.

    Raises:
        CheckpointError: There is no such architecture.
    """
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"no synthetic:{name}{nearest(name, ARCHITECTURES)}; there are: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    return Synthetic(architecture, architecture.configs, {})


def byte_vocabulary() -> dict[str, int]:
    """CLIP's first 512 entries: each byte inside a word, then each byte at the end of one.

    Bytes that print stand for themselves and come first; the others are U+0100 and on, as in GPT-2.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    symbols = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    return {symbol: i for i, symbol in enumerate(symbols + [symbol + "</w>" for symbol in symbols])}
