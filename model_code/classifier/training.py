"""One training run, from configuration to best weights; tuning trials and the final training share it."""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifier import checkpoint, distributed, features, model
from classifier.batches import Batches, DeviceBatches, FeatureBatches, PictureBatches, choose_workers
from classifier.config import CACHED_FEATURES, WATCHING, TrainingConfig
from classifier.cpus import cpu_count, keep_freed_memory
from classifier.dataset import (
    DatasetInfo,
    DecodedSplit,
    Labels,
    Pictures,
    ShardSplit,
    choose_place,
    load_split,
    read_info,
    training_side,
)
from classifier.engine import Observer, Position, Result, Silent, Trainer, evaluate, train_one_epoch
from classifier.errors import ConfigError, DataError, UserError
from classifier.precision import faster_precision, faster_threads
from classifier.serving import Preprocessing

GPU_SHARE = 0.4
"""A decoded data set up to this share of a GPU's free memory is kept there."""


def say(line: str) -> None:
    """Progress goes to stdout at once: SageMaker reads metrics from it. One process of several speaks."""
    if distributed.is_main():
        print(line, flush=True)


def channel(name: str) -> Path | None:
    """The folder of an input channel (the toolkit's SM_CHANNEL_<NAME>), or None."""
    found = os.environ.get(f"SM_CHANNEL_{name.upper()}")
    return Path(found) if found else None


