"""The input pipeline: same pixels as serving, seeded choices, batches that do not depend on threads or on where they start."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier import dataset, distributed, serving, transforms
from classifier.batches import Batch, DeviceBatches, FeatureBatches, Order, PictureBatches, choose_workers
from classifier.config import TrainingConfig
from classifier.errors import DataError
from classifier.serving import Preprocessing
from hypothesis import given
from hypothesis import strategies as st
from model_fakes import config, picture, prepared
from PIL import Image


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> dataset.DatasetInfo:
    return dataset.read_info(prepared(tmp_path_factory.mktemp("dataset")))


def photo(size: tuple[int, int] = (90, 70)) -> bytes:
    """A smooth JPEG: noise would make every resampling look different."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = np.stack([np.sin(6 * x + 3 * y), np.cos(5 * y), x * y], axis=-1)
    out = io.BytesIO()
    Image.fromarray((127 + 120 * waves).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


@pytest.mark.parametrize("data", [photo(), picture(3, kind="JPEG"), picture(4, kind="PNG")], ids=["photo", "noise", "png"])
def test_the_fast_decoder_gives_the_pixels_that_serving_sees(data: bytes):
    assert np.array_equal(dataset.decode_stored(data), np.asarray(serving.decode(data)))


@pytest.mark.parametrize(("size", "resize"), [(32, 32), (28, 33), (24, 40)])
def test_evaluation_batches_are_what_serving_computes(info: dataset.DatasetInfo, size: int, resize: int):
    preprocessing = Preprocessing(size, resize)
    data = [stored for _, _, stored in dataset.members(info, "valid")]
    expected = np.concatenate([serving.preprocess(serving.decode(stored), preprocessing) for stored in data])
    settings = config(image_size=size, resize_size=resize)
    for pictures in (dataset.load_split(info, "valid", resize), dataset.ShardSplit(info, "valid")):
        batches = list(PictureBatches(pictures, preprocessing, settings, train=False).epoch(0))
        found = torch.cat([transforms.normalise(batch.inputs, preprocessing) for batch in batches])
        assert all(batch.inputs.dtype == torch.uint8 for batch in batches)
        assert np.abs(found.numpy() - expected).max() < 1e-5
        assert torch.cat([batch.labels for batch in batches]).tolist() == pictures.labels.tolist()


def batches_of(info: dataset.DatasetInfo, workers: int, place: str = "memory", **changes: object) -> PictureBatches:
    settings = config(horizontal_flip=True, random_resized_crop_min_scale=0.3, **changes)
    pictures = dataset.ShardSplit(info, "train") if place == "shards" else dataset.load_split(info, "train", 32, 1, place)
    return PictureBatches(pictures, Preprocessing.of(32), settings, train=True, workers=workers)


def same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels) and a.total == b.total for a, b in pairs)


@pytest.mark.parametrize("augmentation", ["none", "trivial", "rand"])
def test_training_batches_depend_on_seed_epoch_and_step_alone(info: dataset.DatasetInfo, augmentation: str):
    reference = list(batches_of(info, 1, augmentation=augmentation).epoch(2))
    assert len(reference) == 3
    assert sum(len(batch.labels) for batch in reference) == 24
    for workers, place in ((3, "memory"), (2, "disk"), (2, "shards")):
        again = batches_of(info, workers, place, augmentation=augmentation)
        assert same(list(again.epoch(2)), reference), (workers, place)
        assert same(list(again.epoch(2, start=1)), reference[1:]), (workers, place)
        assert not same(list(again.epoch(3)), reference)
    assert not same(list(batches_of(info, 1, augmentation=augmentation, seed=5).epoch(2)), reference)


def test_the_parts_of_several_processes_make_up_the_batch_of_one(info: dataset.DatasetInfo, monkeypatch: pytest.MonkeyPatch):
    whole = list(batches_of(info, 2).epoch(1))
    parts = []
    for rank in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "size", lambda: 3)
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(list(batches_of(info, 2).epoch(1)))
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].inputs for part in parts]), batch.inputs)
        assert {part[step].total for part in parts} == {len(batch.labels)}


def test_a_gpu_cuts_the_same_crops_as_the_threads():
    """The device's path, here on the CPU: same boxes and flips, another resampling."""
    squares = np.stack([serving.to_square(serving.decode(photo((70 + n, 64))), 64) for n in range(6)])
    split = dataset.DecodedSplit(squares, np.arange(6))
    settings = config(batch_size=6, image_size=48, horizontal_flip=True, random_resized_crop_min_scale=0.4)
    on_threads = next(PictureBatches(split, Preprocessing.of(48), settings, train=True).epoch(0))
    on_device = next(DeviceBatches(split, settings, torch.device("cpu")).epoch(0))
    assert on_device.labels.tolist() == on_threads.labels.tolist()
    assert on_device.inputs.shape == on_threads.inputs.shape == (6, 3, 48, 48)
    difference = (on_device.inputs.float() - on_threads.inputs.float()).abs()
    assert difference.mean() < 2.0
    assert (on_device.inputs.float() - on_threads.inputs.flip(-1).float()).abs().mean() > 10  # the check would see a wrong flip


