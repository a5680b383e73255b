"""A checkpoint in diffusers' folder layout: `model_index.json` and one folder a component."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rt.errors import CheckpointError
from rt.export.facts import FOLDERS, components
from rt.export.weights import PICKLE_SUFFIXES, pickle_error, read_headers, read_json, read_tensors
from rt.model import Component
from rt.tokenizer import Tokenizer, from_folder

TOKENIZERS = {Component.TEXT_ENCODER: "tokenizer", Component.TEXT_ENCODER_2: "tokenizer_2"}
_TEXTS = (".json", ".txt")
_FRONT_MATTER = 1 << 16
"""Bytes of a README in which its front matter must end."""


@dataclass(frozen=True)
class Folder:
    """An opened diffusers folder; see `rt.export.checkpoint.Source`."""

    root: Path
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Path]
    weights: Mapping[Component, tuple[Path, ...]]
    licence: str | None
    revision: str | None = None

    def headers(self, component: Component) -> dict[str, Tensor]:
        """Shapes and dtypes of the component's tensors, from the headers of its files."""
        return read_headers(self.weights[component])

    def tensors(self, component: Component) -> dict[str, Tensor]:
        """The component's tensors, memory-mapped."""
        return read_tensors(self.weights[component])

    def tokenizer(self, component: Component, max_length: int) -> Tokenizer:
        """The tokenizer beside the component."""
        return from_folder(self.root / TOKENIZERS[component], max_length)


def open_folder(root: Path, variant: str | None) -> Folder:
    """Read all configs under `root` and find the weights.

    Raises:
        CheckpointError: A file is missing or damaged, or the folder brings its own code.
        PickleError: A component has no weights but pickles.
    """
    names = {str(path.relative_to(root)) for pattern in ("*", "*/*") for path in root.glob(pattern)}
    refuse_code(names, str(root))
    if "model_index.json" not in names:
        raise _no_model(root, names)
    configs = {"model_index": read_json(root / "model_index.json")}
    parts = components(configs, str(root))
    folders = [FOLDERS[component] for component in parts]
    configs |= {folder: read_json(root / folder / "config.json") for folder in folders}
    configs["scheduler"] = read_json(root / "scheduler" / "scheduler_config.json")
    if automatic := [folder for folder, config in configs.items() if "auto_map" in config]:
        raise CheckpointError(
            f"{root / automatic[0]} has an `auto_map`, which runs code of the checkpoint's own: refused"
        )

    weights = {component: weight_files(root, FOLDERS[component], names, variant) for component in parts}
    tokenizers = [root / TOKENIZERS[part] for part in parts if part in TOKENIZERS]
    shaping = [
        root / "model_index.json",
        root / "scheduler" / "scheduler_config.json",
        *(root / folder / "config.json" for folder in folders),
        *(path for paths in weights.values() for path in paths),
        *(
            path
            for folder in tokenizers
            for path in folder.glob("*.*")
            if path.suffix in _TEXTS and path.is_file()
        ),
    ]
    files = {path.relative_to(root).as_posix(): path for path in sorted(shaping)}
    return Folder(root, configs, files, weights, read_licence(root))


def weight_files(root: Path, folder: str, names: Collection[str], variant: str | None) -> tuple[Path, ...]:
    """The weights in `folder`, one file or shards: the variant asked for, else the plain, else the only one.

    Args:
        root: Where the checkpoint's JSON files are; the weights themselves need not be there yet.
        folder: Of the component.
        names: Of all files of the checkpoint, relative to its root.
        variant: E.g. `fp16` for `diffusion_pytorch_model.fp16.safetensors`.
    """
    stem = "model" if folder.startswith("text_encoder") else "diffusion_pytorch_model"
    single = re.compile(rf"{folder}/{stem}(?:\.((?!.*-of-)[^.]+))?\.safetensors")
    sharded = re.compile(rf"{folder}/{stem}\.safetensors\.index(?:\.([^.]+))?\.json")
    variants = {
        match[1]: name
        for name in sorted(names)
        if (match := single.fullmatch(name) or sharded.fullmatch(name))
    }
    if not variants:
        raise _no_weights(root, folder, names)
    wanted = next(iter(variants)) if len(variants) == 1 and variant is None else variant
    if wanted not in variants:
        there = ", ".join(name or "the plain one" for name in variants)
        asked = f"no variant {variant!r}" if variant else "no plain weights"
        raise CheckpointError(f"{root / folder} has {asked}; --variant can be one of: {there}")
    path = root / variants[wanted]
    return _shards(path) if path.suffix == ".json" else (path,)


def refuse_code(names: Collection[str], where: str) -> None:
    """Raise `CheckpointError` when a checkpoint has Python files where a loader would run them.

    That is at the root and beside a config; a folder without any, such as one of training scripts, is no component.
    """
    configured = {"", *(name.rpartition("/")[0] for name in names if name.endswith(".json"))}
    if code := sorted(
        name for name in names if name.endswith(".py") and name.rpartition("/")[0] in configured
    ):
        raise CheckpointError(
            f"{where} has code of its own ({code[0]}), which rt never runs: use a model without"
        )


def read_licence(root: Path) -> str | None:
    """`license:` in the front matter of the README, else the name of a licence file, else None."""
    readme = root / "README.md"
    if readme.is_file():
        with readme.open("rb") as file:
            text = file.read(_FRONT_MATTER).decode("utf-8", errors="replace")
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        if front and (line := re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE)):
            return line[1].strip("\"'")
    return next((path.name for path in sorted(root.glob("LICEN[CS]E*"))), None)


def _shards(index: Path) -> tuple[Path, ...]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} has no `weight_map` of tensor to file: download it again")
    if outside := [name for name in shards.values() if Path(name).name != name]:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file beside it: refused")
    return tuple(index.parent / name for name in sorted(set(shards.values())))


def _no_model(root: Path, names: Collection[str]) -> CheckpointError:
    files = sorted(name for name in names if "/" not in name)
    if single := [name for name in files if name.endswith(".safetensors")]:
        return CheckpointError(
            f"{root} is not a diffusers folder; for its single-file model say {root / single[0]}"
        )
    if pickles := [name for name in files if name.endswith(PICKLE_SUFFIXES)]:
        return pickle_error(root / pickles[0])
    return CheckpointError(
        f"{root} has no model_index.json: expected a folder that diffusers' save_pretrained wrote"
    )


def _no_weights(root: Path, folder: str, names: Collection[str]) -> CheckpointError:
    inside = sorted(name for name in names if name.startswith(f"{folder}/"))
    if pickles := [name for name in inside if name.endswith(PICKLE_SUFFIXES)]:
        return pickle_error(root / pickles[0])
    if partial := [*root.rglob("*.incomplete"), *(root / "../../blobs").glob("*.incomplete")]:
        return CheckpointError(
            f"{root / folder} has no weights: the download was interrupted ({partial[0].name}), run it again"
        )
    return CheckpointError(
        f"{root / folder} has no .safetensors weights: the checkpoint is incomplete, get it again"
    )
