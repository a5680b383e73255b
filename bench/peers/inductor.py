"""diffusers with each part under `torch.compile`: bf16, channels last, weights frozen into the code.

https://huggingface.co/docs/diffusers/optimization/fp16#torchcompile,
https://docs.pytorch.org/docs/stable/torch.compiler_inductor_profiling.html for `freezing`
"""

from __future__ import annotations

import torch
import torch._inductor.config as inductor

from rt.bench.peers import eager
from rt.bench.peers.peer import Setting


def load(setting: Setting) -> eager.Eager:
    """Options as for `eager`. What is compiled is compiled by the first call."""
    inductor.freezing = True
    peer = eager.load(setting)
    parts = peer.pipeline
    parts.text_encoder.forward = torch.compile(parts.text_encoder.forward)
    parts.unet.forward = torch.compile(parts.unet.forward)
    parts.vae.decoder.forward = torch.compile(parts.vae.decoder.forward)
    return peer
