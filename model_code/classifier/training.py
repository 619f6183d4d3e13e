"""One training run, from configuration to best weights; tuning trials and the final training share it."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifier import checkpoint, features, model
from classifier.batches import Batches, FeatureBatches, PictureBatches
from classifier.config import TrainingConfig
from classifier.dataset import DatasetInfo, cpu_count, load_split, read_info
from classifier.engine import Observer, Result, Silent, evaluate, make_optimizer, make_scheduler, train_one_epoch
from classifier.errors import DataError
from classifier.precision import ThreadGovernor, faster_precision, faster_threads
from classifier.serving import Preprocessing


def say(line: str) -> None:
    """Progress goes to stdout at once: SageMaker reads metrics from it."""
    print(line, flush=True)


def channel(name: str) -> Path | None:
    """The folder of an input channel (the toolkit's SM_CHANNEL_<NAME>), or None."""
    found = os.environ.get(f"SM_CHANNEL_{name.upper()}")
    return Path(found) if found else None


def device() -> torch.device:
    """The GPU, where the container sees one. One per job: several are not used yet."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_threads() -> None:
    """All CPUs for torch, unless OMP_NUM_THREADS says otherwise."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cpu_count()))


@dataclass
class Setup:
    """What a run trains: ``network`` on ``train``, judged on ``valid``. ``config`` has names and precision resolved."""

    config: TrainingConfig
    info: DatasetInfo
    network: nn.Module
    train: Batches
    valid: Batches
    preprocessing: Preprocessing
    precision: str
    features: Path | None = None


def prepare_run(config: TrainingConfig) -> Setup:
    """Read the channels and build the network. Raises DataError, ConfigError or WeightsError."""
    use_threads()
    folder = channel("dataset")
    if folder is None:
        raise DataError("there is no channel 'dataset' (SM_CHANNEL_DATASET is not set): give the job one")
    info = read_info(folder)
    return _features_run(config, info) if config.recipe == "head" else _pictures_run(config, info)


def _features_run(config: TrainingConfig, info: DatasetInfo) -> Setup:
    folder = channel("features")
    if folder is None:
        raise DataError("recipe=head needs the channel 'features' that cache_features.py wrote: give the job one")
    found = features.read_info(folder)
    if found.dataset_hash != info.hash:
        raise DataError(f"the features are of data set {found.dataset_hash}, the channel holds {info.hash}: cache them again")
    inputs, labels = features.load(folder, "train")
    torch.manual_seed(config.seed)
    head = model.StandardisedHead(inputs.mean(dim=0), inputs.std(dim=0), info.num_classes)
    preprocessing = found.preprocessing
    config = replace(config, backbone=found.backbone, image_size=preprocessing.image_size, resize_size=preprocessing.resize_size)
    train = FeatureBatches(inputs, labels, config, train=True)
    valid = FeatureBatches(*features.load(folder, "valid"), config, train=False)
    return Setup(config, info, head, train, valid, preprocessing, "fp32", folder)


def _pictures_run(config: TrainingConfig, info: DatasetInfo) -> Setup:
    network, name = model.training_model(config, info.num_classes, channel("pretrained"))
    network = network.to(device())
    preprocessing = Preprocessing.of(config.image_size, config.resize_size)
    config = replace(config, backbone=name, resize_size=preprocessing.resize_size)
    started = time.monotonic()
    train_split = load_split(info, "train", preprocessing.resize_size, config.num_workers)
    valid_split = load_split(info, "valid", preprocessing.resize_size, config.num_workers)
    say(f"decoded {len(train_split) + len(valid_split)} pictures, seconds={time.monotonic() - started:.1f}")
    train = PictureBatches(train_split, preprocessing, config, train=True)
    valid = PictureBatches(valid_split, preprocessing, config, train=False)
    precision, side = config.precision, preprocessing.image_size
    random = torch.Generator().manual_seed(config.seed)
    sample = torch.randn(min(config.batch_size, 32), 3, side, side, generator=random).contiguous(memory_format=torch.channels_last)
    if precision == "auto":
        precision = faster_precision(network, sample, train=True)
    threads = torch.get_num_threads()
    if device().type == "cpu":
        threads = faster_threads(network, sample, precision, train=True)
    say(f"device={device().type} precision={precision} threads={threads}")
    return Setup(config, info, network, train, valid, preprocessing, precision)


@dataclass(frozen=True)
class Epoch:
    """One line of the history."""

    number: int
    train: Result
    valid: Result
    best: float
    learning_rate: float
    seconds: float

    def line(self, epochs: int) -> str:
        """The line that the metric definitions of the jobs read."""
        return (
            f"epoch={self.number}/{epochs} train_loss={self.train.loss:.4f} train_top1={self.train.top1:.4f} "
            f"valid_loss={self.valid.loss:.4f} valid_top1={self.valid.top1:.4f} best_valid_top1={self.best:.4f} "
            f"learning_rate={self.learning_rate:.4f} seconds={self.seconds:.1f}"
        )


@dataclass
class Progress:
    """What a checkpoint restores beside model, optimizer and scheduler."""

    epoch: int = 0
    best: float = -1.0
    best_loss: float = float("inf")
    best_epoch: int = 0


def fit(
    setup: Setup,
    *,
    observer: Observer | None = None,
    checkpoints: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    loss_function: nn.Module | None = None,
    stop_after: int | None = None,
) -> list[dict[str, Any]]:
    """Train and leave the best weights (valid top1, then valid loss) in ``setup.network``; returns the history as JSON.

    With ``checkpoints`` every epoch is saved there and a run that was interrupted goes on where it stopped.
    ``stop_after`` ends the run after so many epochs, as an interruption would.
    """
    config, network = setup.config, setup.network
    observer = observer or Silent()
    loss_function = loss_function or nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = make_optimizer(network, config)
    scheduler = make_scheduler(optimizer, config, len(setup.train))
    progress, history, governor = Progress(), list[dict[str, Any]](), ThreadGovernor()
    best_state = copy.deepcopy(network.state_dict())
    saved = checkpoint.load(checkpoints) if checkpoints else None
    if saved and saved["config"] == asdict(config):
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        progress, history, best_state = Progress(**saved["progress"]), saved["history"], saved["best_state"]
        setup.precision = saved["precision"]
        checkpoint.restore_random(saved)
        say(f"resumed after epoch {progress.epoch} of {config.epochs}")
    elif saved:
        say("note: the checkpoint belongs to other hyperparameters; training starts from the first epoch")
    while progress.epoch < config.epochs and not _patience_is_over(config, progress):
        if stop_after is not None and progress.epoch >= stop_after:
            return history
        entry = _one_epoch(setup, progress, optimizer, scheduler, loss_function, observer, governor)
        if entry.best > progress.best or (entry.valid.top1 == progress.best and entry.valid.loss < progress.best_loss):
            progress.best, progress.best_loss, progress.best_epoch = entry.valid.top1, entry.valid.loss, entry.number
            best_state = copy.deepcopy(network.state_dict())
        progress.epoch = entry.number
        history.append(_as_json(entry))
        say(entry.line(config.epochs))
        if on_epoch:
            on_epoch(entry)
        if checkpoints:
            _save(checkpoints, setup, progress, history, best_state, optimizer, scheduler)
    network.load_state_dict(best_state)
    return history


def _patience_is_over(config: TrainingConfig, progress: Progress) -> bool:
    over = 0 < config.early_stopping_patience <= progress.epoch - progress.best_epoch
    if over:
        say(f"stopped early: no better valid top1 since epoch {progress.best_epoch}")
    return over


def _one_epoch(
    setup: Setup,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    loss_function: nn.Module,
    observer: Observer,
    governor: ThreadGovernor,
) -> Epoch:
    started = time.monotonic()
    rate = float(optimizer.param_groups[0]["lr"])
    train = train_one_epoch(
        setup.network,
        loss_function,
        optimizer,
        scheduler,
        setup.train,
        epoch=progress.epoch,
        epochs=setup.config.epochs,
        precision=setup.precision,
        observer=observer,
        governor=governor,
        say=say,
    )
    valid = evaluate(setup.network, setup.valid, precision=setup.precision, observer=observer)
    best = max(progress.best, valid.top1)
    return Epoch(progress.epoch + 1, train, valid, best, rate, time.monotonic() - started)


def _as_json(entry: Epoch) -> dict[str, Any]:
    return {
        "epoch": entry.number,
        "train_loss": entry.train.loss,
        "train_top1": entry.train.top1,
        "valid_loss": entry.valid.loss,
        "valid_top1": entry.valid.top1,
        "best_valid_top1": entry.best,
        "learning_rate": entry.learning_rate,
        "seconds": entry.seconds,
    }


def _save(
    folder: Path,
    setup: Setup,
    progress: Progress,
    history: list[dict[str, Any]],
    best_state: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    state = {
        "config": asdict(setup.config),
        "precision": setup.precision,
        "model": setup.network.state_dict(),
        "best_state": best_state,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "progress": asdict(progress),
        "history": history,
    }
    checkpoint.save(folder, state)


def whole_model(setup: Setup) -> nn.Module:
    """The model from pixels to logits: for the recipe head, the backbone with the standardisation folded into its head."""
    if setup.features is None:
        return setup.network
    from safetensors.torch import load_file

    whole = model.build(setup.config.backbone)
    name, _ = model.split_head(whole)
    whole.load_state_dict(load_file(setup.features / "backbone.safetensors"))
    head = setup.network
    if not isinstance(head, model.StandardisedHead):
        raise TypeError("recipe head trains a StandardisedHead")
    parent, _, child = name.rpartition(".")
    setattr(whole.get_submodule(parent) if parent else whole, child, head.folded())
    return whole.eval()
