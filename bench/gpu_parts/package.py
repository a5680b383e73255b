"""A package of AOTInductor by itself: written, or loaded with random weights and inputs, which say how long it takes.

    FOLDER/engines/*.pt2      one; `rt.json` in it has the shapes of its weights
    FOLDER/inputs.json        {"inputs": [[name, shape, dtype], ...]}

What it computes means nothing, and the file of the weights is not read: it need not be there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rt.backends import get
from rt.backends.inductor import About, Weight, check_torch
from rt.bench.gpu_parts.place import Call, Place
from rt.bench.gpu_parts.programs import convolutions_left_to_cudnn
from rt.config import BuildConfig, DType
from rt.errors import CheckpointError, IncompatibleBundleError
from rt.export.forms import Request, writer
from rt.export.lower import WeightFile
from rt.export.program import Program
from rt.shapes import ShapeProfile

INPUTS = "inputs.json"


class Package:
    """One that is loaded.

    Args:
        folder: See the module.
        place: Where it runs.
        seed: Of weights and inputs.

    Raises:
        CheckpointError: The folder does not hold one.
        IncompatibleBundleError: It is for another release of torch or for another GPU.
    """

    def __init__(self, folder: Path, place: Place, seed: int) -> None:
        found = sorted((folder / "engines").glob("*.pt2"))
        if len(found) != 1 or not (folder / INPUTS).is_file():
            raise CheckpointError(
                f"{folder} is no package: it needs one engines/*.pt2 and {INPUTS}; make one with --prepare"
            )
        [file] = found
        about = About.read(file)
        check_torch(about, file)
        capability = place.facts().capability
        if about.capability != capability:
            raise IncompatibleBundleError(
                f"{file.name} was compiled for compute capability {about.capability}, and this GPU has {capability}; "
                f"prepare it for this one"
            )
        self._place, self._generator = place, place.generator(seed)
        self._loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", True, 1, -1)
        # The code keeps addresses alone: the tensors must live as long.
        self._weights = {
            name: self._weight(name, about.weights[name]) for name in self._loader.get_constant_fqns()
        }
        self._loader.load_constants(self._weights, False, True, True)
        self._inputs = [
            self._input(shape, getattr(torch, dtype))
            for _, shape, dtype in json.loads((folder / INPUTS).read_text())["inputs"]
        ]
        place.wait()

    def run(self) -> list[Tensor]:
        """Enqueue one evaluation."""
        outputs: list[Tensor] = self._loader.run(self._inputs)
        return outputs

    def graph(self) -> Call:
        """What replays `run`."""
        return self._place.graph(self.run)

    def _weight(self, name: str, weight: Weight) -> Tensor:
        """Of a size that keeps values as large as they are; norms do nothing."""
        tensor = torch.empty_strided(
            weight.shape, weight.stride, dtype=getattr(torch, weight.dtype), device=self._place.device
        )
        if len(weight.shape) > 1 and tensor.is_floating_point():
            return tensor.normal_(0, 1 / math.sqrt(math.prod(weight.shape[1:])), generator=self._generator)
        return tensor.fill_(1 if name.endswith("weight") else 0)

    def _input(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype, device=self._place.device)
        return torch.randn(shape, dtype=dtype, device=self._place.device, generator=self._generator)


def write(folder: Path, program: Program, module: nn.Module, place: Place, *, max_autotune: bool) -> Path:
    """Compile `program`, which `module` computes, for `place` into `folder`, unless it is there.

    Raises:
        ConfigError, BackendUnavailableError: This machine has not what inductor compiles with.
    """
    if (folder / INPUTS).is_file():
        return folder
    (folder / "engines").mkdir(parents=True, exist_ok=True)
    backend = get("inductor-cpu" if place.dry else "inductor")
    config = BuildConfig(
        profiles=(program.profile or ShapeProfile(64, 64),),
        dtype=DType.FP32 if place.dry else DType.FP16,
        backend=backend.name,
        max_autotune=max_autotune,
    )
    request = Request(stage=folder, config=config)
    further = writer(backend)
    assert further is not None and further.compile is not None
    further.check(request)
    weights = folder / "engines" / f"{program.name}.weights"
    weights.unlink(missing_ok=True)  # of one that was broken off
    with WeightFile(weights) as store, convolutions_left_to_cudnn():
        further.compile(program, module, store, request)
    inputs = [
        [name, list(each.shape), str(each.dtype).removeprefix("torch.")]
        for name, each in program.inputs.items()
    ]
    (folder / INPUTS).write_text(json.dumps({"inputs": inputs}) + "\n")  # last: it is complete
    return folder
