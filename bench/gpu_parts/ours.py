"""A bundle of rt on the GPU: its engines alone, and whole pictures through `Pipeline`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rt.bench.bundle import PROMPT
from rt.bench.gpu_parts.built import Built
from rt.bench.gpu_parts.model import Inputs, Model
from rt.bench.gpu_parts.place import Call
from rt.bench.gpu_parts.settings import OURS
from rt.conditioning import Conditioning, contexts
from rt.config import DType
from rt.cuda import KernelLibrary, Stream, capture
from rt.device_session import DeviceSession, GraphMode
from rt.model import Component
from rt.noise import Generator
from rt.samplers import Scheduler
from rt.session import Loop, Row, Session
from rt.shapes import ShapeProfile
from rt.step import Step
from rt.time_table import TimeTable


class Ours:
    """See `Peer`.

    Args:
        model: Which.
        scratch: Where bundles are kept.
        dtype: Of the build.

    Raises:
        ConfigError: There is no such bundle at this commit.
    """

    def __init__(self, model: Model, scratch: Path, dtype: DType = DType.FP16) -> None:
        self.model = model
        self.name = OURS if dtype is DType.FP16 else f"{OURS} {dtype.value}"
        self.built = model_bundle(model, scratch, dtype)
        self.pipe = self.built.open()
        self._guided = model.setting.guided
        self._scheduler = Scheduler.from_config(model.checkpoint.spec.scheduler)
        self._single = ShapeProfile(model.profile.height, model.profile.width)
        self._latents = model.inputs.latents.cpu().numpy()
        self._sides = _sides(model.inputs)
        self._fill(model.inputs.timestep)
        self._unet = self._launch(Component.UNET, model.profile, guided=self._guided)
        self._vae = self._launch(Component.VAE_DECODER, self._single)

    def unet(self) -> Tensor:
        """See `Peer`: the step's program, for which text and timestep have been worked out before the loop."""
        self._unet()
        return self._output(Component.UNET, "prediction", self.model.profile, guided=self._guided)

    def vae(self) -> Tensor:
        """See `Peer`."""
        self._vae()
        return self._output(Component.VAE_DECODER, "image", self._single).permute(0, 3, 1, 2)

    def picture(self, steps: int) -> NDArray[np.uint8]:
        """See `Peer`."""
        images = self.pipe(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=self.model.guidance_scale,
            negative_prompt="" if self._guided else None,
            latents=self._latents,
            scheduler=self._scheduler,
            seed=0,
        ).images
        return np.asarray(images[0])

    def loops(self, steps: int) -> dict[str, Call]:
        """Way of launching → a run of the loop alone that nobody watches, from text states to latents on the host."""
        engines, spec, profile = self.pipe.engines, self.pipe.bundle.manifest.model, self.model.profile
        if engines.place is None:
            sessions: dict[str, Loop] = {"on the host": Session(engines, spec, profile)}
        else:
            bundle = self.pipe.bundle
            kernels = KernelLibrary(engines.place.device, bundle.manifest.kernels, bundle.path)
            sessions = {
                mode.value: DeviceSession(engines, kernels, spec, profile, mode=mode) for mode in GraphMode
            }
        return {name: partial(self._run, session, steps) for name, session in sessions.items()}

    def _run(self, session: Loop, steps: int) -> None:
        row = Row(
            schedule=self._scheduler.schedule(steps),
            noise=Generator(0),
            cond=self._sides[-1],
            uncond=self._sides[0] if self._guided else None,
            guidance_scale=self.model.guidance_scale,
            latents=self._latents[0],
        )
        session.run([row])
        session.latents()

    def _fill(self, timestep: int) -> None:
        """The inputs of both engines, through the programs that run before the loop."""
        engines, profile = self.pipe.engines, self.model.profile
        times = TimeTable(engines.get(Component.UNET_TIME), (profile.height, profile.width))
        times.prepare((timestep, side) for side in self._sides)
        made = contexts(engines.get(Component.UNET_CONTEXT), set(self._sides))
        step = Step(engines.get(Component.UNET, profile, guided=self._guided))
        step.clear()
        step.latents[0] = self._latents[0]
        step.write_context(0, [made[side] for side in self._sides])
        step.write_time(0, [times[timestep, side] for side in self._sides])
        step.run()
        decoder = engines.get(Component.VAE_DECODER, self._single)
        decoder.inputs["latents"][...] = self._latents
        decoder.enqueue()

    def _launch(self, component: Component, profile: ShapeProfile, *, guided: bool = False) -> Call:
        """Enqueues the program in torch's stream: as a graph on a GPU, and at once on the CPU."""
        engines = self.pipe.engines
        if engines.place is None:
            return engines.get(component, profile, guided=guided).enqueue
        device, stream = engines.place.device, engines.place.stream
        engine = engines.on_device(component, profile, guided=guided)
        graph = capture(device, stream, lambda: engine.enqueue(stream))
        return lambda: graph.launch(Stream(torch.cuda.current_stream().cuda_stream))

    def _output(
        self, component: Component, name: str, profile: ShapeProfile, *, guided: bool = False
    ) -> Tensor:
        engines = self.pipe.engines
        if engines.place is None:
            return torch.from_numpy(engines.get(component, profile, guided=guided).outputs[name])
        return torch.as_tensor(
            engines.on_device(component, profile, guided=guided).outputs[name], device="cuda"
        )


def _sides(inputs: Inputs) -> list[Conditioning]:
    """The unconditional text, where there is one, and the conditional."""
    pooled = [None] * len(inputs.context) if inputs.pooled is None else inputs.pooled.cpu().numpy()
    return [
        Conditioning(states=states, pooled=row)
        for states, row in zip(inputs.context.cpu().numpy(), pooled, strict=True)
    ]


def model_bundle(model: Model, scratch: Path, dtype: DType) -> Built:
    """Ours of a model, whether it is there or not."""
    setting, dry = model.setting, model.place.dry
    family = model.checkpoint.spec.family.value
    name = (family if dry else f"{setting.architecture}-{setting.side}") + "-guided" * setting.guided
    return Built.at(scratch, name, dtype, dry=dry)
