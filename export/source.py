"""Where a checkpoint comes from, and what every kind of source provides."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rt.errors import CheckpointError
from rt.export.weights import PICKLE_SUFFIXES, pickle_error
from rt.model import Component
from rt.tokenizer import Tokenizer

SYNTHETIC = "synthetic:"


class Kind(str, Enum):
    """Where a checkpoint comes from."""

    FOLDER = "folder"
    HUB = "hub"
    SINGLE_FILE = "single_file"
    SYNTHETIC = "synthetic"

    @classmethod
    def of(cls, model: str) -> Kind:
        """By what the user typed.

        Raises:
            CheckpointError: It is nothing that there is.
            PickleError: It is a file in a format that can run code.
        """
        # Those of `os.path`, which also answer where a name is too long for a file.
        suffix, is_folder = Path(model).suffix, os.path.isdir(model)
        if model.startswith(SYNTHETIC):
            return cls.SYNTHETIC
        if suffix in PICKLE_SUFFIXES and not is_folder:
            raise pickle_error(model)
        if is_folder:
            return cls.FOLDER
        if suffix == ".safetensors" and os.path.isfile(model):
            return cls.SINGLE_FILE
        if os.path.exists(model):
            raise CheckpointError(
                f"{model} is not a model: expected a diffusers folder or a .safetensors file"
            )
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and suffix != ".safetensors":
            return cls.HUB
        raise CheckpointError(
            f"{model} does not exist: expected a diffusers folder, a .safetensors file, a hub id like org/name "
            f"or {SYNTHETIC}NAME"
        )


class Source(Protocol):
    """What each kind of checkpoint provides; configs are keyed by diffusers' folder names."""

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Of each component, `model_index` and `scheduler`."""

    @property
    def files(self) -> Mapping[str, Path]:
        """Every file that shapes the result."""

    @property
    def revision(self) -> str | None:
        """The commit hash on the hub."""

    @property
    def licence(self) -> str | None:
        """Of the weights."""

    def headers(self, component: Component) -> Mapping[str, Tensor]:
        """What `tensors` would give, on the meta device: names and shapes, no memory."""

    def tensors(self, component: Component) -> Mapping[str, Tensor]:
        """The component's weights under diffusers' or transformers' names, in the stored dtype."""

    def tokenizer(self, component: Component, max_length: int) -> Tokenizer:
        """Of a text encoder that reads `max_length` tokens."""
