"""Safetensors files into torch modules: headers are checked before a byte of weights is allocated.

The format is eight bytes of length, a JSON header and the tensors' bytes
(https://huggingface.co/docs/safetensors). Tensors are memory-mapped, so that reading a file of 16-bit weights
costs one float32 copy of them, and one of float32 weights costs none.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rt.checkpoint_file import LFS_POINTER, lfs_error
from rt.errors import CheckpointError, PickleError, shown
from rt.export.names import canonical, ignored, summary
from rt.export.one_line import one_line
from rt.json_file import parse_json
from rt.model import Component

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

LARGEST = 1 << 20
"""No number in a config is larger: far above every vocabulary and width, far below what would fill a memory."""
LONGEST = 1000
"""No list in a config has more entries."""
_MOST_TENSORS = 10_000
_MAX_HEADER_BYTES = 16 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_DIFFUSERS = {
    Component.UNET: UNet2DConditionModel,
    Component.VAE_ENCODER: AutoencoderKL,
    Component.VAE_DECODER: AutoencoderKL,
}

# What shapes a text encoder, of all that a config of transformers may hold.
_CLIP = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def pickle_error(path: Path | str) -> PickleError:
    """The refusal of a file, or of a folder that has nothing else, in a format that can run code."""
    return PickleError(
        f"{path} is a pickle, which can run any code when it is read; rt reads safetensors only: "
        "convert it on a machine you trust, e.g. diffusers' save_pretrained(..., safe_serialization=True)"
    )


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the meta device (shape and dtype, no memory) by name, and the file's metadata.

    Raises:
        CheckpointError: The file is missing or truncated, or its header is damaged, over 16 MiB or has a name
            twice.
    """
    if not path.is_file():
        problem = "is no plain file" if path.exists() else "is missing"
        raise CheckpointError(f"{path} {problem}: the checkpoint is incomplete, download it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise lfs_error(path)
        length = int.from_bytes(start[:8], "little")
        if size >= 8 and length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} is not safetensors: a header of {length:,} bytes, at most {_MAX_HEADER_BYTES:,}"
            )
        if size < 8 + length:
            raise _truncated(path, size, max(8 + length, 8))
        file.seek(8)
        text = file.read(length)
    try:
        header = parse_json(text, make_object=_unique)
        metadata = {key: str(value) for key, value in header.pop("__metadata__", {}).items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        tensors = {
            name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
            for name, entry in header.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} has a bad safetensors header ({one_line(error)}): download it again"
        ) from None
    if size < 8 + length + end:
        raise _truncated(path, size, 8 + length + end)
    return tensors, metadata


