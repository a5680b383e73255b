"""`rt inspect`: what a bundle is, without loading an engine."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import click

from rt.bundle import MANIFEST, Bundle, Manifest
from rt.cli.streams import hand_out, show
from rt.config import DType

_KEPT = {dtype: "in fp32" for dtype in DType} | {DType.INT8: "not in int8", DType.FP8: "not in fp8"}


@click.command(short_help="Say what a bundle is.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def command(bundle: Path, as_json: bool) -> None:
    """Describe BUNDLE from its manifest; no engine is loaded."""
    opened = Bundle.open(bundle)
    if as_json:
        hand_out(*json.dumps(json.loads((bundle / MANIFEST).read_bytes()), indent=1).splitlines())
    else:
        show(*_describe(opened.manifest))


def _describe(manifest: Manifest) -> list[str]:
    source, model, config = manifest.source, manifest.model, manifest.config
    size = sum(record.size_bytes for record in manifest.files.values())
    revision = f" at {source.revision}" if source.revision else ""
    lines = [
        f"model      {source.name} ({source.kind}{revision}), {model.family.value}, hash {source.model_hash}",
        *(f"LoRA       {lora.name}, scale {lora.scale:g}" for lora in source.loras),
        f"licence    {source.licence or 'not stated'}",
        f"sampler    {model.scheduler.get('_class_name')}, {model.scheduler.get('prediction_type', 'epsilon')}",
        f"built      {manifest.created}, {config.dtype.value} for {config.backend}, {_mib(size)}",
        f"sizes      {', '.join(str(profile) for profile in config.profiles)} (pictures x height x width)",
        f"tokens     {model.max_tokens}",
        *(["steps      full and shallow (rt run --step-cache)"] if config.step_cache else []),
        f"forms      {', '.join(dict.fromkeys(form for engine in manifest.engines for form in engine.forms))}",
        "engines",
    ]
    width = max(len(engine.name) for engine in manifest.engines)
    for engine in manifest.engines:
        lines += textwrap.wrap(
            engine.accuracy,
            80,
            initial_indent=f"  {engine.name:<{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )
        lines += [f"  {'':<{width}}  {_KEPT[engine.dtype]}: {island}" for island in engine.islands]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines += textwrap.wrap(versions, 80, initial_indent="with       ", subsequent_indent=" " * 11)
    return lines


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
