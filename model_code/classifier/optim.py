"""Optimiser, schedule and moving average: which weight learns how fast, and when.

One range of ``learning_rate``, 0.01 to 0.1, serves every recipe: it is the rate of a fresh head under SGD. What is already
trained, or learns under AdamW, gets a fixed share of it.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from classifier.config import TrainingConfig
from classifier.model import head_name

ADAMW_LR_SCALE = 0.02
"""SGD's 0.01 to 0.1 becomes AdamW's 0.0002 to 0.002."""


def block_of(parameter: str) -> str:
    """The block that a parameter belongs to: the path down to the first numbered part (``features.3``, ``layer1``)."""
    parts = parameter.split(".")[:-1]
    for number, part in enumerate(parts):
        if re.search(r"\d", part):
            return ".".join(parts[: number + 1])
    return ".".join(parts) or parameter


def learning_rates(network: nn.Module, config: TrainingConfig) -> dict[str, float]:
    """Learning rate of each trainable parameter by name: the head's in full, the backbone's scaled and falling with depth."""
    base = config.learning_rate * (ADAMW_LR_SCALE if config.optimizer == "adamw" else 1.0)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if config.recipe == "head":
        return dict.fromkeys(names, base)
    head = head_name(network)
    blocks = list(dict.fromkeys(block_of(name) for name in names if not name.startswith(f"{head}.")))
    depth = {block: len(blocks) - 1 - number for number, block in enumerate(blocks)}  # 0: right below the head
    return {
        name: base if name.startswith(f"{head}.") else base * config.backbone_lr_scale * config.layer_decay ** depth[block_of(name)]
        for name in names
    }


def make_optimizer(network: nn.Module, config: TrainingConfig) -> Optimizer:
    """SGD with Nesterov momentum, or AdamW. Biases and normalisation weights are not decayed."""
    rates, groups = learning_rates(network, config), dict[tuple[float, float], list[nn.Parameter]]()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rates[name], decay), []).append(parameter)
    # The fastest group first: its rate is the one that is printed.
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], -item[0][1]))
    settings = [{"params": held, "lr": rate, "weight_decay": decay} for (rate, decay), held in ordered]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=config.learning_rate * ADAMW_LR_SCALE)
    return torch.optim.SGD(settings, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def make_scheduler(optimizer: Optimizer, config: TrainingConfig, steps_per_epoch: int) -> LRScheduler:
    """Linear warm-up, then a cosine to zero; stepped after every batch."""
    steps = config.epochs * steps_per_epoch
    warmup = min(int(config.warmup_epochs * steps_per_epoch), steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def moving_average(network: nn.Module, config: TrainingConfig) -> AveragedModel | None:
    """The exponential moving average of weights and buffers, or None."""
    if config.ema_decay == 0:
        return None
    average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)
