"""A checkpoint in diffusers' folder layout: `model_index.json` and one folder a component."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rt.checkpoint_file import read_json
from rt.errors import CheckpointError
from rt.export.facts import FOLDERS, OR_VAE, VAE, components
from rt.export.weights import PICKLE_SUFFIXES, pickle_error, read_headers, read_tensors
from rt.model import Component
from rt.tokenizer import Tokenizer, from_folder

logger = logging.getLogger(__name__)

TOKENIZERS = {Component.TEXT_ENCODER: "tokenizer", Component.TEXT_ENCODER_2: "tokenizer_2"}
_TEXTS = (".json", ".txt")
_FRONT_MATTER = 1 << 16
"""Bytes of a README in which its front matter must end."""


@dataclass(frozen=True)
class Folder:
    """An opened diffusers folder; see `rt.export.source.Source`."""

    root: Path
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Path]
    weights: Mapping[str, tuple[Path, ...]]
    licence: str | None
    revision: str | None = None

    def headers(self, component: Component) -> dict[str, Tensor]:
        """Shapes and dtypes of the component's tensors, from the headers of its files."""
        return read_headers(self.weights[FOLDERS[component]])

    def tensors(self, component: Component) -> dict[str, Tensor]:
        """The component's tensors, memory-mapped."""
        return read_tensors(self.weights[FOLDERS[component]])

    def tokenizer(self, component: Component, max_length: int) -> Tokenizer:
        """The tokenizer beside the component."""
        return from_folder(self.root / TOKENIZERS[component], max_length)


def open_folder(root: Path, variant: str | None, elsewhere: Collection[str] = ()) -> Folder:
    """Read all configs under `root` and find the weights.

    Components whose folders are in `elsewhere` come from elsewhere: here they may be missing.

    Raises:
        CheckpointError: A file is missing or damaged, or the folder brings its own code.
        PickleError: A component has no weights but pickles.
    """
    names = {str(path.relative_to(root)) for pattern in ("*", "*/*") for path in root.glob(pattern)}
    refuse_code(names, str(root))
    if "model_index.json" not in names:
        raise _no_model(root, names)
    configs: dict[str, Mapping[str, Any]] = {"model_index": read_json(root / "model_index.json")}
    parts = components(configs, str(root), elsewhere)
    folders = dict.fromkeys(FOLDERS[component] for component in parts)
    there = [folder for folder in folders if folder not in elsewhere or f"{folder}/config.json" in names]
    if VAE in there and f"{VAE}/config.json" not in names:
        raise _no_weights(root, VAE, names)
    configs |= {folder: _text_config(read_json(root / folder / "config.json")) for folder in there}
    configs["scheduler"] = read_json(root / "scheduler" / "scheduler_config.json")
    if automatic := [folder for folder, config in configs.items() if "auto_map" in config]:
        raise CheckpointError(
            f"{root / automatic[0]} has an `auto_map`, which runs code of the checkpoint's own: refused"
        )

    chosen = choose_weights(root, [folder for folder in folders if folder not in elsewhere], names, variant)
    for folder, component in chosen.items() if variant else ():
        if component.variant != variant:
            logger.warning("%s has no variant %r: its plain weights are taken", root / folder, variant)
    weights = {folder: component.files() for folder, component in chosen.items()}
    tokenizers = [root / TOKENIZERS[part] for part in parts if part in TOKENIZERS]
    shaping = [
        root / "model_index.json",
        root / "scheduler" / "scheduler_config.json",
        *(root / folder / "config.json" for folder in there),
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


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a component; of a text encoder that was saved with all of CLIP, what transformers takes of that."""
    text = config.get("text_config")
    return text if config.get("model_type") == "clip" and isinstance(text, dict) else config


@dataclass(frozen=True)
class Weights:
    """Of one component: a file, or the index of shards, and whose variant it is; None for the plain one."""

    path: Path
    variant: str | None

    def files(self) -> tuple[Path, ...]:
        """All that have tensors; the index must be there by then."""
        return _shards(self.path) if self.path.suffix == ".json" else (self.path,)


def choose_weights(
    root: Path, folders: Collection[str], names: Collection[str], variant: str | None
) -> dict[str, Weights]:
    """The weights in each of `folders`: of the variant asked for, else the plain ones.

    As in diffusers, some component must have the variant. Where none is asked for, the only weights there are will do.

    Args:
        root: Where the checkpoint's JSON files are; the weights themselves need not be there yet.
        folders: Of the components; "" for the root.
        names: Of all files of the checkpoint, relative to its root.
        variant: E.g. `fp16` for `diffusion_pytorch_model.fp16.safetensors`.

    Raises:
        CheckpointError: A component has no such weights, or none has the variant.
        PickleError: A component has no weights but pickles.
    """
    there = {folder: _variants(root, folder, names) for folder in folders}
    if variant is not None and not any(variant in variants for variants in there.values()):
        found = dict.fromkeys(_called(name) for variants in there.values() for name in variants)
        raise CheckpointError(
            f"{root} has no variant {variant!r}; --variant can be one of: {', '.join(found)}"
        )
    chosen = {}
    for folder, variants in there.items():
        wanted = variant if variant in variants else None
        if variant is None and len(variants) == 1:
            [wanted] = variants
        if wanted not in variants:
            asked = f"neither the variant {variant!r} nor plain weights" if variant else "no plain weights"
            others = ", ".join(map(_called, variants))
            raise CheckpointError(f"{root / folder} has {asked}; --variant can be one of: {others}")
        chosen[folder] = Weights(root / variants[wanted], wanted)
    return chosen


def _variants(root: Path, folder: str, names: Collection[str]) -> dict[str | None, str]:
    """Every variant in `folder` with its file, or the index of its shards."""
    stem = "model" if folder.startswith("text_encoder") else "diffusion_pytorch_model"
    stem = f"{folder}/{stem}" if folder else stem
    single = re.compile(rf"{stem}(?:\.((?!.*-of-)[^.]+))?\.safetensors")
    sharded = re.compile(rf"{stem}\.safetensors\.index(?:\.([^.]+))?\.json")
    variants: dict[str | None, str] = {
        match[1]: name
        for name in sorted(names)
        if (match := single.fullmatch(name) or sharded.fullmatch(name))
    }
    if not variants:
        raise _no_weights(root, folder, names)
    return variants


def _called(variant: str | None) -> str:
    return variant or "the plain one"


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
    inside = sorted(name for name in names if name.rpartition("/")[0] == folder)
    if pickles := [name for name in inside if name.endswith(PICKLE_SUFFIXES)]:
        return pickle_error(root / pickles[0])
    if partial := [*root.rglob("*.incomplete"), *(root / "../../blobs").glob("*.incomplete")]:
        return CheckpointError(
            f"{root / folder} has no weights: the download was interrupted ({partial[0].name}), run it again"
        )
    return CheckpointError(
        f"{root / folder} has no .safetensors weights: the checkpoint is incomplete, get it again"
        f"{OR_VAE * (folder == VAE)}"
    )
