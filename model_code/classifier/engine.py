"""The loops, visible: one training epoch and one evaluation.

Legend: B this process's part of a batch, C classes. Inputs come as uint8 pictures ``(B, 3, S, S)`` or float features ``(B, D)``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from classifier import distributed, optim, transforms
from classifier.batches import Batch, Batches
from classifier.config import TrainingConfig
from classifier.errors import UserError
from classifier.precision import autocast, device_of
from classifier.serving import Preprocessing


class Observer(Protocol):
    """Sees every step: the smdebug hook and the step profiler stand behind it."""

    def watch(self, trainer: Trainer, position: Position) -> None:
        """The training begins, or goes on, at ``position``."""

    def mark(self, phase: str) -> None:
        """The named phase of the current step has just ended."""

    def mode(self, name: str) -> None:
        """``train`` or ``eval`` steps follow."""

    def stepped(self, sums: Tensor) -> None:
        """A step has ended; ``sums (3,) float64``: losses, hits and examples of this process's part."""

    def evaluated(self, train: Result, valid: Result) -> None:
        """An epoch has been trained and judged."""


class Silent:
    """An observer that looks away, for tuning trials."""

    def watch(self, trainer: Trainer, position: Position) -> None:
        """Nothing."""

    def mark(self, phase: str) -> None:
        """Nothing."""

    def mode(self, name: str) -> None:
        """Nothing."""

    def stepped(self, sums: Tensor) -> None:
        """Nothing."""

    def evaluated(self, train: Result, valid: Result) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Result:
    """Mean loss and top1 over the examples of one pass; how many they were; seconds of wall time."""

    loss: float
    top1: float
    seconds: float
    examples: int


@dataclass
class Trainer:
    """A network with everything that changes while it learns."""

    network: nn.Module
    config: TrainingConfig
    preprocessing: Preprocessing
    precision: str
    loss_function: nn.Module
    num_classes: int
    steps_per_epoch: int
    optimizer: Optimizer = field(init=False)
    scheduler: LRScheduler = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    average: AveragedModel | None = field(init=False)
    forward: nn.Module = field(init=False)
    """The network as it is called in training: compiled, and averaging gradients over processes, where that is asked for."""

    def __post_init__(self) -> None:
        self.device = device_of(self.network)
        self.optimizer = optim.make_optimizer(self.network, self.config)
        self.scheduler = optim.make_scheduler(self.optimizer, self.config, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.average = optim.moving_average(self.network, self.config)
        self.forward = self.network
        if self.config.compile:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]
        if distributed.size() > 1:
            self.forward = DistributedDataParallel(self.forward)

    @property
    def judged(self) -> nn.Module:
        """The network whose accuracy counts: the moving average where there is one."""
        return self.network if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        average = None if self.average is None else self.average.state_dict()
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler, "model": self.network}
        return {**{name: part.state_dict() for name, part in parts.items()}, "average": average}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def train_mode(self) -> None:
        """Training behaviour of all layers, frozen batch normalisation aside."""
        self.forward.train()
        if self.config.batch_norm == "frozen":
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs and labels on the device, pictures normalised there: a quarter of the bytes on the way."""
        inputs = batch.inputs.to(self.device, non_blocking=True)
        if inputs.dtype == torch.uint8:
            inputs = transforms.normalise(inputs, self.preprocessing)
        return inputs, batch.labels.to(self.device, non_blocking=True)

    def step(self, batch: Batch, epoch: int, number: int, observer: Observer) -> Tensor:
        """One step of the optimiser; ``(3,) float64``: sum of losses, hits and examples of this process's part."""
        inputs, labels = self.inputs(batch)
        targets = labels
        if self.config.mixup_alpha > 0 or self.config.cutmix_alpha > 0:
            inputs, targets = transforms.mix(
                inputs, functional.one_hot(labels, self.num_classes).float(), self.config, epoch, number
            )
        observer.mark("DataLoading")
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        parts = list(zip(*(value.chunk(self.config.accumulation_steps) for value in (inputs, targets, labels)), strict=True))
        self.optimizer.zero_grad(set_to_none=True)
        for position, (part, target, truth) in enumerate(parts):
            last = position == len(parts) - 1
            with self._synchronised(last):
                with autocast(self.precision, self.device.type):
                    logits = self.forward(part)
                loss: Tensor = self.loss_function(logits.float(), target)
                if last:
                    observer.mark("Forward")
                # The mean over the whole batch, whatever part of it this process and this pass have; DDP divides by processes.
                share = len(truth) * distributed.size() / batch.total
                self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
            sums[0] += loss.detach() * len(truth)
            sums[1] += (logits.detach().argmax(dim=1) == truth).sum()
            sums[2] += len(truth)
        observer.mark("Backward")
        self._update()
        observer.mark("Optimizer")
        observer.stepped(sums)
        return sums

    def _synchronised(self, last: bool) -> AbstractContextManager[object]:
        """Gradients travel between processes once a step, with the last part of the batch."""
        return nullcontext() if last or not isinstance(self.forward, DistributedDataParallel) else self.forward.no_sync()

    def _update(self) -> None:
        if self.config.gradient_clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.network)