def device() -> torch.device:
    """This process's GPU, where the container sees one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def use_cpus() -> None:
    """All CPUs for torch, unless OMP_NUM_THREADS says otherwise, and memory that is asked for once."""
    keep_freed_memory()
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
    labels: Labels
    """Classes of the training examples, for class weights."""
    features: Path | None = None


# --- what is trained ---------------------------------------------------------------------------------------------------------


def prepare_run(config: TrainingConfig) -> Setup:
    """Read the channels and build the network. Raises DataError, ConfigError or WeightsError."""
    use_cpus()
    distributed.start()
    say(f"processes={distributed.size()}")
    folder = channel("dataset")
    if folder is None:
        raise DataError("there is no channel 'dataset' (SM_CHANNEL_DATASET is not set): give the job one")
    info = read_info(folder)
    _check_sizes(config, info)
    return _features_run(config, info) if config.recipe == "head" else _pictures_run(config, info)


def _check_sizes(config: TrainingConfig, info: DatasetInfo) -> None:
    count = info.num_pictures.get("train", 0)
    if config.batch_size > count:
        raise ConfigError(f"batch_size={config.batch_size} is larger than the training split with {count} pictures: choose less")
    parts = distributed.size() * config.accumulation_steps
    if config.batch_size < parts:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared by {distributed.size()} processes × accumulation_steps="
            f"{config.accumulation_steps}: choose at least {parts}"
        )


def check_classes(labels: Labels, info: DatasetInfo, split: str) -> None:
    """Raises DataError for a class without an example."""
    counts = Counter(labels.tolist())
    empty = [name for number, name in enumerate(info.classes) if not counts[number]]
    if empty:
        raise DataError(
            f"{len(empty)} classes have no {split} picture ({', '.join(empty[:5])}): add pictures or remove the classes"
        )


def _cached_features(info: DatasetInfo) -> tuple[Path, features.FeaturesInfo]:
    """The channel ``features``. Raises DataError when it is absent or of another data set."""
    folder = channel("features")
    if folder is None:
        raise DataError("recipes head and lp-ft need the channel 'features' that cache_features.py wrote: give the job one")
    found = features.read_info(folder)
    if found.dataset_hash != info.hash:
        raise DataError(f"the features are of data set {found.dataset_hash}, the channel holds {info.hash}: cache them again")
    return folder, found


def _features_run(config: TrainingConfig, info: DatasetInfo) -> Setup:
    folder, found = _cached_features(info)
    views, labels = features.load(folder, "train")
    check_classes(labels, info, "train")
    torch.manual_seed(config.seed)
    head = model.StandardisedHead(*features.moments(views), info.num_classes)
    preprocessing = found.preprocessing
    config = replace(config, backbone=found.backbone, image_size=preprocessing.image_size, resize_size=preprocessing.resize_size)
    train = FeatureBatches(views, labels, config, train=True)
    valid = FeatureBatches(*features.load(folder, "valid"), config, train=False)
    return Setup(config, info, head, train, valid, preprocessing, "fp32", labels, folder)


def _pictures_run(config: TrainingConfig, info: DatasetInfo) -> Setup:
    network, config = _network(config, info)
    network = network.to(device())
    preprocessing = Preprocessing.of(config.image_size, config.resize_size)
    config = replace(config, resize_size=preprocessing.resize_size)
    pictures = _training_pictures(info, config)
    check_classes(pictures.labels, info, "train")
    valid_pictures = _held_pictures(info, config)
    valid = PictureBatches(valid_pictures, preprocessing, config, train=False, pin=torch.cuda.is_available())
    train = _training_batches(pictures, preprocessing, config)
    if config.recipe == "finetune":
        _give_head(network, PictureBatches(pictures, preprocessing, config, train=False), info.num_classes)
    precision = _precision(network, config)
    return Setup(config, info, network, train, valid, preprocessing, precision, pictures.labels)


def _network(config: TrainingConfig, info: DatasetInfo) -> tuple[nn.Module, TrainingConfig]:
    """The network before it has seen a picture; that of lp-ft starts with the head that a linear probe has found."""
    if config.recipe == "scratch":
        return model.fresh_model(config, info.num_classes), config
    if config.recipe not in CACHED_FEATURES:
        network, name = model.pretrained_model(config.backbone, config.pretrained, channel("pretrained"))
        return network, replace(config, backbone=name)
    say(f"linear probe: {config.probe_epochs} epochs on cached features")
    changes: dict[str, Any] = {"recipe": "head", "epochs": config.probe_epochs, "learning_rate": config.probe_learning_rate}
    plain: dict[str, Any] = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "ema_decay": 0.0, "compile": False, "accumulation_steps": 1}
    probe = _features_run(replace(config, **changes, **plain), info)
    history = fit(probe, say=lambda _: None)  # its epochs are not those that the job's metrics count
    say(f"linear probe ended with top1_on_valid={max(row['valid_top1'] for row in history):.4f}")
    found = probe.config
    config = replace(config, backbone=found.backbone, image_size=found.image_size, resize_size=found.resize_size)
    return _assembled(probe), config


def _give_head(network: nn.Module, batches: PictureBatches, num_classes: int) -> None:
    """A fresh head in place of the pretrained one: zeros, behind the standardisation of what the backbone says of some pictures."""
    name, _ = model.split_head(network)
    mean, std = features.observed_moments(network, batches)
    model.set_module(network, name, model.StandardisedHead(mean, std, num_classes).to(mean.device))


def _decoded_bytes(count: int, side: int) -> int:
    return count * side * side * 3


def _training_pictures(info: DatasetInfo, config: TrainingConfig) -> Pictures:
    """The training split, decoded once where that fits, otherwise read from the shards in every epoch."""
    side = training_side(info, config.resize_size)
    place = choose_place(_decoded_bytes(info.num_pictures["train"], side), config.input_cache)
    if place == "shards":
        return ShardSplit(info, "train")
    started = time.monotonic()
    split = load_split(info, "train", side, config.num_workers, place)
    say(f"decoded {len(split)} training pictures to {side}x{side} in {place}, seconds={time.monotonic() - started:.1f}")
    return split


def _held_pictures(info: DatasetInfo, config: TrainingConfig) -> Pictures:
    place = choose_place(_decoded_bytes(info.num_pictures["valid"], config.resize_size), config.input_cache)
    if place == "shards":
        return ShardSplit(info, "valid")
    return load_split(info, "valid", config.resize_size, config.num_workers, place)


def _training_batches(pictures: Pictures, preprocessing: Preprocessing, config: TrainingConfig) -> Batches:
    """In a GPU's memory when they fit; otherwise loaded by as many threads as a short measurement finds useful."""
    if isinstance(pictures, DecodedSplit) and torch.cuda.is_available() and config.input_cache in ("auto", "memory"):
        free, _ = torch.cuda.mem_get_info()
        if pictures.pictures.nbytes <= GPU_SHARE * free:
            say(f"input: {pictures.pictures.nbytes / 2**30:.2f} GiB of pictures in the GPU's memory, cropped and coloured there")
            return DeviceBatches(pictures, config, device())
    pin = torch.cuda.is_available()
    batches = PictureBatches(pictures, preprocessing, config, train=True, pin=pin)
    paces = {} if config.num_workers else choose_workers(batches, int(os.environ.get("OMP_NUM_THREADS") or cpu_count()))
    measured = ", ".join(f"{workers}: {pace:.0f}/s" for workers, pace in paces.items()) or "given"
    say(f"input: from {pictures.place}, threads={batches.workers} ({measured}), batches_ahead={batches.AHEAD}, pinned={pin}")
    return batches


