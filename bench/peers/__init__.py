"""The same weights under other people's programs, and under ours, timed in turn."""
