"""What the programs of a bundle take and give, so that they fit the model, the loop and each other.

B pictures at once; R rows, 2B with guidance; T tokens of D channels, P of them pooled; K depths of a text
encoder; latents C x h x w of a picture of H x W pixels. `time_…` and `context_…` are what the U-Net makes of a timestep
and of a text.

    text_encoder, _2   tokens (1, T)                                 → states (K, T, D of it); _2: pooled (1, P)
    unet_time          timestep (N,); XL: pooled (N, P), sizes (N, 6) → time_… (N, …)
    unet_context       context (1, T, D)                             → context_… (1, …)
    unet               latents (B, C, h, w); inpainting: mask (B, 1, h, w), around (B, C, h, w);
                       time_… (B or R, …); context_… (R, …)          → prediction (R, C, h, w); may keep deep (R, …)
    unet_shallow       the same and deep (R, …), not all of time and context → prediction (R, C, h, w)
    vae_encoder        image (1, H, W, 3)                            → mean, std (1, C, h, w)
    vae_decoder        latents (1, C, h, w)                          → image (1, H, W, 3)

Tokens are int64 and all else float32, but for what unet_context gives in float16 and steps take so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from rt.errors import shown
from rt.model import Component, ModelSpec
from rt.shapes import ShapeProfile, TensorSpec

Shapes = Mapping[str, tuple[int | None, ...]]
"""Name to shape, None where any size will do."""

_STEPS = (Component.UNET, Component.UNET_SHALLOW)
_WIDE = ("float32",)
_FLOATS = ("float32", "float16")
_AT_A_SIZE = (*_STEPS, Component.VAE_ENCODER, Component.VAE_DECODER)
_TEXT = (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2)
_POSITIVE = (
    "latent_channels",
    "vae_scale_factor",
    "sample_size",
    "max_tokens",
    "context_size",
    "scaling_factor",
)


class Program(Protocol):
    """What is checked of a compiled program, see `rt.bundle.EngineRecord`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def component(self) -> Component: ...  # noqa: D102
    @property
    def profile(self) -> ShapeProfile | None: ...  # noqa: D102
    @property
    def guided(self) -> bool: ...  # noqa: D102
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...  # noqa: D102
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...  # noqa: D102


def check(spec: ModelSpec, programs: Iterable[Program]) -> None:
    """Compare `programs` with the table above.

    Raises:
        ValueError: With the first number of the model, program or tensor that does not fit.
    """
    _check_model(spec)
    programs = list(programs)
    _check_once("name", [program.name for program in programs])
    _check_once(
        "purpose", [str((p.component.value, p.profile and str(p.profile), p.guided)) for p in programs]
    )
    if not any(program.component is Component.UNET for program in programs):
        raise ValueError("there is no program of the unet")
    features = {
        tensor.name: tensor.shape
        for program in programs
        if program.component in (Component.UNET_TIME, Component.UNET_CONTEXT)
        for tensor in program.outputs
    }
    handed = {
        tensor.name: (tensor.dtype,)
        for program in programs
        if program.component is Component.UNET_CONTEXT
        for tensor in program.outputs
    }
    for program in programs:
        if (program.profile is not None) is not (program.component in _AT_A_SIZE):
            raise ValueError(f"program {shown(program.name)} has the shape {program.profile}")
        takes, gives = _tensors(program, spec, features)
        given = _FLOATS if program.component is Component.UNET_CONTEXT else _WIDE
        taken = {
            "tokens": ("int64",),
            **(handed if program.component in _STEPS else {}),
        }
        _check_tensors(f"{shown(program.name)}: input", program.inputs, takes, taken, _WIDE)
        _check_tensors(f"{shown(program.name)}: output", program.outputs, gives, {}, given)
    states = [
        tensor.shape[-1]
        for p in programs
        if p.component in _TEXT
        for tensor in p.outputs
        if tensor.name == "states"
    ]
    if len(states) == len(spec.text_encoders) and sum(states) != spec.context_size:
        raise ValueError(
            f"context_size is {spec.context_size}, and the text encoders give {sum(states)} channels"
        )