@dataclass
class Position:
    """Where in the training a run is; ``sums (3,) float64``: losses, hits and examples of the epoch so far, in this process."""

    epoch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))


def train_one_epoch(
    trainer: Trainer,
    batches: Batches,
    position: Position,
    *,
    observer: Observer,
    after_step: Callable[[], None],
    say: Callable[[str], None],
) -> Result:
    """The rest of an epoch, from ``position`` on. Raises UserError when the loss is not finite."""
    trainer.train_mode()
    observer.mode("train")
    position.sums = position.sums.to(trainer.device)
    started = said = time.monotonic()
    done = 0
    for batch in batches.epoch(position.epoch, position.step):
        position.sums += trainer.step(batch, position.epoch, position.step, observer)
        position.step += 1
        done += batch.total
        now = time.monotonic()
        if now - said >= 1:
            said = now
            loss, pace = float(position.sums[0] / position.sums[2]), done / (now - started)
            where = f"epoch={position.epoch + 1}/{trainer.config.epochs} step={position.step}/{len(batches)}"
            say(f"progress {where} loss={loss:.2f} pictures_per_s={pace:.0f}")
        after_step()
    loss, right, seen = distributed.total(position.sums.clone()).tolist()
    mean = loss / max(seen, 1)
    _check_finite(mean, f"in epoch {position.epoch + 1}")
    return Result(mean, right / max(seen, 1), time.monotonic() - started, int(seen))


def _check_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} {where}: lower learning_rate, or set precision to fp32")


@torch.inference_mode()
def evaluate(trainer: Trainer, batches: Batches, *, observer: Observer) -> Result:
    """Mean cross-entropy (without smoothing) and top1 over all of ``batches``.

    Raises UserError when examples are missing, or when the loss is not finite: a network can diverge in its running statistics
    alone, which training itself does not use.
    """
    network = trainer.judged.eval()
    observer.mode("eval")
    started = time.monotonic()
    sums = torch.zeros(3, dtype=torch.float64, device=trainer.device)
    for batch in batches.epoch(0):
        inputs, labels = trainer.inputs(batch)
        with autocast(trainer.precision, trainer.device.type):
            logits = network(inputs).float()
        sums[0] += functional.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(dim=1) == labels).sum()
        sums[2] += len(labels)
    loss, right, seen = distributed.total(sums).tolist()
    if seen != batches.num_examples:
        raise UserError(f"evaluated {seen:.0f} examples, the split has {batches.num_examples}: prepare the data set again")
    _check_finite(loss / seen, "on the split that judges")
    return Result(loss / seen, right / seen, time.monotonic() - started, int(seen))
