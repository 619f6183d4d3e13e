"""Benchmarks of training: `make bench-training`, or `python bench/training.py input|step|tuning|backbones|views|accuracy …`.

Each part is a section of bench/results/training.json, measured against named peers in one run:

- ``input``: pictures/s into the model, from source pictures of two sizes, against torchvision's reference loader and DALI.
- ``step``: training steps with real input against the same network on data in memory; bf16 channels_last against eager fp32.
- ``tuning``: ten trials of five epochs on cached features, against trials that pass through the backbone.
- ``backbones``: what a step of each documented backbone costs.
- ``views``: how many cached views of each training picture recipe ``head`` learns best from, judged on valid.
- ``accuracy``: every recipe on dogs-120 (needs $REAL_DATA) against torchvision's reference recipe at equal epochs and a linear
  probe. Test is read once a recipe, at its end; choose on valid.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "model_code"), str(ROOT / "bench")]

import harness  # noqa: E402
import peers  # noqa: E402
import samples  # noqa: E402

PARTS = ("input", "step", "tuning", "backbones", "views", "accuracy")
WORKERS = 2
BATCH = 64
BUILD = ROOT / "build" / "bench"
WEIGHTS = "mobilenet_v2_imagenet_b.pth"


def prepared(source: Path, name: str, size: int) -> Path:
    """A data set that prepare.py made of ``source``, kept under build/bench."""
    home = BUILD / "datasets" / name
    found = sorted(home.glob("*/dataset.json"))
    if not found:
        flags = ["--source", source.as_uri(), "--dataset_root", home.as_uri(), "--result", str(home / "result")]
        run("prepare.py", *flags, "--dataset", str(home), "--picture_size", str(size))
        found = sorted(home.glob("*/dataset.json"))
    return found[0].parent


def run(script: str, *arguments: str, **environment: str) -> str:
    """An entry point of model_code as a job runs it; what it printed. Raises RuntimeError with its last lines."""
    command = [sys.executable, str(ROOT / "model_code" / script), *arguments]
    env = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python", **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def section(name: str, **content: Any) -> None:
    """Put one section into bench/results/training.json and print its table."""
    path = harness.RESULTS / "training.json"
    whole = harness.read("training") if path.is_file() else {"name": "training", "sections": {}}
    found = harness.record(name, content.pop("cases"), **content)
    whole["sections"][name] = found
    harness.write(whole)
    print(harness.table(found), flush=True)


# --- (a) input ---------------------------------------------------------------------------------------------------------------


def ours(dataset: Path, place: str, *, normalised: bool = False) -> peers.Epoch:
    """An epoch of our loader: random crops and flips from the decoded cache or from the prepared shards."""
    from classifier import transforms
    from classifier.batches import PictureBatches
    from classifier.config import from_mapping
    from classifier.dataset import Pictures, ShardSplit, load_split, read_info, training_side
    from classifier.serving import Preprocessing

    info = read_info(dataset)
    settings = from_mapping({"recipe": "finetune", "batch_size": str(BATCH), "random_resized_crop_min_scale": "0.08"})
    held: Pictures = ShardSplit(info, "train")
    if place != "shards":
        held = load_split(info, "train", training_side(info, 224), place=place)
    preprocessing = Preprocessing.of(224)
    batches = PictureBatches(held, preprocessing, settings, train=True, workers=WORKERS)

    def epoch() -> int:
        seen = 0
        for batch in batches.epoch(0):
            seen += len(transforms.normalise(batch.inputs, preprocessing) if normalised else batch.inputs)
        return seen

    return epoch


def loaded(source: Path, dataset: Path) -> dict[str, peers.Epoch]:
    """All loaders on one source. ``train`` of the prepared set holds 70 % of the pictures: rates, not times, are compared."""
    shards = sorted((dataset / "shards").glob("train-*.tar"))
    return {
        "reference: DataLoader, Pillow, v1 transforms, source files": peers.reference_loader(source, WORKERS, BATCH),
        "DALI, source files": peers.dali_loader(source, WORKERS, BATCH),
        "DALI, prepared shards": peers.dali_shards_loader(shards, WORKERS, BATCH),
        "ours, prepared shards": ours(dataset, "shards"),
        "ours, decoded cache in memory": ours(dataset, "memory"),
        "ours, decoded cache on disk": ours(dataset, "disk"),
        "ours, decoded cache, normalised to float32": ours(dataset, "memory", normalised=True),
        "limit: decode source files only": peers.decode_only(peers.pictures_of(source), WORKERS),
    }


def bench_input(rounds: int) -> None:
    """Section ``input``."""
    import torch

    torch.set_num_threads(WORKERS)
    cases = {}
    for size in ((500, 400), (1000, 800)):
        source = samples.make(size, 1024)
        name = f"{size[0]}x{size[1]}"
        found = loaded(source, prepared(source, name, 256))
        cases[f"{size[0]}×{size[1]}"] = harness.compare(found, against=next(iter(found)), rounds=rounds, title=name)
    against = next(iter(next(iter(cases.values()))))
    section("input", cases=cases, against=against, workers=WORKERS, batch_size=BATCH)


# --- (b) step ----------------------------------------------------------------------------------------------------------------


def trainer(backbone: str, precision: str, preprocessing: Any, *, channels_last: bool = True) -> Any:
    """A network with its optimiser, as a fine-tuning has them."""
    import torch
    from classifier import engine, model
    from classifier.config import from_mapping
    from torch import nn

    torch.manual_seed(0)
    network = model.build(backbone, 120)
    if not channels_last:
        network = network.to(memory_format=torch.contiguous_format)
    settings = from_mapping({"recipe": "finetune", "backbone": backbone, "precision": precision})
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return engine.Trainer(network, settings, preprocessing, precision, loss, 120, 1000)


def steps(made: Any, batches: Callable[[], Iterator[Any]], count: int) -> peers.Epoch:
    """``count`` steps on batches from an iterator that is asked anew in every round."""
    from classifier.engine import Silent

    def epoch() -> int:
        made.train_mode()
        seen = 0
        for number, batch in enumerate(batches()):
            made.step(batch, 0, number, Silent())
            seen += len(batch.labels)
            if number + 1 == count:
                break
        return seen

    return epoch


def bench_step(rounds: int, count: int) -> None:
    """Section ``step``: batches of 32 pictures, 224 px."""
    import torch
    from classifier.batches import Batch, PictureBatches
    from classifier.config import from_mapping
    from classifier.dataset import load_split, read_info, training_side
    from classifier.serving import Preprocessing

    torch.set_num_threads(WORKERS)
    info = read_info(prepared(samples.make((500, 400), 1024), "500x400", 256))
    preprocessing = Preprocessing.of(224)
    settings = from_mapping({"recipe": "finetune", "batch_size": "32"})
    split = load_split(info, "train", training_side(info, 224))
    real = PictureBatches(split, preprocessing, settings, train=True, workers=WORKERS)
    first = next(real.epoch(0))
    held = Batch(first.inputs.clone(), first.labels.clone(), first.total)

    def in_memory() -> Iterator[Any]:
        while True:
            yield held

    cases = {}
    for backbone in ("mobilenet_v2", "resnet18"):
        fast = trainer(backbone, "bf16", preprocessing)
        slow = trainer(backbone, "fp32", preprocessing, channels_last=False)
        found = {
            "data in memory, bf16 channels_last": steps(fast, in_memory, count),
            "real input, bf16 channels_last": steps(fast, lambda: real.epoch(0), count),
            "data in memory, eager fp32": steps(slow, in_memory, count),
        }
        cases[backbone] = harness.compare(found, against=next(iter(found)), rounds=rounds, title=backbone)
    section("step", cases=cases, against="data in memory, bf16 channels_last", batch_size=32, image_size=224, steps=count)


# --- (c) tuning --------------------------------------------------------------------------------------------------------------


def bench_tuning(trials: int = 10, epochs: int = 5) -> None:
    """Section ``tuning``: ResNet-18, about 1,400 training pictures.

    The peers pass through the backbone in every epoch of every trial: one epoch of one trial is measured and multiplied.
    """
    import torch
    from classifier import features, model, training
    from classifier.config import from_mapping
    from classifier.dataset import read_info

    source = samples.make((500, 400), 2048)
    dataset = prepared(source, "500x400-2048", 256)
    info = read_info(dataset)
    torch.set_num_threads(WORKERS)
    os.environ["SM_CHANNEL_DATASET"] = str(dataset)
    base = {"recipe": "head", "backbone": "resnet18", "pretrained": "torchvision", "batch_size": "128", "epochs": str(epochs)}
    base["feature_views"] = "1"  # one pass over the pictures, as the peers make one in each epoch
    settings = from_mapping(base)
    with tempfile.TemporaryDirectory() as work:
        torch.manual_seed(0)
        backbone = model.build("resnet18")
        model.split_head(backbone)
        started = time.perf_counter()
        with quiet():
            features.cache(info, backbone, "resnet18", settings, Path(work))
        cached_s = time.perf_counter() - started
        os.environ["SM_CHANNEL_FEATURES"] = work
        started = time.perf_counter()
        for number in range(trials):
            with quiet():
                training.fit(training.prepare_run(from_mapping({**base, "learning_rate": str(0.01 * 1.29**number)})))
        heads_s = time.perf_counter() - started
    torch.set_num_threads(WORKERS)
    ours_s = cached_s + heads_s
    through = epoch_through_backbone(dataset, "fp32", None)
    reference = epoch_through_backbone(dataset, "fp32", source)
    fast = epoch_through_backbone(dataset, "bf16", None)
    seconds = {
        "trials through the backbone, reference loader, fp32": reference * trials * epochs,
        "trials through the backbone, our loader, fp32": through * trials * epochs,
        "trials through the backbone, our loader, bf16": fast * trials * epochs,
        "features once, then heads (ours)": ours_s,
    }
    against = next(iter(seconds))
    rows = {
        name: {"median": value, "min": value, "max": value, "ratio": seconds[against] / value, "rates": [value]}
        for name, value in seconds.items()
    }
    parts = {"features": cached_s, "heads": heads_s}
    section("tuning", cases={f"{trials} trials × {epochs} epochs": rows}, against=against, unit="seconds", parts_s=parts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def epoch_through_backbone(dataset: Path, precision: str, source: Path | None) -> float:
    """Seconds of one epoch of one trial with a frozen backbone: train with crops and flips, then valid.

    With ``source``, training pictures come from the reference loader, and their time is scaled to the prepared split's number.
    """
    import torch
    from classifier import engine, model
    from classifier.batches import PictureBatches
    from classifier.config import from_mapping
    from classifier.dataset import load_split, read_info, training_side
    from classifier.precision import autocast
    from classifier.serving import Preprocessing
    from torch import nn

    info, preprocessing = read_info(dataset), Preprocessing.of(224)
    settings = replace(from_mapping({"recipe": "finetune", "batch_size": "128"}), recipe="head")
    network = model.build("resnet18", info.num_classes)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(model.head_name(network)))
    loss = nn.CrossEntropyLoss()
    made = engine.Trainer(network, settings, preprocessing, precision, loss, info.num_classes, 100)
    train = PictureBatches(
        load_split(info, "train", training_side(info, 224)), preprocessing, settings, train=True, workers=WORKERS
    )
    valid = PictureBatches(load_split(info, "valid", 224), preprocessing, settings, train=False, workers=WORKERS)
    started = time.perf_counter()
    if source is None:
        for number, batch in enumerate(train.epoch(0)):
            made.step(batch, 0, number, engine.Silent())
        seconds = time.perf_counter() - started
    else:
        seen = 0
        for inputs, labels in peers.reference_batches(source, WORKERS, 128):
            with autocast(precision):
                outputs = made.forward(inputs)
            loss(outputs.float(), labels).backward()
            made.optimizer.step()
            seen += len(labels)
            if seen >= 640:
                break
        seconds = (time.perf_counter() - started) * info.num_pictures["train"] / seen
    started = time.perf_counter()
    engine.evaluate(made, valid, observer=engine.Silent())
    torch.set_num_threads(WORKERS)
    return seconds + time.perf_counter() - started


# --- (d) accuracy ------------------------------------------------------------------------------------------------------------

EPOCHS = 4
RECIPES: dict[str, dict[str, str]] = {
    "head": {"recipe": "head", "epochs": "30", "batch_size": "128", "learning_rate": "0.03"},
    "lp-ft": {"recipe": "lp-ft", "epochs": str(EPOCHS), "learning_rate": "0.03"},
    "finetune": {"recipe": "finetune", "epochs": str(EPOCHS), "learning_rate": "0.05", "backbone_lr_scale": "0.005"},
    "scratch": {"recipe": "scratch", "pretrained": "none", "image_size": "64", "epochs": "10", "horizontal_flip": "true"},
}
"""Hyperparameters of each recipe beside its defaults; chosen on valid."""


def bench_accuracy(chosen: list[str], views: int) -> None:
    """Section ``accuracy``: dogs-120 with MobileNetV2; one row a recipe, written as soon as it is known."""
    import reference_train

    weights = samples.real_data() / "weights" / WEIGHTS
    source = samples.real_data() / "data" / "dogs-120"
    if not weights.is_file() or not source.is_dir():
        raise SystemExit(f"error: {source} and {weights} are needed; name their folder with REAL_DATA")
    dataset = prepared(source, "dogs-120", 256)
    with tempfile.TemporaryDirectory() as work:
        places = channels(dataset, weights, Path(work), views)
        for name in chosen:
            started = time.perf_counter()
            if name == "linear probe":
                row = reference_train.linear_probe(*probe_data(dataset, places))
                row["valid_top1"] = [max(row["valid_top1"].values())]
            elif name == "torchvision reference":
                row = reference_train.reference_recipe(source, weights, EPOCHS, bf16=True)
            else:
                row = our_recipe(RECIPES[name])
            keep(name, {**row, "seconds": time.perf_counter() - started})


def channels(dataset: Path, weights: Path, work: Path, views: int) -> dict[str, Path]:
    """The channels of a training job, features among them."""
    places = {"dataset": dataset, "features": work / "features", "pretrained": work / "pretrained"}
    places["pretrained"].mkdir()
    (places["pretrained"] / weights.name).symlink_to(weights)
    flags = {"pretrained": "channel", "pretrained_dir": str(places["pretrained"]), "feature_views": str(views)}
    flags |= {"dataset": str(dataset), "features": str(places["features"]), "backbone": "mobilenet_v2"}
    print(run("cache_features.py", *(part for name, value in flags.items() for part in (f"--{name}", value))).splitlines()[-2])
    os.environ.update({f"SM_CHANNEL_{name.upper()}": str(path) for name, path in places.items()})
    return places


def our_recipe(given: dict[str, str]) -> dict[str, Any]:
    """Train a recipe, then read test once: ``{"valid_top1": by epoch, "test_top1", "test_top5"}``."""
    import torch
    from classifier import engine, training
    from classifier.batches import PictureBatches
    from classifier.config import from_mapping
    from classifier.dataset import load_split

    setup = training.prepare_run(from_mapping({"backbone": "mobilenet_v2", "pretrained": "channel", **given}))
    history = training.fit(setup)
    whole = training.whole_model(setup).eval()
    preprocessing = setup.preprocessing
    test = load_split(setup.info, "test", preprocessing.resize_size)
    right1 = right5 = 0
    run_config = replace(setup.config, recipe="finetune")
    made = engine.Trainer(whole, run_config, preprocessing, "fp32", torch.nn.CrossEntropyLoss(), setup.info.num_classes, 1)
    with torch.inference_mode():
        for batch in PictureBatches(test, preprocessing, setup.config, train=False).epoch(0):
            inputs, labels = made.inputs(batch)
            best = whole(inputs).topk(5, dim=1).indices
            right1 += int((best[:, 0] == labels).sum())
            right5 += int((best == labels[:, None]).sum())
    return {
        "valid_top1": [row["valid_top1"] for row in history],
        "best_valid_top1": history[-1]["best_valid_top1"],  # lp-ft's mix with its probe among them
        "train_loss": [row["train_loss"] for row in history],
        "test_top1": right1 / len(test),
        "test_top5": right5 / len(test),
        "hyperparameters": given,
    }


VIEWS = (1, 2, 4, 6, 8)
SEEDS = 5


def bench_views() -> None:
    """Section ``views``: recipe head on the first K of 8 cached views, valid top1 over seeds; test is not read."""
    import numpy as np
    from classifier import training
    from classifier.config import from_mapping

    weights = samples.real_data() / "weights" / WEIGHTS
    dataset = prepared(samples.real_data() / "data" / "dogs-120", "dogs-120", 256)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        places = channels(dataset, weights, Path(work), max(VIEWS))
        all_views = np.load(places["features"] / "train.npy")
        for count in VIEWS:
            np.save(places["features"] / "train.npy", all_views[:count])
            found = []
            for seed in range(SEEDS):
                given = {"backbone": "mobilenet_v2", "pretrained": "channel", **RECIPES["head"], "seed": str(seed)}
                history = training.fit(training.prepare_run(from_mapping(given)))
                found.append(max(row["valid_top1"] for row in history))
            rows.append([count, float(np.mean(found)), float(np.std(found, ddof=1))])
            print(rows[-1], flush=True)
    rows_section("views", ["views", "valid top1 (mean of 5 seeds)", "standard deviation"], rows)


def probe_data(dataset: Path, places: dict[str, Path]) -> list[Any]:
    """Features and labels of train, valid and test (plain views) for the linear probe."""
    import numpy as np
    import torch
    from classifier import features, model
    from classifier.config import from_mapping
    from classifier.dataset import ShardSplit, read_info
    from classifier.serving import Preprocessing
    from safetensors.torch import load_file

    found: list[Any] = []
    for split in ("train", "valid"):
        views, labels = features.load(places["features"], split)
        found += [views[0].float().numpy(), labels]
    network = model.build("mobilenet_v2")
    model.split_head(network)
    network.load_state_dict(load_file(places["features"] / "backbone.safetensors"))
    info, settings = read_info(dataset), from_mapping({"backbone": "mobilenet_v2"})
    held = ShardSplit(info, "test")
    torch.set_num_threads(WORKERS)
    batches = features.ViewBatches(held, Preprocessing.of(224), settings, augmented=False)
    rows = [part.float().numpy() for _, part in features.extract(network.eval(), batches, 0, "bf16", "test")]
    return [*found, np.concatenate(rows), held.labels]


def keep(name: str, row: dict[str, Any]) -> None:
    """Put one recipe's figures into the section, and draw the curves anew."""
    path = harness.RESULTS / "training.json"
    whole = harness.read("training") if path.is_file() else {"name": "training", "sections": {}}
    rows = whole["sections"].get("accuracy", {}).get("recipes", {})
    rows[name] = row
    columns = ["recipe", "epochs", "best valid top1", "test top1", "test top5", "seconds"]
    cells = [
        [
            key,
            len(r["valid_top1"]),
            r.get("best_valid_top1", max(r["valid_top1"])),
            r["test_top1"],
            r.get("test_top5"),
            r["seconds"],
        ]
        for key, r in rows.items()
    ]
    whole["sections"]["accuracy"] = {**harness.plain(columns, cells), "recipes": rows}
    harness.write(whole)
    curves(rows)
    best = row.get("best_valid_top1", max(row["valid_top1"]))
    print(f"{name}: valid_top1={best:.4f} test_top1={row['test_top1']:.4f} seconds={row['seconds']:.0f}", flush=True)


