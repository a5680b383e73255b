"""The model as a diffusers folder, which all peers read; `synthetic:NAME` is written as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from rt.bench.peers.once import make_once
from rt.export.checkpoint import Checkpoint, open_checkpoint
from rt.export.facts import FOLDERS
from rt.export.folder import TOKENIZERS
from rt.export.source import Kind
from rt.export.synthetic import byte_vocabulary
from rt.model import Component


def diffusers_folder(model: str, work: Path) -> Path:
    """`model` itself where it is a folder; for `synthetic:NAME` a folder in `work` with the weights that rt compiles.

    Raises:
        CheckpointError: There is no such model.
    """
    checkpoint = open_checkpoint(model)
    if checkpoint.kind is not Kind.SYNTHETIC:
        return Path(model)
    return make_once(work / "checkpoint", lambda folder: _save(checkpoint, folder))


def weights_gib(folder: Path) -> float:
    """Of the components together."""
    return sum(path.stat().st_size for path in folder.glob("*/*.safetensors")) / 2**30


def _save(checkpoint: Checkpoint, folder: Path) -> None:
    disable_progress_bar()
    for component in checkpoint.components:
        module: Any = checkpoint.load(component)
        module.save_pretrained(folder / FOLDERS[component])
    for encoder in checkpoint.spec.text_encoders:
        _save_tokenizer(checkpoint, encoder, folder / TOKENIZERS[encoder])
    _write(folder / "scheduler" / "scheduler_config.json", checkpoint.configs["scheduler"])
    _write(folder / "model_index.json", checkpoint.configs["model_index"])


def _save_tokenizer(checkpoint: Checkpoint, encoder: Component, folder: Path) -> None:
    config = checkpoint.configs[FOLDERS[encoder]]
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = byte_vocabulary()
    # Converters take the place in the list for the id, so that every id up to the last has a word.
    words |= {f"<|unused{i}|>": i for i in range(len(words), config["bos_token_id"])}
    words |= {start: config["bos_token_id"], end: config["eos_token_id"]}
    _write(folder / "vocab.json", words)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": checkpoint.spec.max_tokens, **special},
    )


def _write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, default=str) + "\n")
