"""The loops, visible: one training epoch and one evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from classifier.batches import Batches
from classifier.config import TrainingConfig
from classifier.errors import UserError
from classifier.precision import ThreadGovernor, autocast, device_of


class Observer(Protocol):
    """Sees every step: the smdebug hook and the step profiler stand behind it."""

    def mark(self, phase: str) -> None:
        """The named phase of the current step has just ended."""

    def mode(self, name: str) -> None:
        """``train`` or ``eval`` steps follow."""


class Silent:
    """An observer that looks away, for tuning trials."""

    def mark(self, phase: str) -> None:
        """Nothing."""

    def mode(self, name: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Result:
    """Mean loss and top1 over the examples of one pass; seconds of wall time."""

    loss: float
    top1: float
    seconds: float


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """SGD with Nesterov momentum or AdamW; biases and normalisation weights are not decayed."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        # One range of learning rates serves both: SGD's 0.01..0.1 becomes AdamW's 0.0002..0.002.
        return torch.optim.AdamW(groups, lr=config.learning_rate * 0.02)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def make_scheduler(optimizer: Optimizer, config: TrainingConfig, steps_per_epoch: int) -> LRScheduler:
    """Linear warm-up, then a cosine to zero; stepped after every batch."""
    total = config.epochs * steps_per_epoch
    warmup = min(int(config.warmup_epochs * steps_per_epoch), total // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return LambdaLR(optimizer, factor)


def train_one_epoch(
    model: nn.Module,
    loss_function: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    batches: Batches,
    *,
    epoch: int,
    epochs: int,
    precision: str,
    observer: Observer,
    governor: ThreadGovernor,
    say: Callable[[str], None],
) -> Result:
    """One pass over ``batches`` that changes the model. Raises UserError when the loss is not finite."""
    model.train()
    observer.mode("train")
    governor.start()
    started = said = time.monotonic()
    device = device_of(model)
    total_loss, right, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for step, (pictures, truth) in enumerate(batches.epoch(epoch)):
        inputs, labels = pictures.to(device), truth.to(device)
        observer.mark("DataLoading")
        with autocast(precision, device.type):
            logits = model(inputs)
        loss: Tensor = loss_function(logits.float(), labels)
        observer.mark("Forward")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        observer.mark("Backward")
        optimizer.step()
        scheduler.step()
        observer.mark("Optimizer")
        if device.type == "cpu":  # a GPU works on its own time: the clock here says nothing about shared CPUs
            governor.step()
        total_loss += loss.detach() * len(labels)
        right += (logits.detach().argmax(dim=1) == labels).sum()
        seen += len(labels)
        if (now := time.monotonic()) - said >= 1:
            said = now
            where = f"epoch={epoch + 1}/{epochs} step={step + 1}/{len(batches)}"
            say(f"progress {where} loss={loss.item():.2f} pictures_per_s={seen / (now - started):.0f}")
    mean = float(total_loss) / max(seen, 1)
    if not math.isfinite(mean):
        raise UserError(f"the loss became {mean} in epoch {epoch + 1}: lower learning_rate, or set precision to fp32")
    return Result(mean, float(right) / max(seen, 1), time.monotonic() - started)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, *, precision: str, observer: Observer) -> Result:
    """Mean cross-entropy (without smoothing) and top1 over all of ``batches``. Raises UserError when examples are missing."""
    model.eval()
    observer.mode("eval")
    started = time.monotonic()
    loss, right, seen, device = 0.0, 0, 0, device_of(model)
    for pictures, truth in batches.epoch(0):
        inputs, labels = pictures.to(device), truth.to(device)
        with autocast(precision, device.type):
            logits = model(inputs).float()
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(dim=1) == labels).sum())
        seen += len(labels)
    if seen != batches.num_examples:
        raise UserError(f"evaluated {seen} examples, the split has {batches.num_examples}: prepare the data set again")
    return Result(loss / seen, right / seen, time.monotonic() - started)
