"""What `rt.device_session` is made of: buffers, step programs, kernels, graphs, runs and the decoder on a device."""

from rt.device_loop.buffers import Buffers
from rt.device_loop.decoder import Decoder
from rt.device_loop.graphs import StepGraphs
from rt.device_loop.kernels import LoopKernels
from rt.device_loop.run import Run

__all__ = ["Buffers", "Decoder", "LoopKernels", "Run", "StepGraphs"]
