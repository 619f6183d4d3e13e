"""The one training configuration: a field is a flag is a hyperparameter.

SageMaker passes every hyperparameter as ``--name value`` (strings); nothing else reads them.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from classifier.errors import ConfigError
from classifier.findings import PROFILER_RULES, TRAINING_RULES

_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "recipe": ("head", "finetune", "lp-ft", "scratch"),
    "pretrained": ("torchvision", "none", "channel"),
    "optimizer": ("sgd", "adamw"),
    "augmentation": ("none", "trivial", "rand"),
    "class_weights": ("none", "balanced"),
    "batch_norm": ("train", "frozen"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "input_cache": ("auto", "memory", "disk", "none"),
    "stem": ("auto", "standard", "small"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "image_size": (16, 1024),
    "resize_size": (0, 2048),
    "learning_rate": (1e-6, 10.0),
    "backbone_lr_scale": (0.0, 1.0),
    "layer_decay": (0.1, 1.0),
    "batch_size": (1, 8192),
    "accumulation_steps": (1, 256),
    "epochs": (1, 1000),
    "probe_epochs": (1, 1000),
    "probe_learning_rate": (1e-6, 10.0),
    "momentum": (0.0, 0.9999),
    "weight_decay": (0.0, 1.0),
    "gradient_clip_norm": (0.0, 1000.0),
    "label_smoothing": (0.0, 0.5),
    "mixup_alpha": (0.0, 10.0),
    "cutmix_alpha": (0.0, 10.0),
    "ema_decay": (0.0, 0.99999),
    "warmup_epochs": (0.0, 100.0),
    "random_resized_crop_min_scale": (0.05, 1.0),
    "feature_views": (1, 64),
    "early_stopping_patience": (0, 1000),
    "checkpoint_interval_s": (0, 86_400),
    "seed": (0, 2**31 - 1),
    "num_workers": (0, 64),
    "debug_interval": (1, 100_000),
    "profile_steps": (0, 1000),
    "debug_eval_interval": (1, 1000),
}


@dataclass(frozen=True)
class TrainingConfig:
    """Hyperparameters of one training. Defaults are those of the recipe ``head``; see RECIPE_DEFAULTS for the others."""

    recipe: str = "head"
    """head: linear layer on cached features; finetune: all weights from a pretrained start; lp-ft: the head first, on cached
    features, then all weights (Kumar et al., 2022, arXiv:2202.10054), half way where that is better; scratch: all weights from
    random."""
    backbone: str = "mobilenet_v2"
    """A torchvision classification builder, or ``auto``: recognised from the weights in the channel ``pretrained``."""
    pretrained: str = "torchvision"
    """torchvision: its default weights, downloaded; channel: the one file of the channel ``pretrained``; scratch uses none."""
    image_size: int = 224
    """Side in pixels of the square that the network sees."""
    resize_size: int = 0
    """Short side before the centre crop; 0 chooses it from image_size (see serving.default_resize_size)."""
    learning_rate: float = 0.03
    """Peak rate of the head under SGD; one range, 0.01 to 0.1, suits every recipe. The backbone gets backbone_lr_scale times it,
    AdamW optimizer.ADAMW_LR_SCALE times it."""
    backbone_lr_scale: float = 0.02
    """Learning rate of the pretrained weights over that of the head; scratch uses 1."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a block of the backbone to the one below it (BEiT, Bao et al., 2021); 1 is none."""
    batch_size: int = 64
    """Pictures per step of the optimiser, over all processes and accumulation steps."""
    accumulation_steps: int = 1
    """Forward and backward passes per step: the batch is cut into so many parts, for models too large for the memory."""
    epochs: int = 30
    probe_epochs: int = 30
    """Epochs of the linear probe that lp-ft begins with."""
    probe_learning_rate: float = 0.03
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gradient_clip_norm: float = 0.0
    """Largest 2-norm of all gradients together; 0 switches clipping off."""
    label_smoothing: float = 0.1
    class_weights: str = "none"
    """balanced: the loss of a class is weighted with the inverse of its share of the training pictures."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up before the cosine; may be a fraction."""
    horizontal_flip: bool = True
    random_resized_crop_min_scale: float = 0.35
    """Smallest share of the picture's area that a random crop keeps; 1 switches random crops off."""
    augmentation: str = "none"
    """trivial: TrivialAugment, wide (Müller and Hutter, 2021); rand: RandAugment, 2 of magnitude 9 (Cubuk et al., 2020)."""
    mixup_alpha: float = 0.0
    """Beta distribution of mixup (Zhang et al., 2018); 0 switches it off. With cutmix too, each batch takes one of the two."""
    cutmix_alpha: float = 0.0
    """Beta distribution of cutmix (Yun et al., 2019); 0 switches it off."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights that is judged and kept; 0 switches it off."""
    batch_norm: str = "train"
    """frozen (default of finetune and lp-ft): running statistics stay those of the pretrained backbone, with which the head was
    found; train suits pictures unlike the backbone's, and large batches."""
    feature_views: int = 4
    """Views of each training picture in the cached features: the first is the plain one, the others are augmented."""
    precision: str = "auto"
    """auto times a few steps of fp32 and bf16 and keeps the faster one; fp16 scales the loss and needs a GPU."""
    compile: bool = False
    """torch.compile the network; the first steps take tens of seconds longer."""
    stem: str = "auto"
    """small: 3x3 stride-1 first convolution without pooling (ResNets, pictures up to 64 px); auto is standard."""
    early_stopping_patience: int = 0
    """Epochs without a better valid top1 before training stops; 0 never stops."""
    checkpoint_interval_s: int = 60
    """Seconds between checkpoints inside an epoch; the end of each epoch is saved in any case. 0 saves after every step."""
    seed: int = 0
    num_workers: int = 0
    """Threads that decode and crop; 0 chooses by measurement."""
    input_cache: str = "auto"
    """Where decoded training pictures are kept: memory (of the GPU where they fit), disk, or none (decoded from the shards in
    every epoch); auto takes the first that fits."""
    debug_interval: int = 10
    """Steps of training between saved tensors; at least one step an epoch and at most 500 of a training are saved."""
    profile_steps: int = 5
    """Steps under torch.profiler, after the first ten; 0 profiles none."""
    debug_eval_interval: int = 1
    """Evaluations between saved figures of the validation split."""
    debug_layers: str = ""
    """Regular expression of the layers that are followed (weights, gradients, activations); empty follows 12, spread over depth."""
    stop_rules: str = ""
    """Rules, separated by commas, that end the training when they fire (see docs/debugging.md); empty: none does."""

    def stopping(self) -> list[str]:
        """The names in ``stop_rules``."""
        return [name.strip() for name in self.stop_rules.split(",") if name.strip()]