def curves(rows: dict[str, Any]) -> None:
    """docs/img/recipes.svg: valid top1 of every recipe over its epochs."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "recipes"  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(8, 4.2))
    marks = iter("osv^DPX*")
    for name, row in rows.items():
        values = row["valid_top1"]
        label, mark = f"{name} (test {row['test_top1']:.3f})", next(marks)
        if len(values) == 1:
            axes.axhline(values[0], linestyle=":", color="black", label=label)
        else:
            axes.plot(range(1, len(values) + 1), values, marker=mark, markersize=4, label=label)
    axes.set(xlabel="epoch", ylabel="valid top1", ylim=(0, 1), title="dogs-120, MobileNetV2")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "img" / "recipes.svg", metadata={"Date": None})


# --- (e) backbones -----------------------------------------------------------------------------------------------------------

BACKBONES = ("mobilenet_v2", "resnet18", "resnet50", "convnext_tiny", "efficientnet_v2_s", "swin_t", "vit_b_16")


def bench_backbones(count: int) -> None:
    """Section ``backbones``: what a step costs, beside torchvision's published accuracy; data in memory, batch 16."""
    import torch
    from classifier.batches import Batch
    from classifier.serving import Preprocessing
    from torchvision import models

    torch.set_num_threads(WORKERS)
    inputs = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    batch = Batch(inputs, torch.randint(0, 120, (16,)), 16)
    rows = []
    for backbone in BACKBONES:
        meta = models.get_model_weights(backbone).DEFAULT.meta
        made = trainer(backbone, "bf16", Preprocessing.of(224))
        steps(made, lambda: iter([batch] * 1), 1)()  # the first step is slower
        started = time.perf_counter()
        seen = steps(made, lambda: iter([batch] * count), count)()
        pace = seen / (time.perf_counter() - started)
        rows.append([backbone, meta["num_params"] / 1e6, meta["_ops"], meta["_metrics"]["ImageNet-1K"]["acc@1"], pace])
        print(rows[-1], flush=True)
    columns = ["backbone", "million weights", "GMACs", "ImageNet top1, % (published)", "training, pictures/s"]
    rows_section("backbones", columns, rows)


def rows_section(name: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A section that is a plain table."""
    path = harness.RESULTS / "training.json"
    whole = harness.read("training") if path.is_file() else {"name": "training", "sections": {}}
    whole["sections"][name] = harness.plain(columns, rows)
    harness.write(whole)
    print(harness.table(whole["sections"][name]), flush=True)


def main() -> None:
    """Run the parts that are named, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of input and step")
    parser.add_argument("--steps", type=int, default=6, help="steps a round")
    parser.add_argument("--views", type=int, default=4, help="views in the cached features (default: the best of views)")
    names = [*RECIPES, "torchvision reference", "linear probe"]
    parser.add_argument("--recipes", nargs="*", choices=names, default=names, help="rows of accuracy")
    flags = parser.parse_args()
    parts = flags.parts or PARTS
    if "input" in parts:
        bench_input(flags.rounds)
    if "step" in parts:
        bench_step(flags.rounds, flags.steps)
    if "tuning" in parts:
        bench_tuning()
    if "backbones" in parts:
        bench_backbones(flags.steps)
    if "views" in parts:
        bench_views()
    if "accuracy" in parts:
        bench_accuracy(flags.recipes, flags.views)


if __name__ == "__main__":
    main()
