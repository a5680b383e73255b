"""Options that several commands have."""

from __future__ import annotations

import click

from rt.backends import AUTO, BACKENDS

backend_option = click.option(
    "--backend",
    type=click.Choice([AUTO, *BACKENDS]),
    default=AUTO,
    show_default=True,
    metavar="NAME",
    help=f"An engine: {', '.join(BACKENDS)}.",
)
