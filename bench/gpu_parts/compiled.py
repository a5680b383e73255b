"""diffusers with its networks under `torch.compile`: max-autotune, which measures kernels and replays CUDA graphs.

https://huggingface.co/docs/diffusers/optimization/fp16#torchcompile,
https://docs.pytorch.org/docs/stable/generated/torch.compile.html
"""

from __future__ import annotations

import os

import torch
import torch._inductor.config as inductor

from rt.bench.gpu_parts.eager import Eager
from rt.bench.gpu_parts.model import Model
from rt.bench.gpu_parts.settings import COMPILED


class Compiled(Eager):
    """U-Net and decoder by max-autotune; text encoders by reduce-overhead, which compiles in a tenth of the time.

    A dry run traces the U-Net and generates no code.

    Args:
        model: What to load.
        mode: Of U-Net and decoder.
    """

    name = COMPILED

    def __init__(self, model: Model, mode: str = "max-autotune") -> None:
        super().__init__(model)
        inductor.compile_threads = os.cpu_count() or 1
        # 1 x 1 convolutions are then products, which have more kernels to choose from.
        inductor.conv_1x1_as_mm = True
        unet, decoder = self.pipeline.unet, self.pipeline.vae.decoder
        if model.place.dry:
            unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False, backend="eager")
            return
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False, mode=mode)
        decoder.forward = torch.compile(decoder.forward, fullgraph=True, dynamic=False, mode=mode)
        for encoder in self._text:
            encoder.forward = torch.compile(encoder.forward, dynamic=False, mode="reduce-overhead")

    def _before(self) -> None:
        """What a graph gave the last time may be overwritten now."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
