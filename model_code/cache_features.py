"""Processing job: features of the frozen backbone for train and valid, computed once for all trials."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
    feature_views: int = 4
    horizontal_flip: bool = True
    random_resized_crop_min_scale: float = 0.35
    seed: int = 0


def main(argv: list[str]) -> None:
    """Compute and write the features."""
    flags = parse_dataclass(Flags, argv)
    from classifier import config, features, model, training
    from classifier.dataset import read_info

    places = ("dataset", "features", "pretrained_dir")
    values = {name: str(value) for name, value in asdict(flags).items() if name not in places}
    settings = config.from_mapping(values)  # the same checks as in training
    training.use_cpus()
    info = read_info(Path(flags.dataset))
    folder = Path(flags.pretrained_dir) if flags.pretrained_dir else None
    network, name = model.pretrained_model(flags.backbone, flags.pretrained, folder)
    model.split_head(network)
    features.cache(info, network.to(training.device()), name, settings, Path(flags.features))


if __name__ == "__main__":
    run_entry_point(main)
