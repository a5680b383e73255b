"""Timing, reports and plots. Every published number has its JSON in `bench/results/`."""