def _precision(network: nn.Module, config: TrainingConfig) -> str:
    """The precision of the run, timed on a sample where it is ``auto``; sets torch's threads on a CPU."""
    precision, side, where = config.precision, config.image_size, device()
    if precision == "fp16" and where.type == "cpu":
        raise ConfigError("precision=fp16 needs a GPU: use auto, bf16 or fp32 on a CPU")
    random = torch.Generator().manual_seed(config.seed)
    sample = torch.randn(min(config.batch_size, 32), 3, side, side, generator=random).contiguous(memory_format=torch.channels_last)
    sample = sample.to(where)
    if precision == "auto":
        precision = faster_precision(network, sample, train=True)
    threads = torch.get_num_threads()
    if where.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        threads = faster_threads(network, sample, precision, train=True)
    precision = str(distributed.from_main(precision))  # the clock may judge otherwise in another process
    say(f"device={where.type} precision={precision} threads={threads}")
    return precision


# --- how it is trained -------------------------------------------------------------------------------------------------------


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

    def to_json(self) -> dict[str, Any]:
        """One row of the history."""
        return {
            "epoch": self.number,
            "train_loss": self.train.loss,
            "train_top1": self.train.top1,
            "valid_loss": self.valid.loss,
            "valid_top1": self.valid.top1,
            "best_valid_top1": self.best,
            "learning_rate": self.learning_rate,
            "seconds": self.seconds,
        }


@dataclass
class Best:
    """The best weights so far: valid top1, then valid loss; found in, or mixed from those of, ``epoch``."""

    top1: float = -1.0
    loss: float = float("inf")
    epoch: int = 0

    def beaten_by(self, valid: Result) -> bool:
        """Whether a judgement on valid is better than the best one so far."""
        return valid.top1 > self.top1 or (valid.top1 == self.top1 and valid.loss < self.loss)


