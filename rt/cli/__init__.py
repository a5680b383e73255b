"""The command line: `rt build | run | inspect | verify | bench | doctor`, one file a verb."""

from __future__ import annotations

from rt.cli.main import main

__all__ = ["main"]
