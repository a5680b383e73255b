"""Compile for a GPU on a machine that has none, to see that it links and to count what it launches."""
