"""The loop that every stage of the training shares: a budget of minutes, averaged weights, checkpoints that resume.

One process a core or a device: under ``torchrun`` each worker draws its own batches and gradients are averaged; alone,
the same code runs in one process. The learning rate follows the time spent, so that a run ends annealed anywhere.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

WARMUP_STEPS = 100
WEIGHT_DECAY = 0.01
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

    def agree(self, number: float) -> float:
        """The first worker's number, on all of them."""
        if self.count == 1:
            return number
        shared = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace each worker's by the mean of all."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class Task(Protocol):
    """What one stage trains."""

    name: str
    modules: nn.ModuleDict
    """Everything that is saved; parameters that ask for no gradient stay as they are."""

    def loss(self, rng: torch.Generator) -> Tensor:
        """The loss of a fresh random batch, drawn with `rng` (on the CPU)."""

    def preview(self, path: Path) -> None:
        """Writes pictures that show how far the training is; runs with the averaged weights."""


class Average:
    """Exponential moving average of weights, with a short memory at first."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.decay, self.updates = decay, 0
        self._live = parameters
        self.kept = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the live weights as they are now."""
        self.updates += 1
        torch._foreach_lerp_(
            self.kept, self._live, 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges live and averaged weights; a second call puts them back."""
        for live, kept in zip(self._live, self.kept, strict=True):
            live.data, kept.data = kept.data, live.data


def train(
    task: Task,
    folder: Path,
    workers: Workers,
    *,
    minutes: float,
    rate: float,
    decay: float = 0.999,
) -> None:
    """Trains `task` until its budget is spent, and leaves the averaged weights in ``task.modules``.

    Args:
        folder: keeps ``NAME.ckpt``, from which an interrupted run goes on, and previews ``NAME-MINUTES.png``.
        minutes: of training, counted over all runs of this folder.
        rate: peak learning rate of AdamW, warmed up linearly, then half a cosine down to zero.
        decay: of the moving average of the weights.
    """
    torch.manual_seed(workers.rank)
    task.modules.to(workers.device).train()
    parameters = [p for p in task.modules.parameters() if p.requires_grad]
    for p in parameters:  # every worker begins with the first one's weights
        if workers.count > 1:
            dist.broadcast(p.data, 0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = Average(parameters, decay)
    step, spent = _resume(folder / f"{task.name}.ckpt", task, optimizer, average)

    def save() -> None:
        if workers.first:
            state = {
                "modules": task.modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": (average.updates, average.kept),
                "step": step,
                "spent": spent,
            }
            part = folder / f"{task.name}.ckpt.part"
            torch.save(state, part)
            part.replace(folder / f"{task.name}.ckpt")

    def preview() -> None:
        if workers.first:
            average.swap()
            task.modules.eval()
            with torch.no_grad():
                task.preview(folder / f"{task.name}-{spent / 60:03.0f}.png")
            task.modules.train()
            average.swap()
        workers.wait()

    budget, mean_loss = minutes * 60, math.nan
    saved, previewed = spent, spent
    bar = tqdm(
        total=round(budget),
        initial=round(spent),
        desc=task.name,
        unit="s",
        disable=not workers.first,
        mininterval=5,
    )
    while spent < budget:
        started = time.monotonic()
        scale = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * spent / budget))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        rng = torch.Generator().manual_seed((step * workers.count + workers.rank) * 7919 + 1)
        with torch.autocast(workers.device.type, torch.bfloat16):
            loss = task.loss(rng)
        loss.backward()
        workers.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
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
        preview()
    average.swap()
    task.modules.eval().requires_grad_(False)
    workers.wait()


def _resume(path: Path, task: Task, optimizer: torch.optim.Optimizer, average: Average) -> tuple[int, float]:
    """Takes up what an earlier run left; returns its steps and its seconds of training."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu")
    task.modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    average.updates, kept = state["average"]
    for mine, saved in zip(average.kept, kept, strict=True):
        mine.copy_(saved)
    return state["step"], state["spent"]