@pytest.mark.parametrize("augmentation", ["trivial", "rand"])
def test_operations_are_alike_on_pictures_and_on_tensors(augmentation: str):
    kinds = transforms.space(config(augmentation=augmentation, image_size=48))
    assert kinds is not None
    square = serving.to_square(serving.decode(photo()), 48)
    tensor = torch.from_numpy(square).permute(2, 0, 1)
    changed = 0
    for operation in transforms.OPERATIONS:
        for magnitude in (-15, 15):
            on_pillow = np.asarray(transforms.operate(Image.fromarray(square), operation, magnitude, kinds)).astype(float)
            on_tensor = transforms.operate(tensor[None], operation, magnitude, kinds)[0].permute(1, 2, 0).numpy().astype(float)
            assert np.abs(on_pillow - on_tensor).mean() < 4, operation
            changed += bool(np.abs(on_pillow - square).mean() > 0.5)
    assert changed >= 20


def test_operations_in_groups_are_those_of_each_picture():
    settings = config(augmentation="trivial", image_size=48, random_resized_crop_min_scale=1.0, batch_size=40)
    squares = np.stack([serving.to_square(serving.decode(photo((50 + n, 48))), 48) for n in range(40)])
    choices = transforms.draw(40, settings, 0, 0)
    batch = transforms.batch_on_device(torch.from_numpy(squares), choices, settings)
    kinds = transforms.space(settings)
    assert kinds is not None
    for number in range(40):
        operation, magnitude = transforms.OPERATIONS[choices.operations[number, 0]], int(choices.magnitudes[number, 0])
        plain = torch.from_numpy(squares[number]).permute(2, 0, 1)[None]
        assert torch.equal(transforms.operate(plain, operation, magnitude, kinds)[0], batch[number]), operation


@given(st.integers(0, 2**31 - 1), st.integers(0, 1000), st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_crops_stay_inside_the_picture_and_keep_their_share(seed: int, epoch: int, step: int, smallest: float):
    settings = TrainingConfig(seed=seed, random_resized_crop_min_scale=smallest)
    left, top, width, height = transforms.draw(16, settings, epoch, step).boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 1 + 1e-9).all()
    assert (top + height <= 1 + 1e-9).all()
    # An extreme aspect is cut at the edge, as in torchvision's fallback: by a third at most.
    assert (width * height >= smallest * 0.65).all()


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 9))
def test_every_epoch_sees_every_example_once(count: int, size: int, epoch: int):
    order = Order(count, size, 3, train=True)
    seen = np.concatenate([index for _, index in order.chunks(epoch, 0)])
    assert len(set(seen.tolist())) == len(seen) >= count - 1
    assert len(order) == len(list(order.chunks(epoch, 0)))


def test_mixing_keeps_probabilities_and_mixes_pictures_as_much_as_labels():
    inputs = torch.zeros(8, 3, 32, 32)
    inputs[4:] = 1.0  # class 1 is white
    labels = torch.tensor([0] * 4 + [1] * 4)
    targets = torch.nn.functional.one_hot(labels, 2).float()
    for changes in ({"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
        for step in range(20):
            mixed, soft = transforms.mix(inputs, targets, config(**changes), 0, step)
            assert torch.allclose(soft.sum(dim=1), torch.ones(8))
            assert torch.allclose(mixed.mean(dim=(1, 2, 3)), soft[:, 1], atol=1e-5)  # as white as the label says
    plain, hard = transforms.mix(inputs, targets, config(), 0, 0)
    assert plain is inputs
    assert hard is targets


def test_features_are_drawn_from_all_views_in_training_and_from_the_first_in_evaluation():
    views = torch.stack([torch.full((50, 2), float(number)) for number in range(4)]).to(torch.float16)
    labels = np.arange(50) % 5
    seen = torch.cat([batch.inputs[:, 0] for batch in FeatureBatches(views, labels, config(), train=True).epoch(0)])
    assert set(seen.tolist()) == {0.0, 1.0, 2.0, 3.0}
    judged = next(FeatureBatches(views, labels, config(), train=False).epoch(0))
    assert judged.inputs.dtype == torch.float32
    assert set(judged.inputs[:, 0].tolist()) == {0.0}


def test_threads_are_chosen_by_measurement(info: dataset.DatasetInfo):
    batches = batches_of(info, 1)
    paces = choose_workers(batches, 3, seconds=0.05)
    assert set(paces) == {1, 2, 3}
    assert paces[batches.workers] >= 0.95 * max(paces.values())


def test_a_cache_goes_where_it_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset, "available_memory", lambda: 4000)
    free = dataset.shutil.disk_usage(dataset.tempfile.gettempdir()).free
    assert dataset.choose_place(1000, "auto") == "memory"
    assert dataset.choose_place(1001, "auto") == "disk"
    assert dataset.choose_place(free, "auto") == "shards"
    assert [dataset.choose_place(1, wanted) for wanted in ("memory", "disk", "none")] == ["memory", "disk", "shards"]


def test_shards_that_do_not_hold_what_they_should_are_refused(info: dataset.DatasetInfo):
    from dataclasses import replace

    short = replace(info, num_pictures={**info.num_pictures, "train": 25})
    for read in (lambda: dataset.ShardSplit(short, "train"), lambda: dataset.load_split(short, "train", 32)):
        with pytest.raises(DataError, match="holds 24 pictures"):
            read()


def test_training_crops_from_what_is_stored(info: dataset.DatasetInfo):
    assert dataset.training_side(info, 16) == 32
    assert dataset.training_side(info, 32) == 32
    assert dataset.training_side(info, 224) == 224
    assert Path(info.root).is_dir()
