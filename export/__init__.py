"""Checkpoint to bundle: load, trace, rewrite, lower, verify. The only place that imports torch."""
