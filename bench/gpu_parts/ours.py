"""A bundle of rt on the GPU: its engines alone, and whole pictures through `Pipeline`.

A dry run builds for the best engine of the CPU in its place.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rt.backends import AUTO, choose
from rt.bench.bundle import PROMPT
from rt.bench.gpu_parts.model import Inputs, Model
from rt.bench.gpu_parts.place import Call
from rt.conditioning import Conditioning, contexts
from rt.config import BuildConfig, DType
from rt.cuda import KernelLibrary, Stream, capture
from rt.device_session import DeviceSession, GraphMode
from rt.export.build import build
from rt.export.checkpoint import Checkpoint
from rt.model import Component
from rt.noise import Generator
from rt.pipeline import Pipeline
from rt.samplers import Scheduler
from rt.session import Loop, Row, Session
from rt.shapes import ShapeProfile
from rt.step import Step
from rt.time_table import TimeTable

BACKEND = "inductor"


class Ours:
    """See `Peer`.

    Args:
        model: What to build.
        scratch: Where bundles are kept.
    """

    name = "rt"

    def __init__(self, model: Model, scratch: Path) -> None:
        self.model = model
        family = model.checkpoint.spec.family.value
        name = f"dry-{family}" if model.place.dry else f"{model.setting.architecture}-{model.setting.side}"
        path = scratch / "bundles" / name
        self.pipe = open_bundle(model.checkpoint, path, model.profile, dry=model.place.dry)
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


def open_bundle(
    checkpoint: Checkpoint, path: Path, profile: ShapeProfile, *, dry: bool, dtype: DType | None = None
) -> Pipeline:
    """The bundle at `path`, built first where there is none.

    Args:
        checkpoint: What to build.
        path: Where.
        profile: The only shape.
        dry: Whether for the CPU, in fp32.
        dtype: Of the build; fp16 on a GPU where left out.
    """
    dtype = DType.FP32 if dry else dtype or DType.FP16
    backend = choose(AUTO, dtype)[0].name if dry else BACKEND
    if not (path / "manifest.json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        config = BuildConfig(profiles=(profile,), dtype=dtype, backend=backend, max_autotune=not dry)
        build(checkpoint, path, config, force=True, quiet=True)
    return Pipeline.from_bundle(path, backend=backend)