RECIPE_DEFAULTS: dict[str, dict[str, object]] = {
    "head": {},
    "finetune": {"epochs": 10, "weight_decay": 1e-4, "batch_norm": "frozen"},
    "lp-ft": {"epochs": 10, "weight_decay": 1e-4, "batch_norm": "frozen"},
    "scratch": {
        "epochs": 8,
        "backbone": "resnet18",
        "pretrained": "none",
        "backbone_lr_scale": 1.0,
        "image_size": 32,
        "horizontal_flip": False,
        "random_resized_crop_min_scale": 0.8,
        "label_smoothing": 0.05,
    },
}
"""What a recipe changes when the user does not give the field."""

CACHED_FEATURES = ("head", "lp-ft")
"""Recipes that read the channel ``features``."""

WATCHING = ("debug_interval", "debug_eval_interval", "debug_layers", "stop_rules")
"""Fields that change what is seen of a training, not the training."""


def parse_flags(argv: Sequence[str]) -> dict[str, str]:
    """``--name value`` or ``--name=value`` pairs. Raises ConfigError for anything else or a name given twice."""
    flags: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}: give flags as --name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            try:
                value = next(words)
            except StopIteration:
                raise ConfigError(f"--{name} has no value: give it as --{name} value") from None
        if name in flags:
            raise ConfigError(f"--{name} is given twice: {flags[name]!r} and {value!r}; keep one")
        flags[name] = value
    return flags