@dataclass
class Run:
    """A training under way, and everything that a checkpoint holds of it."""

    setup: Setup
    trainer: Trainer
    position: Position
    best: Best
    best_state: dict[str, Tensor]
    history: list[dict[str, Any]]
    say: Callable[[str], None]

    @classmethod
    def begin(cls, setup: Setup, say: Callable[[str], None] = say) -> Run:
        """A run before its first step."""
        trainer = Trainer(
            setup.network,
            setup.config,
            setup.preprocessing,
            setup.precision,
            loss_of(setup),
            setup.info.num_classes,
            len(setup.train),
        )
        return cls(setup, trainer, Position(), Best(), copy.deepcopy(trainer.judged.state_dict()), [], say)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint holds beside the random generators."""
        sums = distributed.total(self.position.sums.clone()).cpu()
        return {
            "identity": self._identity(),
            "precision": self.trainer.precision,
            "threads": torch.get_num_threads(),
            "trainer": self.trainer.state_dict(),
            "position": {"epoch": self.position.epoch, "step": self.position.step, "sums": sums},
            "best": asdict(self.best),
            "best_state": self.best_state,
            "history": self.history,
        }

    def _identity(self) -> dict[str, Any]:
        """A checkpoint of other hyperparameters, data or number of processes is not this run's; how it is watched may change."""
        config = {name: value for name, value in asdict(self.setup.config).items() if name not in WATCHING}
        return {"config": config, "dataset": self.setup.info.hash, "processes": distributed.size()}

    def resume(self, folder: Path) -> None:
        """Go on where the checkpoint in ``folder`` was written, if there is one of this run."""
        saved = checkpoint.load(folder)
        if saved is None:
            return
        if saved.get("identity") != self._identity():
            self.say(
                "note: the checkpoint belongs to other hyperparameters, data or processes; training starts from the first epoch"
            )
            return
        self.trainer.load_state_dict(saved["trainer"])
        self.trainer.precision = self.setup.precision = saved["precision"]
        torch.set_num_threads(saved["threads"])  # sums in another order have other last bits
        self.position = Position(**saved["position"])
        if not distributed.is_main():
            self.position.sums = torch.zeros_like(self.position.sums)  # the main process holds the sums of all
        self.best, self.best_state, self.history = Best(**saved["best"]), saved["best_state"], saved["history"]
        checkpoint.restore_random(saved["random"][distributed.rank()])
        self.say(f"resumed in epoch {self.position.epoch + 1} of {self.setup.config.epochs} after step {self.position.step}")


def loss_of(setup: Setup) -> nn.CrossEntropyLoss:
    """Cross-entropy with label smoothing and, when asked for, weights that make every class count alike."""
    weight = None
    if setup.config.class_weights == "balanced":
        counts = torch.bincount(torch.from_numpy(setup.labels), minlength=setup.info.num_classes).clamp(min=1).float()
        weight = (counts.sum() / (len(counts) * counts)).to(next(setup.network.parameters()).device)
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=setup.config.label_smoothing)


def fit(
    setup: Setup,
    *,
    observer: Observer | None = None,
    checkpoints: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    stop: Callable[[], str] = lambda: "",
    say: Callable[[str], None] = say,
) -> list[dict[str, Any]]:
    """Train and leave the best weights (valid top1, then valid loss) in ``setup.network``; returns the history as JSON.

    With ``checkpoints`` the run is saved there and, when it was interrupted, goes on at the step after the last checkpoint.
    ``on_step`` gets epoch and step, from 0. ``stop`` is asked after every step for a reason to end there (empty: none).
    Raises SystemExit 143 after a notice of interruption, and UserError with the reason, both after a checkpoint.
    """
    run, observer = Run.begin(setup, say), observer or Silent()
    start = run.best_state
    if checkpoints:
        run.resume(checkpoints)
    # Only now: the moving average has copied the network, and hooks must not be copied.
    observer.watch(run.trainer, run.position)
    clock = checkpoint.Clock(setup.config.checkpoint_interval_s)
    with checkpoint.Notice() as notice:

        def after_step() -> None:
            if on_step:
                on_step(run.position.epoch, run.position.step - 1)
            interrupted = _in_any_process(run, notice.given)
            stopped = _in_any_process(run, bool(reason := stop()))
            if checkpoints and (interrupted or stopped or distributed.any_true(clock.due(), run.trainer.device)):
                checkpoint.save(checkpoints, run.state_dict())
                clock.reset()
            if stopped:
                raise UserError(reason or "the main process was told to stop")
            if interrupted:
                say(f"interrupted in epoch {run.position.epoch + 1} after step {run.position.step}")
                notice.exit()

        while run.position.epoch < setup.config.epochs and not _patience_is_over(run):
            entry = _one_epoch(run, observer, after_step)
            if on_epoch:
                on_epoch(entry)
            if checkpoints:
                checkpoint.save(checkpoints, run.state_dict())
                clock.reset()
    if setup.config.recipe == "lp-ft":
        _mix_with_probe(run, start)
    setup.network.load_state_dict(run.best_state)
    return run.history