def _tensors(program: Program, spec: ModelSpec, features: Shapes) -> tuple[Shapes, Shapes]:
    """What a program must take and give."""
    match program.component:
        case Component.TEXT_ENCODER | Component.TEXT_ENCODER_2:
            pooled: Shapes = {"pooled": (1, spec.pooled_size)} if program.component is _TEXT[1] else {}
            return {"tokens": (1, spec.max_tokens)}, {"states": (None, spec.max_tokens, None), **pooled}
        case Component.UNET_TIME:
            rows = next(
                (tensor.shape[0] for tensor in program.inputs if tensor.name == "timestep" and tensor.shape),
                0,
            )
            added: Shapes = (
                {} if spec.pooled_size is None else {"pooled": (rows, spec.pooled_size), "sizes": (rows, 6)}
            )
            return {"timestep": (rows,), **added}, _features(program.outputs, "time_", rows)
        case Component.UNET_CONTEXT:
            return {"context": (1, spec.max_tokens, spec.context_size)}, _features(
                program.outputs, "context_", 1
            )
    assert program.profile is not None
    height, width, pictures = program.profile.height, program.profile.width, program.profile.batch_size
    shape = spec.latent_shape(height, width)
    match program.component:
        case Component.VAE_ENCODER:
            return {"image": (1, height, width, 3)}, {"mean": (1, *shape), "std": (1, *shape)}
        case Component.VAE_DECODER:
            return {"latents": (1, *shape)}, {"image": (1, height, width, 3)}
    rows = 2 * pictures if program.guided else pictures
    around: Shapes = (
        {"mask": (pictures, 1, *shape[1:]), "around": (pictures, *shape)} if spec.inpainting else {}
    )
    deep: Shapes = {"deep": (rows, None, None, None)}
    kept = deep if any(tensor.name == "deep" for tensor in program.outputs) else {}
    taken = deep if program.component is Component.UNET_SHALLOW else {}
    steered = {}
    for tensor in program.inputs:
        if tensor.name in features:
            per_picture = tensor.name.startswith("time_") and tensor.shape[:1] == (pictures,)
            steered[tensor.name] = (pictures if per_picture else rows, *features[tensor.name][1:])
    return {"latents": (pictures, *shape), **around, **steered, **taken}, {
        "prediction": (rows, *shape),
        **kept,
    }


def _features(tensors: Iterable[TensorSpec], prefix: str, rows: int) -> Shapes:
    """Those that there are, which only the network knows."""
    return {t.name: (rows, *t.shape[1:]) for t in tensors if t.name.startswith(prefix)}


def _check_model(spec: ModelSpec) -> None:
    for name in _POSITIVE:
        value = getattr(spec, name)
        if min(value if isinstance(value, list) else [value], default=0) <= 0:
            raise ValueError(f"{name} is {value}, expected more than 0")
    if isinstance(spec.sample_size, list) and len(spec.sample_size) != 2:
        raise ValueError(f"sample_size is {shown(spec.sample_size)}, expected a side or a height and a width")
    encoders = spec.text_encoders
    if not encoders or len(set(encoders)) < len(encoders) or not set(encoders) <= set(_TEXT):
        raise ValueError(f"the text encoders are {[encoder.value for encoder in encoders]}")
    if (spec.pooled_size is not None) is not (_TEXT[1] in encoders):
        raise ValueError(
            f"pooled_size is {spec.pooled_size}, and a second text encoder gives the pooled text"
        )


def _check_once(what: str, values: list[str]) -> None:
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise ValueError(f"two have the {what} {shown(twice[0])}")


def _check_tensors(
    what: str,
    tensors: tuple[TensorSpec, ...],
    wanted: Shapes,
    formats: Mapping[str, tuple[str, ...]],
    usual: tuple[str, ...],
) -> None:
    _check_once(what, [tensor.name for tensor in tensors])
    found = {tensor.name: tensor for tensor in tensors}
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{what} {missing[0]} is missing")
    if unknown := [name for name in found if name not in wanted]:
        raise ValueError(f"{what} {shown(unknown[0])} is not known")
    for name, shape in wanted.items():
        tensor, allowed = found[name], formats.get(name, usual)
        sizes = [have if want is None else want for want, have in zip(shape, tensor.shape, strict=False)]
        if len(tensor.shape) != len(shape) or [*tensor.shape] != sizes or min(sizes, default=0) < 1:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{what} {name} is {shown([*tensor.shape])}, expected [{expected}]")
        if tensor.dtype not in allowed:
            raise ValueError(f"{what} {name} is {shown(tensor.dtype)}, expected {' or '.join(allowed)}")
