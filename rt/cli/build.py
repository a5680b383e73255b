"""`rt build`: checkpoint to bundle."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import click

from rt.backends import arithmetic, choose_target, get
from rt.bundle import Bundle
from rt.cli.options import backend_option
from rt.cli.streams import hand_out, say
from rt.config import BuildConfig, DType
from rt.errors import ConfigError
from rt.extras import needs
from rt.shapes import ShapeProfile

logger = logging.getLogger(__name__)

_LIST = "N[,N...]"


def whole_numbers(text: str | tuple[int, ...]) -> tuple[int, ...]:
    """`1,2,4` as numbers; what is parsed already stays as it is."""
    try:
        return text if isinstance(text, tuple) else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a whole number or a list such as 1,2,4") from None


@click.command(short_help="Compile a model into a bundle.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--fp16", "dtypes", flag_value="fp16", multiple=True, help="Weights and arithmetic in float16.")
@click.option(
    "--bf16", "dtypes", flag_value="bf16", multiple=True, help="Weights and arithmetic in bfloat16."
)
@click.option(
    "--int8",
    "dtypes",
    flag_value="int8",
    multiple=True,
    help="U-Net in int8 with calibrated activations, the rest in bfloat16 where the processor has it.",
)
@click.option(
    "--fp8",
    "dtypes",
    flag_value="fp8",
    multiple=True,
    help="U-Net's linear layers in float8 (e4m3), calibrated, the rest in float16; for NVIDIA GPUs from Ada on.",
)
@click.option(
    "--dtype", type=click.Choice([d.value for d in DType]), help="The same, by name.  [default: fp32]"
)
@backend_option
@click.option(
    "--height", type=whole_numbers, metavar=_LIST, default=(), help="Pixels; several make profiles."
)
@click.option(
    "--width", type=whole_numbers, metavar=_LIST, default=(), help="Pixels; paired with the heights."
)
@click.option(
    "--batch-size", type=whole_numbers, metavar=_LIST, default=(), help="Pictures at once, such as 1,4."
)
@click.option("--step-cache", is_flag=True, help="Also the shallow steps for rt run --step-cache.")
@click.option("--refittable", is_flag=True, help="TensorRT: plans whose weights --refit can replace.")
@click.option("--portable", is_flag=True, help="TensorRT: plans for every GPU since Ampere.")
@click.option("--tune", is_flag=True, help="TensorRT: time our kernels against its own, keep the faster.")
@click.option("--max-autotune", is_flag=True, help="Inductor: time all ways to compute an operator.")
@click.option(
    "--refit",
    "donor",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="TensorRT: refit the plans of this --refittable bundle of the same model, such as with another --lora.",
)
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--variant", help="Weights variant, such as fp16.")
@click.option("--tokenizer", help="Folder or hub id of the vocabulary, for a single file.")
@click.option("--prediction-type", help="epsilon, v_prediction or sample, where a single file does not say.")
@click.option(
    "--vae", help="Another VAE: a folder, hub id or .safetensors file; for a single file without one."
)
@click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="Merge a LoRA; may be repeated.")
@click.option("--offline", is_flag=True, help="Use only what the hub cache holds.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    model: str,
    output: Path,
    dtypes: tuple[str, ...],
    dtype: str | None,
    backend: str,
    height: tuple[int, ...],
    width: tuple[int, ...],
    batch_size: tuple[int, ...],
    step_cache: bool,
    refittable: bool,
    portable: bool,
    tune: bool,
    max_autotune: bool,
    donor: Path | None,
    revision: str | None,
    variant: str | None,
    tokenizer: str | None,
    prediction_type: str | None,
    vae: str | None,
    loras: tuple[str, ...],
    offline: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Compile MODEL into a bundle and print its path.

    MODEL is a diffusers folder, a hub id, a .safetensors file in the original layout, or synthetic:sd15,
    synthetic:sd21, synthetic:sdxl, synthetic:tiny (the real shapes with random weights).
    """
    started = time.perf_counter()
    _check_sizes(height, width, batch_size)
    chosen = _dtype(dtypes, dtype)
    choose_target(backend, chosen)  # what is not there at all is said before a model is fetched
    with needs("build", "rt build"):
        from rt.export.build import build, default_profiles
        from rt.export.checkpoint import open_checkpoint
        from rt.export.lora import parse
        from rt.export.staging import check_free

    check_free(output, force=force)  # a hub model may be gigabytes to fetch
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        variant=variant,
        tokenizer=tokenizer,
        prediction_type=prediction_type,
        vae=vae,
        offline=offline,
        loras=[parse(lora) for lora in loras],
    )
    config = BuildConfig(
        profiles=default_profiles(checkpoint, height, width, batch_size),
        dtype=chosen,
        backend=backend,
        step_cache=step_cache,
        refittable=refittable,
        portable=portable,
        tune=tune,
        max_autotune=max_autotune,
    )
    opened = None if donor is None else Bundle.open(donor)
    bundle = build(checkpoint, output, config, donor=opened, force=force, quiet=quiet)
    _report(bundle, time.perf_counter() - started)
    hand_out(str(output))


def _check_sizes(height: tuple[int, ...], width: tuple[int, ...], batch_size: tuple[int, ...]) -> None:
    """Each by itself, before a model is fetched; how they pair up, once its own size is known."""
    for pixels in height:
        ShapeProfile(pixels, 1)
    for pixels in width:
        ShapeProfile(1, pixels)
    for pictures in batch_size:
        ShapeProfile(1, 1, pictures)


def _dtype(flags: tuple[str, ...], name: str | None) -> DType:
    asked = {*flags, *([name] if name else [])}
    if len(asked) > 1:
        raise ConfigError(
            f"{' and '.join(sorted(asked))} exclude each other; give one of --fp16, --bf16, --int8, --fp8, --dtype"
        )
    return DType(asked.pop()) if asked else DType.FP32


def _report(bundle: Bundle, seconds: float) -> None:
    for engine in bundle.manifest.engines:
        logger.info("%s: %s", engine.name, engine.accuracy)
        for record in engine.passes:
            logger.info("%s: %s", engine.name, record)
    size = sum(record.size_bytes for record in bundle.manifest.files.values()) / 2**20
    config = bundle.manifest.config
    floats = arithmetic(get(config.backend), config.dtype)
    how = f"{config.backend} computes {config.dtype.value} graphs in {floats}"
    say(f"built in {seconds:.0f} s, {size:.0f} MiB; {how}")
