"""Processing job: features of the frozen backbone for train and valid, computed once for all trials."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from classifier.config import parse_dataclass
from classifier.errors import run_entry_point


@dataclass(frozen=True)
class Flags:
    """Flags of cache_features.py."""

    dataset: str
    features: str
    backbone: str = "mobilenet_v2"
    pretrained: str = "torchvision"
    pretrained_dir: str = ""
    image_size: int = 224
    resize_size: int = 0


def main(argv: list[str]) -> None:
    """Compute and write the features."""
    flags = parse_dataclass(Flags, argv)
    from classifier import config, features, model, training
    from classifier.dataset import read_info
    from classifier.serving import Preprocessing

    names = ("backbone", "pretrained", "image_size", "resize_size")
    config.from_mapping({name: str(getattr(flags, name)) for name in names})  # the same checks as in training
    training.use_threads()
    info = read_info(Path(flags.dataset))
    folder = Path(flags.pretrained_dir) if flags.pretrained_dir else None
    network, name = model.pretrained_model(flags.backbone, flags.pretrained, folder)
    model.split_head(network)
    features.cache(info, network, name, Preprocessing.of(flags.image_size, flags.resize_size), Path(flags.features))


if __name__ == "__main__":
    run_entry_point(main)