def _mix_with_probe(run: Run, probe: dict[str, Tensor]) -> None:
    """Judge the mean of the linear probe's weights and the best fine-tuned ones, and keep it where it is better on valid.

    Fine-tuning learns the data set and forgets some of what the backbone knew; half way it often knows more than at either end
    (WiSE-FT, Wortsman et al., 2022, arXiv:2109.01903, whose advice is half way too). It costs one evaluation, and serving nothing.
    """
    mean = {name: _mean(value, run.best_state[name].to(value.device)) for name, value in probe.items()}
    run.trainer.judged.load_state_dict(mean)
    valid = evaluate(run.trainer, run.setup.valid, observer=Silent())
    if run.best.beaten_by(valid):
        run.best, run.best_state = Best(valid.top1, valid.loss, run.best.epoch), mean
    run.history[-1]["best_valid_top1"] = run.best.top1
    run.say(f"mean of probe and fine-tuned weights: top1_on_valid={valid.top1:.4f} best_valid_top1={run.best.top1:.4f}")


def _mean(first: Tensor, second: Tensor) -> Tensor:
    """The mean of two tensors; the second of two counters."""
    return (first + second) / 2 if first.is_floating_point() else second


def _in_any_process(run: Run, told: bool) -> bool:
    """Whether any process has been told to end; several processes ask each other every tenth step only."""
    if distributed.size() > 1 and run.position.step % 10:
        return False
    return distributed.any_true(told, run.trainer.device)


def _patience_is_over(run: Run) -> bool:
    over = 0 < run.setup.config.early_stopping_patience <= run.position.epoch - run.best.epoch
    if over:
        run.say(f"stopped early: no better valid top1 since epoch {run.best.epoch}")
    return over


def _one_epoch(run: Run, observer: Observer, after_step: Callable[[], None]) -> Epoch:
    """Train to the end of the epoch, judge, remember the best."""
    started = time.monotonic()
    rate = float(run.trainer.optimizer.param_groups[0]["lr"])
    train = train_one_epoch(run.trainer, run.setup.train, run.position, observer=observer, after_step=after_step, say=run.say)
    valid = evaluate(run.trainer, run.setup.valid, observer=observer)
    observer.evaluated(train, valid)
    number = run.position.epoch + 1
    if run.best.beaten_by(valid):
        run.best = Best(valid.top1, valid.loss, number)
        run.best_state = copy.deepcopy(run.trainer.judged.state_dict())
    entry = Epoch(number, train, valid, run.best.top1, rate, time.monotonic() - started)
    run.position = Position(epoch=number)
    run.history.append(entry.to_json())
    run.say(entry.line(run.setup.config.epochs))
    return entry


def _assembled(setup: Setup) -> nn.Module:
    """The backbone behind the cached features with the head that was trained on them, still standardising."""
    from safetensors.torch import load_file

    if setup.features is None:
        raise TypeError("only recipe head has features of its own")
    whole = model.build(setup.config.backbone)
    name, _ = model.split_head(whole)
    whole.load_state_dict(load_file(setup.features / "backbone.safetensors"))
    model.set_module(whole, name, setup.network)
    return whole


def whole_model(setup: Setup) -> nn.Module:
    """The model from pixels to logits in torchvision's own form: the standardisation is folded into a linear head."""
    return model.fold(setup.network if setup.features is None else _assembled(setup)).eval()
