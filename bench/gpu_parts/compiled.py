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


class Compiled(Eager):
    """U-Net and decoder by max-autotune; text encoders by reduce-overhead, which compiles in a tenth of the time.

    A dry run only traces: no code is generated.
    """

    name = "torch.compile"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        inductor.compile_threads = os.cpu_count() or 1
        # 1 x 1 convolutions are then products, which have more kernels to choose from.
        inductor.conv_1x1_as_mm = True
        if model.place.dry:
            most = least = {"backend": "eager"}
        else:
            most, least = {"mode": "max-autotune"}, {"mode": "reduce-overhead"}
        unet, vae = self.pipeline.unet, self.pipeline.vae
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False, **most)
        vae.decoder.forward = torch.compile(vae.decoder.forward, fullgraph=True, dynamic=False, **most)
        for encoder in self._text:
            encoder.forward = torch.compile(encoder.forward, dynamic=False, **least)

    def _before(self) -> None:
        """What a graph gave the last time may be overwritten now."""
        torch.compiler.cudagraph_mark_step_begin()
