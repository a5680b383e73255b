"""`rt verify`: every byte and every engine of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rt.backends import choose
from rt.bundle import Bundle
from rt.cli.options import backend_option
from rt.cli.streams import hand_out, show
from rt.progress import progress
from rt.verify import verify


@click.command(short_help="Check a bundle's files and numbers.")
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_option
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(bundle: Path, backend: str, as_json: bool, quiet: bool) -> None:
    """Hash every file of BUNDLE, then run each engine on the inputs of the build and compare with torch's outputs."""
    opened = Bundle.open(bundle)
    config = opened.manifest.config
    engine, why = choose(backend, config.dtype, preferred=config.backend, unfit=opened.manifest.unfit)
    errors = {}
    with progress("verify", total=len(opened.manifest.engines), quiet=quiet) as bar:
        for record, distances in verify(opened, engine):
            errors[record.name] = distances
            bar.advance()
    if as_json:
        hand_out(*json.dumps({"backend": engine.name, "relative_l2": errors}, indent=1).splitlines())
        return
    for name, distances in errors.items():
        show(f"ok  {name}  {max(distances.values()):.1e} from torch")
    show(f"ok  {len(opened.manifest.files)} files; {why}")
