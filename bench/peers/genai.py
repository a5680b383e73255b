"""`openvino_genai.Text2ImagePipeline` with static shapes, from a folder like those that optimum-intel exports.

https://openvinotoolkit.github.io/openvino.genai/docs/use-cases/image-generation. The library hides its U-Net,
whose time is that of its own counter, taken while it draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from diffusers import DDIMScheduler

from rt.bench.peers.inputs import picture_size
from rt.bench.peers.once import make_once
from rt.bench.peers.onnx_graphs import PARTS, example_inputs, open_pipeline
from rt.bench.peers.peer import (
    GUIDANCE_SCALE,
    PICTURE,
    STEP,
    UNET,
    VAE,
    Float32,
    Inputs,
    Outcome,
    Setting,
    timed,
)

_US = 1e-6


class Genai:
    """A pipeline that was reshaped and compiled."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def vae(self, inputs: Inputs) -> Outcome:
        """See `Peer`; the image comes in bytes."""
        latents = openvino.Tensor(inputs.latents)
        _, seconds = timed(VAE, lambda: self._pipeline.decode(latents))
        return Outcome(output=None, seconds=seconds)

    def picture(self, inputs: Inputs) -> Outcome:
        """See `Peer`; with the library's own times of its U-Net."""
        tensor, seconds = timed(
            PICTURE,
            lambda: self._pipeline.generate(
                inputs.prompt,
                num_inference_steps=inputs.steps,
                guidance_scale=GUIDANCE_SCALE,
                generator=_given(inputs.noise),
            ),
        )
        metrics = self._pipeline.get_performance_metrics()
        inside = {
            UNET: float(np.median(metrics.raw_metrics.unet_inference_durations)) * _US,
            STEP: float(np.mean(metrics.raw_metrics.iteration_durations)) * _US,
        }
        return Outcome(output=tensor.data[0].astype(np.float32) / 255, seconds={**seconds, **inside})


def _given(noise: Float32) -> Any:
    """A generator that gives this noise, where the library would draw it."""
    import openvino_genai

    class Given(openvino_genai.Generator):  # type: ignore[misc]  # the package is not typed
        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(noise.reshape(list(shape)))

    return Given()


def prepare(setting: Setting) -> None:
    """Convert the model."""
    _folder(setting)


def load(setting: Setting) -> Genai:
    """Options: `precision` as OpenVINO names it."""
    import openvino_genai

    pipeline = openvino_genai.Text2ImagePipeline(_folder(setting))
    side = picture_size(setting.checkpoint)
    pipeline.reshape(1, side, side, GUIDANCE_SCALE)
    pipeline.compile(
        "CPU",
        PERFORMANCE_HINT="LATENCY",
        INFERENCE_PRECISION_HINT=setting.options["precision"],
        INFERENCE_NUM_THREADS=setting.threads,
    )
    return Genai(pipeline)


def _folder(setting: Setting) -> Path:
    """OpenVINO's layout of a diffusers folder: a model a part with dynamic shapes and fp16 weights."""
    import openvino_tokenizers

    def write(folder: Path) -> None:
        pipeline = open_pipeline(setting.checkpoint)
        configs = {
            "text_encoder": pipeline.text_encoder.config.save_pretrained,
            "unet": pipeline.unet.save_config,
            "vae_decoder": pipeline.vae.save_config,
        }
        for name, inputs in example_inputs(pipeline).items():
            with torch.no_grad():
                model = openvino.convert_model(PARTS[name](pipeline).eval(), example_input=inputs)
            for tensor, key in zip(model.inputs, inputs, strict=True):
                tensor.get_tensor().set_names({key})
            openvino.save_model(model, folder / name / "openvino_model.xml", compress_to_fp16=True)
            configs[name](folder / name)
        tokenizer = openvino_tokenizers.convert_tokenizer(pipeline.tokenizer)
        openvino.save_model(tokenizer, folder / "tokenizer" / "openvino_tokenizer.xml")
        DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False).save_pretrained(
            folder / "scheduler"
        )
        index = json.loads((setting.checkpoint / "model_index.json").read_bytes())
        (folder / "model_index.json").write_text(json.dumps({**index, "vae_decoder": index["vae"]}))

    return make_once(setting.work / "genai", write)
