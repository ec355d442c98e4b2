"""One optimizer step after the other: loss, gradients, learning rate, average.

Shape legend: B rows of this worker in a step, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llkd_ray.config import TrainSection
from llkd_ray.selection import AllReduce, Floats, Ints
from llkd_ray.student.batches import Rows, pad
from llkd_ray.student.engine import Average


@dataclass
class Stepper:
    """Takes the steps of one epoch, on one worker."""

    engine: Any
    average: Average | None
    rows: Rows
    train: TrainSection
    pad_token_id: int
    device: torch.device
    world_size: int
    all_reduce: AllReduce
    seed: tuple[int, ...]
    """Of this epoch and worker."""
    rate: Callable[[int], float]
    """Learning rate of a step."""
    at: int
    """The next step, from 0."""
    loss_sum: float
    """Sum of weight times loss over this worker's rows so far."""

    def take(self, chosen: Ints, weight: Floats, target: Ints, weight_sum: float) -> None:
        """Take one optimizer step. Every worker must call this at the same time.

        Args:
            chosen: [B], positions of the rows; there may be none.
            weight: [B], in the loss.
            target: [B], the class to train towards.
            weight_sum: Of the step's rows on all workers; 0 leaves the weights as they are.
        """
        step, self.at = self.at, self.at + 1
        if not weight_sum:
            return
        # One seed per step and worker: a resumed run draws the dropout of an unbroken one.
        torch.manual_seed(int(np.random.SeedSequence([*self.seed, step]).generate_state(1)[0]))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.engine.train()
        for part in np.array_split(np.arange(len(chosen)), self.train.accumulation):
            weighted = self._weighted_loss(chosen[part], weight[part], target[part])
            # DeepSpeed takes the mean over workers and parts; the loss of the step is their sum.
            scale = self.world_size * self.train.accumulation / weight_sum
            self.engine.backward(weighted * scale)
            self.engine.step()
            self.loss_sum += float(weighted.detach())
        if self.average:
            self.average.update()

    def loss_sum_of_all(self) -> float:
        """Return the sum over all workers. Every worker must call this at the same time."""
        return float(self.all_reduce(np.array([self.loss_sum]))[0])

    def _weighted_loss(self, chosen: Ints, weight: Floats, target: Ints) -> torch.Tensor:
        inputs = pad(self.rows.tokens, chosen, self.pad_token_id, self.device)
        logits: torch.Tensor = self.engine(**inputs).logits.float()
        if not len(chosen):
            return logits.sum() * 0.0
        loss = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(target).to(self.device), reduction="none"
        )
        if self.train.soft_targets:
            loss = self._mixed(loss, logits, chosen, target)
        return (torch.from_numpy(weight).to(self.device, torch.float32) * loss).sum()

    def _mixed(
        self, hard: torch.Tensor, logits: torch.Tensor, chosen: Ints, target: Ints
    ) -> torch.Tensor:
        """Mix in the divergence from the teacher (Hinton et al. 2015, arXiv 1503.02531).

        A row that is trained towards another class than the teacher's label stays hard.
        """
        temperature = self.train.temperature
        teacher = torch.from_numpy(self.rows.teacher[chosen]).to(self.device)
        softened = torch.softmax(torch.log(teacher.clamp_min(1e-12)) / temperature, dim=-1)
        divergence = torch.nn.functional.kl_div(
            torch.log_softmax(logits / temperature, dim=-1), softened, reduction="none"
        ).sum(dim=-1)
        follows = torch.from_numpy(self.rows.label[chosen] == target).to(self.device)
        share = self.train.soft_targets * follows
        # The square of the temperature keeps the gradient's size: arXiv 1503.02531, section 2.
        return (1 - share) * hard + share * temperature**2 * divergence


def learning_rate(section: TrainSection, done: float) -> float:
    """Return the learning rate when a share `done` (0 to 1) of all training lies behind.

    It rises linearly over the warm-up and falls linearly to zero. The share counts `train.steps`,
    or else epochs, and within an epoch its steps: how many rows later epochs will keep is not known
    beforehand.
    """
    if done < section.warmup_fraction:
        return section.learning_rate * done / section.warmup_fraction
    return section.learning_rate * (1 - done) / (1 - section.warmup_fraction)