def read_headers(paths: Iterable[Path]) -> dict[str, Tensor]:
    """What `read_tensors` would give, on the meta device."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        shard, _ = read_header(path)
        if twice := [name for name in shard if name in tensors]:
            raise CheckpointError(
                f"{path}: {_first(twice)} in another shard, too; download the checkpoint again"
            )
        tensors |= shard
    return tensors


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of the files by name, memory-mapped, in the dtype that the files have."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({one_line(error)}): download it again") from None
    return tensors


def build(component: Component, config: Mapping[str, Any]) -> nn.Module:
    """The network that its library's `config` describes, with that library's random weights."""
    module: nn.Module
    if component in _DIFFUSERS:
        module = _DIFFUSERS[component].from_config(_options(_DIFFUSERS[component], config))
        return module
    encoder = CLIPTextModelWithProjection if component is Component.TEXT_ENCODER_2 else CLIPTextModel
    module = encoder(CLIPTextConfig(**{**_options(CLIPTextConfig, config, _CLIP), "dtype": "float32"}))
    return module


def build_empty(
    component: Component, config: Mapping[str, Any], weights: Collection[str] | None = None
) -> nn.Module:
    """The network that `config` describes, with its parameters on the meta device: shapes without memory.

    Args:
        component: Which.
        config: Of its library, by whomever.
        weights: Names of the tensors that are to fill it. Building stops where the network has far more, long before
            a million layers are made.

    Raises:
        CheckpointError: The config describes no network, or one of another size.
    """
    most = _MOST_TENSORS if weights is None else 2 * len(weights) + 1000
    try:
        with _TensorLimit(most), torch.device("meta"):
            module = build(component, config)
    except _TooManyTensorsError:
        raise CheckpointError(
            f"the config of {component.value} describes a network of more than {most:,} tensors"
            + (f", and the weights have {len(weights):,}" if weights is not None else "")
        ) from None
    except Exception as error:  # Whatever the constructor of another library makes of a bad value.
        raise CheckpointError(
            f"the config of {component.value} describes no network: {one_line(error)}"
        ) from error
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):  # CLIP's positions, and no other
            setattr(owner, name, torch.arange(buffer.shape[-1], dtype=buffer.dtype).expand(buffer.shape))
    return module


def _options(kind: type, config: Mapping[str, Any], names: Collection[str] | None = None) -> dict[str, Any]:
    """Of `config` what `kind` is made from: the rest, which can name code or a hub, never reaches a library.

    Raises:
        ValueError: A value that no network has.
    """
    names = inspect.signature(kind).parameters if names is None else names
    options = {name: value for name, value in config.items() if name in names}
    for name, value in options.items():
        _check_option(name, value)
    return options


def _check_option(name: str, value: object) -> None:
    if isinstance(value, list) and len(value) > LONGEST:
        raise ValueError(f"{name} has {len(value):,} entries, expected at most {LONGEST:,}")
    if isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} is {shown(value)}")
    if type(value) is int and not 0 <= value <= LARGEST:
        raise ValueError(f"{name} is {shown(value)}, expected 0 to {LARGEST:,}")
    for item in value if isinstance(value, list) else ():
        _check_option(name, item)


class _TooManyTensorsError(Exception):
    pass


class _TensorLimit(TorchFunctionMode):
    """Lets `most` tensors be made, on this thread and within its block; layers make theirs with `torch.empty`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.empty:
            self._left -= 1
            if self._left < 0:
                raise _TooManyTensorsError
        return function(*args, **(kwargs or {}))


def check(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `CheckpointError` unless `tensors` are the parameters of `module`, by name and shape.

    What `rt.export.names.ignored` names may be there as well.
    """
    passed_over = set(ignored(module, tensors))
    names = [name for name in tensors if name not in passed_over]
    expected = {canonical(name): tensor for name, tensor in module.state_dict().items()}
    found = {canonical(name): tensors[name] for name in names}
    shared = [name for name in expected if name in found]
    if missing := [name for name in expected if name not in found]:
        problem = f"{_first(missing)} missing"
    elif unexpected := [name for name in found if name not in expected]:
        problem = f"{_first(unexpected)} not part of a {type(module).__name__}"
    elif wrong := [name for name in shared if found[name].shape != expected[name].shape]:
        shapes = f"{list(found[wrong[0]].shape)}, the config says {list(expected[wrong[0]].shape)}"
        problem = f"{_first(wrong)} of another shape: {shapes}"
    elif integer := [name for name in shared if not found[name].is_floating_point()]:
        problem = f"{_first(integer)} quantised ({found[integer[0]].dtype})"
    elif twice := [name for name, times in Counter(map(canonical, names)).items() if times > 1]:
        problem = f"{_first(twice)} there under two names"
    else:
        return
    raise CheckpointError(f"{where}: {problem}; use the config and the plain weights of one model")


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """`module` with `tensors` as its float32 parameters, in eval mode and without gradients."""
    check(module, tensors, where)
    names = {canonical(name): name for name in module.state_dict()}
    state = {
        names[canonical(name)]: tensor.to(torch.float32)
        for name, tensor in tensors.items()
        if canonical(name) in names
    }
    module.requires_grad_(False).load_state_dict(state, assign=True)
    return module.eval()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is there twice")
    return unique


def _first(names: list[str]) -> str:
    return f"{summary(names)} {'are' if len(names) > 1 else 'is'}"


def _truncated(path: Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: {size:,} bytes of {expected:,}: download it again")
