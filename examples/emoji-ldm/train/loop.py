"""The loop that every stage of the training shares: a budget of minutes, averaged weights, checkpoints that resume.

One process a core or a device: under ``torchrun`` each worker draws its own batches and gradients are averaged; alone,
the same code runs in one process. The learning rate follows the time spent, so that a run ends annealed anywhere.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

WARMUP_STEPS = 100
SMALLEST_RANK = 32
"""A map of fewer dimensions than this on either side is a vector for the optimizer."""
SAVE_EVERY_S, PREVIEW_EVERY_S = 180, 420


class Workers:
    """The processes of one run and what each computes on."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpu = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
        )
        if self.count > 1:
            dist.init_process_group("nccl" if gpu else "gloo")
        if self.count > 1 and not gpu:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.count))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def share(self, vector: Tensor) -> None:
        """Replace each worker's by the first one's, in place."""
        if self.count > 1:
            dist.broadcast(vector, 0)

    def agree(self, number: float) -> float:
        """The first worker's number, on all of them."""
        shared = torch.tensor([number], dtype=torch.float64, device=self.device)
        self.share(shared)
        return shared.item()

    def average(self, vector: Tensor) -> None:
        """Replace each worker's by the mean of all, in place."""
        if self.count > 1:
            dist.all_reduce(vector)
            vector /= self.count


def save_whole(value: Any, path: Path) -> None:
    """`torch.save` that leaves the whole file or none, whatever interrupts it."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


class Task(Protocol):
    """What one stage trains."""

    name: str
    modules: nn.ModuleDict
    """Everything that is saved; parameters that ask for no gradient stay as they are."""

    def loss(self, rng: torch.Generator) -> Tensor:
        """The loss of a fresh random batch, drawn with `rng` (on the CPU)."""

    def preview(self, path: Path) -> None:
        """Writes pictures that show how far the training is; runs with the averaged weights."""


class Weights:
    """All that a task trains, as one vector: one exchange and one average instead of hundreds.

    Attributes:
        vector: [n], of which the modules' parameters have become views; so have their gradients of its gradient.
        average: [n], exponential moving average with a short memory at first.
        matrices: Views [out, in] of its first part: linear maps and convolutions.
        rest: View [m] of its second part: biases, norms, embeddings, maps from or to a few channels.
    """

    def __init__(self, modules: nn.Module, decay: float):
        embeddings = {id(module.weight) for module in modules.modules() if isinstance(module, nn.Embedding)}

        def is_matrix(p: nn.Parameter) -> bool:
            return p.ndim > 1 and min(len(p), p[0].numel()) >= SMALLEST_RANK and id(p) not in embeddings

        trained = [p for p in modules.parameters() if p.requires_grad]
        matrices = [p for p in trained if is_matrix(p)]
        parameters = [*matrices, *(p for p in trained if not is_matrix(p))]
        sizes = [p.numel() for p in parameters]
        self.vector = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        self.vector.grad = torch.zeros_like(self.vector)
        values, gradients = self.vector.data.split(sizes), self.vector.grad.split(sizes)
        for p, value, gradient in zip(parameters, values, gradients, strict=True):
            p.data, p.grad = value.view_as(p), gradient.view_as(p)
        self.matrices = [self._view(p.data.flatten(1), p.grad.flatten(1)) for p in matrices]
        first = sum(matrix.numel() for matrix in self.matrices)
        self.rest = self._view(self.vector.data[first:], self.vector.grad[first:])
        self.average, self._decay, self._updates = self.vector.detach().clone(), decay, 0

    @staticmethod
    def _view(value: Tensor, gradient: Tensor) -> nn.Parameter:
        view = nn.Parameter(value)
        view.grad = gradient
        return view

    def optimizers(self, rate: float) -> list[torch.optim.Optimizer]:
        """Adam for what is no matrix, and Muon at Adam's rates for what is (Liu et al. 2025, arXiv:2502.16982)."""
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam([self.rest], lr=rate, betas=(0.9, 0.99), fused=True)
        ]
        if self.matrices:
            settings = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
            optimizers.append(torch.optim.Muon(self.matrices, lr=rate, **settings))
        return optimizers

    @torch.no_grad()
    def track(self) -> None:
        """Take the vector as it is now into the average."""
        self._updates += 1
        self.average.lerp_(self.vector, 1 - min(self._decay, (1 + self._updates) / (10 + self._updates)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange vector and average; a second call puts them back."""
        vector = self.vector.clone()
        self.vector.copy_(self.average)
        self.average.copy_(vector)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"vector": self.vector.detach(), "average": self.average, "updates": self._updates}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.vector.copy_(state["vector"])
        self.average.copy_(state["average"])
        self._updates = state["updates"]


def train(
    task: Task, folder: Path, workers: Workers, *, minutes: float, rate: float, decay: float = 0.999
) -> None:
    """Trains `task` until its budget is spent, and leaves the averaged weights in ``task.modules``.

    Args:
        folder: keeps ``NAME.ckpt``, from which an interrupted run goes on, and previews ``NAME-MINUTES.png``.
        minutes: of training, counted over all runs of this folder.
        rate: peak learning rate, warmed up linearly, then half a cosine down to zero.
        decay: of the moving average of the weights.
    """
    torch.manual_seed(workers.rank)
    task.modules.to(workers.device).train()
    weights = Weights(task.modules, decay)
    workers.share(weights.vector.data)
    weights.average.copy_(weights.vector.data)
    optimizers = weights.optimizers(rate)
    checkpoint = folder / f"{task.name}.ckpt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=workers.device)
        weights.restore(state["weights"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        step, spent = state["step"], state["spent"]

    def save() -> None:
        if workers.first:
            states = {"weights": weights.state(), "optimizers": [o.state_dict() for o in optimizers]}
            save_whole({**states, "step": step, "spent": spent}, checkpoint)

    def preview() -> None:
        if workers.first:
            weights.swap()
            task.modules.eval()
            with torch.no_grad():
                task.preview(folder / f"{task.name}-{spent / 60:03.0f}.png")
            task.modules.train()
            weights.swap()
        workers.wait()

    budget, mean_loss = minutes * 60, math.nan
    saved, previewed = spent, spent
    seconds = {"total": round(budget), "initial": round(spent), "unit": "s"}
    bar = tqdm(**seconds, desc=task.name, mininterval=5, disable=not workers.first)
    while spent < budget:
        started = time.monotonic()
        warmth, progress = min(1.0, (step + 1) / WARMUP_STEPS), spent / budget
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * warmth * 0.5 * (1 + math.cos(math.pi * progress))
        rng = torch.Generator().manual_seed(step * workers.count + workers.rank)
        with torch.autocast(workers.device.type, torch.bfloat16):
            loss = task.loss(rng)
        loss.backward()
        workers.average(weights.vector.grad)
        nn.utils.clip_grad_norm_(weights.vector, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        weights.vector.grad.zero_()
        weights.track()
        step += 1
        mean_loss = loss.item() if math.isnan(mean_loss) else 0.99 * mean_loss + 0.01 * loss.item()
        spent = workers.agree(spent + time.monotonic() - started)
        bar.set_postfix(step=step, loss=f"{mean_loss:.4f}", refresh=False)
        bar.update(round(spent) - bar.n)
        if spent - saved > SAVE_EVERY_S:
            save()
            saved = spent
        if spent - previewed > PREVIEW_EVERY_S:
            preview()
            previewed = spent
    bar.close()
    if saved < spent:
        save()
    if previewed < spent:
        preview()
    weights.swap()
    task.modules.eval().requires_grad_(False)
    workers.wait()