def parse_value(name: str, text: str, kind: type) -> object:
    """``text`` as bool, int, float or str. Raises ConfigError naming the field, the value and what was expected."""
    try:
        if kind is bool:
            lowered = text.strip().lower()
            if lowered not in _TRUE | _FALSE:
                raise ValueError
            return lowered in _TRUE
        if kind is int:
            number = float(text)  # a tuner may write 64 as 64.0
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            return float(text)
    except (ValueError, OverflowError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{name}={text!r} is not {expected}") from None
    return text.strip()


def _check(config: TrainingConfig) -> None:
    for name, value in asdict(config).items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(_CHOICES[name])}")
        if name in _RANGES:
            low, high = _RANGES[name]
            if not low <= float(value) <= high:
                raise ConfigError(f"{name}={value} is outside {low:g} to {high:g}: choose a value in that range")
    if config.recipe != "scratch" and config.pretrained == "none":
        raise ConfigError(
            f"recipe={config.recipe} needs pretrained weights: set pretrained to torchvision or channel, or recipe to scratch"
        )
    if config.resize_size and config.resize_size < config.image_size:
        raise ConfigError(f"resize_size={config.resize_size} is smaller than image_size={config.image_size}: raise it or use 0")
    if config.batch_size % config.accumulation_steps:
        raise ConfigError(
            f"batch_size={config.batch_size} is not a multiple of accumulation_steps={config.accumulation_steps}: choose one"
        )
    if config.recipe == "scratch" and config.batch_norm == "frozen":
        raise ConfigError(
            "batch_norm=frozen keeps the statistics of a pretrained backbone: use batch_norm=train with recipe=scratch"
        )
    known = (*TRAINING_RULES, *PROFILER_RULES)
    for rule in config.stopping():
        if rule not in known:
            raise ConfigError(f"stop_rules: there is no rule {rule!r}: known are {', '.join(known)}")
    try:
        re.compile(config.debug_layers)
    except re.error as problem:
        raise ConfigError(f"debug_layers={config.debug_layers!r} is no regular expression ({problem}): correct it") from None
    if config.stem == "small" and not config.backbone.startswith("resnet"):
        raise ConfigError(f"stem=small fits ResNets only, not backbone={config.backbone}: use stem=auto")


def from_mapping(values: Mapping[str, str]) -> TrainingConfig:
    """A checked configuration from strings. Raises ConfigError for unknown names and bad values."""
    kinds = typing.get_type_hints(TrainingConfig)
    for name in values:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(kinds))}"
            raise ConfigError(f"unknown hyperparameter {name!r}: {hint}")
    recipe = values.get("recipe", TrainingConfig.recipe)
    parsed = {name: parse_value(name, text, kinds[name]) for name, text in values.items()}
    changed = {**RECIPE_DEFAULTS.get(recipe, {}), **parsed}
    config = replace(TrainingConfig(), **typing.cast(dict[str, typing.Any], changed))
    _check(config)
    return config


def parse(argv: Sequence[str]) -> TrainingConfig:
    """The configuration from a command line."""
    return from_mapping(parse_flags(argv))


T = typing.TypeVar("T")


def parse_dataclass(cls: type[T], argv: Sequence[str]) -> T:
    """Fill a dataclass from flags; fields without a default are required. Raises ConfigError."""
    kinds = typing.get_type_hints(cls)
    flags = parse_flags(argv)
    unknown = sorted(set(flags) - set(kinds))
    if unknown:
        raise ConfigError(f"unknown flag --{unknown[0]}: known are {', '.join('--' + name for name in kinds)}")
    parsed = {name: parse_value(name, text, kinds[name]) for name, text in flags.items()}
    try:
        return cls(**parsed)
    except TypeError:
        missing = [f"--{field.name}" for field in fields(cls) if field.name not in parsed]  # type: ignore[arg-type]
        raise ConfigError(f"missing flags: one of {', '.join(missing)} is required and not given") from None
