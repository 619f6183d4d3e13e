"""torchvision backbones: build by name, read weights, recognise an architecture, split, replace and fold the head.

Legend: D num_features, C classes. ``backbone(x)`` is ``(B, D)``; ``head`` is ``Linear(D, C)``.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifier.config import TrainingConfig
from classifier.errors import ConfigError, WeightsError

_COMMON = ("resnet18", "resnet34", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0")
_UNSUPPORTED = ("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1", "maxvit_t")
"""Auxiliary outputs or a head that is not a linear layer at the end."""


@functools.cache
def names() -> list[str]:
    """The classification builders that can be used."""
    from torchvision import models

    return [name for name in models.list_models(module=models) if name not in _UNSUPPORTED]


def check_name(name: str) -> None:
    """Raises ConfigError for a builder that does not exist or cannot be used."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3) or list(_COMMON)
        raise ConfigError(f"backbone={name!r} is not a supported torchvision model: try {', '.join(near)}")


def head_name(model: nn.Module) -> str:
    """Qualified name of the last linear layer, which is the classifier of every supported builder."""
    found = [str(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return found[-1]


def num_features(model: nn.Module) -> int:
    """D, the input width of the classifier."""
    head = model.get_submodule(head_name(model))
    if not isinstance(head, nn.Linear):
        raise WeightsError("the model has no linear classifier")
    return int(head.in_features)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place that ``name`` names."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)


def split_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Replace the classifier by the identity, so that the model gives features ``(B, D)``; returns its name and layer."""
    name = head_name(model)
    head = model.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise WeightsError(f"the classifier {name} is not linear")
    set_module(model, name, nn.Identity())
    return name, head


def channels_last(model: nn.Module) -> nn.Module:
    """The model with its convolutions in channels_last, which is faster on CPUs and GPUs alike."""
    result: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return result


def build(name: str, num_classes: int = 1000, *, small_stem: bool = False) -> nn.Module:
    """A randomly initialised model in channels_last. Raises ConfigError for unknown names."""
    from torchvision import models

    check_name(name)
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    if small_stem:
        if not name.startswith("resnet"):
            raise ConfigError(f"stem=small fits ResNets only, not backbone={name}: use stem=auto")
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return channels_last(model)


def read_state(path: Path) -> dict[str, Tensor]:
    """A flat state dict from .pth, .pt or .safetensors; wrappers such as ``state_dict`` and ``module.`` are taken off.

    Raises WeightsError. Pickles are read with ``weights_only``: code in the file does not run.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        raise WeightsError(
            f"{path.name} is not a readable state dict ({type(problem).__name__}): save model.state_dict()"
        ) from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{path.name} does not hold a state dict of tensors: save model.state_dict()")
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def find_weights(folder: Path) -> Path:
    """The one weights file of a channel. Raises WeightsError."""
    found = (
        [path for path in sorted(folder.rglob("*")) if path.suffix in (".pth", ".pt", ".safetensors")] if folder.is_dir() else []
    )
    if len(found) != 1:
        raise WeightsError(
            f"the pretrained channel holds {len(found)} weight files ({', '.join(p.name for p in found[:3]) or 'none'}): "
            "give exactly one .pth, .pt or .safetensors"
        )
    return found[0]


def _shapes(name: str) -> tuple[dict[str, tuple[int, ...]], str]:
    from torchvision import models

    with torch.device("meta"):
        model: nn.Module = models.get_model(name, weights=None)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}, head_name(model)


def _mismatch(state: Mapping[str, Tensor], name: str) -> list[str]:
    """What differs between a state dict and a builder, the classifier's own two tensors aside."""
    shapes, head = _shapes(name)
    own = {f"{head}.weight", f"{head}.bias"}
    wanted = {key for key in shapes if key not in own and not key.endswith("num_batches_tracked")}
    given = {key for key in state if key not in own and not key.endswith("num_batches_tracked")}
    problems = [f"missing {key}" for key in sorted(wanted - given)] + [f"unexpected {key}" for key in sorted(given - wanted)]
    for key in sorted(wanted & given):
        if tuple(state[key].shape) != shapes[key]:
            problems.append(f"{key} is {tuple(state[key].shape)}, expected {shapes[key]}")
    return problems


def recognise(state: Mapping[str, Tensor]) -> str:
    """The torchvision builder whose keys and shapes the state dict has. Raises WeightsError when none fits."""
    for name in [*_COMMON, *(name for name in names() if name not in _COMMON)]:
        if not _mismatch(state, name):
            return name
    first = ", ".join(list(state)[:3])
    raise WeightsError(f"the weights ({len(state)} tensors: {first}…) fit no torchvision classifier: give those of one")


def load_backbone_state(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load everything but the classifier. Raises WeightsError naming the first differences and the architecture that fits."""
    problems = _mismatch(state, name)
    if problems:
        try:
            remedy = f"they are of {recognise(state)}: set backbone to that"
        except WeightsError:
            remedy = "they fit no torchvision classifier"
        raise WeightsError(f"the weights do not fit {name} ({len(problems)} differences, first: {problems[0]}): {remedy}")
    head = head_name(model)
    own = {f"{head}.weight", f"{head}.bias"}
    kept = {key: value for key, value in state.items() if key not in own}
    model.load_state_dict(kept, strict=False)


def torchvision_state(name: str) -> dict[str, Tensor]:
    """torchvision's default weights. Raises WeightsError when they cannot be downloaded."""
    from torchvision import models

    check_name(name)
    weights = models.get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as problem:
        raise WeightsError(
            f"torchvision's weights for {name} could not be downloaded ({type(problem).__name__}: {str(problem)[:120]}): "
            "put a state dict into S3 and give it as pretrained"
        ) from None
    return state


def pretrained_model(backbone: str, pretrained: str, folder: Path | None) -> tuple[nn.Module, str]:
    """``(model with 1000 or its own outputs, builder's name)``; ``backbone`` may be ``auto`` with a channel."""
    if pretrained == "channel":
        if folder is None:
            raise WeightsError("pretrained=channel needs the channel 'pretrained' with one weights file")
        state = read_state(find_weights(folder))
        name = recognise(state) if backbone == "auto" else backbone
    elif backbone == "auto":
        raise ConfigError("backbone=auto needs pretrained=channel: name a torchvision model otherwise")
    else:
        name = backbone
        check_name(name)
        state = torchvision_state(name) if pretrained == "torchvision" else {}
    model = build(name)
    if state:
        load_backbone_state(model, state, name)
    return model, name


def fresh_model(config: TrainingConfig, num_classes: int) -> nn.Module:
    """The whole model of the recipe scratch, from random weights."""
    torch.manual_seed(config.seed)
    check_name(config.backbone)
    return build(config.backbone, num_classes, small_stem=config.stem == "small")


class StandardisedHead(nn.Module):
    """``Linear(D, C)`` on features standardised with stored mean and std ``(D,)`` and scaled to a fixed length.

    The scale makes the features' expected squared norm SQUARED_NORM whatever D is, so that one range of learning rates
    suits every backbone. ``folded`` gives the same function as one linear layer on raw features.
    """

    SQUARED_NORM = 64.0

    def __init__(self, mean: Tensor, std: Tensor, num_classes: int) -> None:
        super().__init__()
        scale = (self.SQUARED_NORM / len(mean)) ** 0.5
        self.register_buffer("mean", mean)
        self.register_buffer("factor", scale / std.clamp(min=1e-3))
        self.linear = nn.Linear(len(mean), num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, C)``."""
        return self.linear((features - self.get_buffer("mean")) * self.get_buffer("factor"))  # type: ignore[no-any-return]

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """One ``Linear(D, C)`` with the standardisation in its weights."""
        result = nn.Linear(self.linear.in_features, self.linear.out_features)
        weight = self.linear.weight * self.get_buffer("factor")
        result.weight.copy_(weight)
        result.bias.copy_(self.linear.bias - weight @ self.get_buffer("mean"))
        return result


def fold(network: nn.Module) -> nn.Module:
    """The network with its StandardisedHead, if it has one, as a plain linear layer: torchvision's own form."""
    for name, module in list(network.named_modules()):
        if isinstance(module, StandardisedHead):
            set_module(network, name, module.folded())
    return network


def main(argv: list[str]) -> None:
    """``python -m classifier.model weights.pth`` prints the architecture of a state dict."""
    if len(argv) != 1:
        raise ConfigError("usage: python -m classifier.model <weights.pth|.pt|.safetensors>")
    print(recognise(read_state(Path(argv[0]))))


if __name__ == "__main__":
    from classifier.errors import run_entry_point

    sys.dont_write_bytecode = True
    run_entry_point(main)
