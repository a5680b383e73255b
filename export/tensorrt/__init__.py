"""Graphs to TensorRT's plans, in both flavours."""
