"""Which form of a model serves, what it says beside classes, and that a broken one never serves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
import torch
from classifier import choosing, export, feature_maps, forms, novelty, serving
from classifier.served_model import ModelError, ServedModel, choose_form
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving_fakes import COLOURS, SIZE, colour, write_model, write_onnx
from torch import nn
from torchvision import models

PREPROCESSING = serving.Preprocessing.of(SIZE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def changed(model: Path, **changes: Any) -> ServedModel:
    description = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**description, **changes}))
    return ServedModel(model)


# --- choosing --------------------------------------------------------------------------------------------------------------


def test_a_cpu_without_the_instructions_runs_fp32_of_the_same_runtime():
    info = {"form": "openvino-int8"}
    assert choose_form(info, frozenset({"avx2", "avx512_vnni"})).name == "openvino-int8"
    assert choose_form(info, frozenset({"avx2"})).name == "openvino-fp32"
    assert choose_form({"form": "onnxruntime-int8"}, frozenset()).name == "onnxruntime-fp32"
    assert choose_form({}, frozenset()).name == "onnxruntime-fp32"
    assert choose_form(info, frozenset(), "onnxruntime-fp32").name == "onnxruntime-fp32"
    with pytest.raises(ModelError, match="'tflite' is not known: expected one of onnxruntime-fp32"):
        choose_form(info, frozenset(), "tflite")


def test_cpu_flags_are_linuxs(tmp_path: Path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert forms.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "avx512_vnni"}
    assert forms.cpu_flags(tmp_path / "none") == frozenset()


@pytest.fixture
def sample() -> choosing.Sample:
    """Noisy pictures of the three colours."""
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    squares = generator.integers(0, 90, (60, SIZE, SIZE, 3), dtype=np.uint8)
    squares[np.arange(60), :, :, labels] += 100
    return choosing.Sample(squares, labels.astype(np.int64))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "TIMED_S", 0.01)


def test_all_forms_are_timed_and_checked_and_the_fastest_good_one_is_chosen(tmp_path: Path, sample: choosing.Sample):
    write_onnx(tmp_path / "model.onnx")
    rows = choosing.choose(tmp_path, sample, PREPROCESSING)
    assert [row["form"] for row in rows] == [name for name in forms.FORMS if not name.startswith("torch")]
    able = [row for row in rows if not row["refused"]]
    assert {"onnxruntime-fp32", "openvino-fp32"} <= {row["form"] for row in able}
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["batch1_ms"] == min(row["batch1_ms"] for row in able)
    assert all(row["valid_top1"] == 1.0 and row["agreement"] == 1.0 for row in able)
    assert (tmp_path / "model.int8.onnx").is_file()


def test_a_form_that_loses_accuracy_or_this_cpu_cannot_run_is_refused(
    tmp_path: Path, sample: choosing.Sample, monkeypatch: pytest.MonkeyPatch
):
    write_onnx(tmp_path / "model.onnx")

    def spoiled(source: Path, target: Path, *_: Any) -> None:
        write_onnx(target, weights=np.roll(np.eye(3, dtype=np.float32), 1, axis=0))

    monkeypatch.setattr(choosing, "quantise", spoiled)
    monkeypatch.setattr(forms, "cpu_flags", lambda: frozenset({"avx512_vnni"}))
    rows = {row["form"]: row for row in choosing.choose(tmp_path, sample, PREPROCESSING)}
    assert "loses 100.0 points of top1 on valid" in rows["onnxruntime-int8"]["refused"]
    assert rows["openvino-bf16"]["refused"] == "this CPU has none of avx512_bf16, amx_bf16"
    assert rows["openvino-bf16"]["batch1_ms"] is None
    assert sum(row["chosen"] for row in rows.values()) == 1


def test_a_network_that_cannot_be_quantised_serves_in_fp32(
    tmp_path: Path, sample: choosing.Sample, monkeypatch: pytest.MonkeyPatch
):
    write_onnx(tmp_path / "model.onnx")

    def fails(*_: Any) -> None:
        raise RuntimeError("operator Foo is not supported")

    monkeypatch.setattr(choosing, "quantise", fails)
    rows = {row["form"]: row for row in choosing.choose(tmp_path, sample, PREPROCESSING)}
    assert "operator Foo is not supported" in rows["openvino-int8"]["refused"]
    assert next(row for row in rows.values() if row["chosen"])["form"] in ("onnxruntime-fp32", "openvino-fp32", "openvino-bf16")


@pytest.mark.parametrize("form", ["onnxruntime-fp32", "openvino-fp32"])
def test_the_runtimes_agree(model: Path, form: str):
    served = ServedModel(model, form=form)
    for name in COLOURS:
        expected = ServedModel(model).classify(serving.decode(colour(name)))
        assert np.abs(served.classify(serving.decode(colour(name))) - expected).max() < 1e-4


def test_torch_gives_what_the_exported_network_gives(tmp_path: Path, one_thread: None):
    """What the serving image for GPUs runs, here on the CPU."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = models.resnet18(num_classes=3).eval()
    folder = write_model(tmp_path / "model", architecture="resnet18", stem="standard", num_classes=3, selftest=[])
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "weights.safetensors")
    export._write_network(network, SIZE, folder)
    batch = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
    expected = ServedModel(folder).logits(batch)
    served = ServedModel(folder, form="torch-fp32")
    assert np.abs(served.logits(batch) - expected).max() < 1e-4
    assert np.abs(ServedModel(folder, form="torch-bf16").logits(batch) - expected).max() < 0.2
    png, label, _ = served.explain(serving.decode(colour("red")))
    assert png.startswith(b"\x89PNG")
    assert label in (0, 1, 2)
    served.self_test(60_000)


# --- heat maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_the_class_activation_map_sums_up_to_the_logits(name: str, tmp_path: Path, one_thread: None):
    torch.manual_seed(0)
    network = models.get_model(name, num_classes=5).eval()
    found = feature_maps.with_feature_map(network)
    assert found is not None
    whole, head = found
    picture = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits, features = whole(picture)
        assert torch.allclose(logits, network(picture), atol=1e-5)
        per_place = torch.einsum("cd,bdhw->bchw", head.weight, features)
        assert torch.allclose(per_place.mean((2, 3)) + head.bias, logits, atol=1e-3)


@pytest.mark.parametrize("name", ["vit_b_16", "mobilenet_v3_small", "convnext_tiny"])
def test_other_networks_have_no_such_map(name: str):
    with torch.device("meta"):
        assert feature_maps.with_feature_map(models.get_model(name)) is None
    assert feature_maps.with_feature_map(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) is None


def test_an_exported_network_answers_its_map(tmp_path: Path, one_thread: None):
    network = models.resnet18(num_classes=3).eval()
    assert export._write_network(network, SIZE, tmp_path) == "cam"
    engine = forms.load(forms.FORMS["onnxruntime-fp32"], tmp_path, 1)
    logits, features = engine.run(np.zeros((2, 3, SIZE, SIZE), dtype=np.float32), ["logits", "features"])
    head = np.load(tmp_path / "head.npy", allow_pickle=False)
    bias = network.fc.bias.detach().numpy()
    assert np.abs(features.mean((2, 3)) @ head.T + bias - logits).max() < 1e-3


@pytest.mark.parametrize("explanation", ["cam", "occlusion"])
def test_the_map_is_bright_where_the_class_is(model: Path, explanation: str):
    served = changed(model, explanation=explanation)
    pixels = np.full((SIZE, SIZE, 3), 110, dtype=np.uint8)
    pixels[:, : SIZE // 2] = COLOURS["green"]  # green on the left only
    content, label, probability = served.explain(Image.fromarray(pixels), 1)
    shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.float32)
    assert shown.shape == (448, 448, 3)
    plain = np.asarray(Image.fromarray(pixels).resize((448, 448), Image.Resampling.BILINEAR), dtype=np.float32)
    change = np.abs(shown - plain).mean(axis=2)
    assert change[:, :180].mean() > 3 * change[:, 268:].mean()
    assert (served.labels[label], probability > 0.3) == ("green", True)


# --- novelty ---------------------------------------------------------------------------------------------------------------


def test_novelty_is_a_rank_among_the_validation_pictures():
    generator = np.random.default_rng(0)
    known = generator.normal(0, 1, (500, 10)).astype(np.float32)
    known[np.arange(500), np.arange(500) % 10] += 8
    kept = novelty.quantiles(known, 1.5)
    ranks = novelty.novelty(known, 1.5, kept)
    assert 0 <= min(ranks) <= max(ranks) <= 1
    assert np.mean(ranks) == pytest.approx(0.5, abs=0.02)
    strange = novelty.novelty(generator.normal(0, 1, (100, 10)).astype(np.float32), 1.5, kept)
    assert np.mean(np.asarray(strange) > 0.99) > 0.9


# --- the self-test ---------------------------------------------------------------------------------------------------------


def test_a_model_that_says_what_the_evaluation_said_may_serve(model: Path):
    ServedModel(model).self_test(5000)
    changed(model, selftest=[]).self_test(5000)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda m: write_onnx(m / "model.onnx", weights=np.roll(np.eye(3, dtype=np.float32) * 4, 1, axis=0)), "was classified as"),
        (lambda m: write_onnx(m / "model.onnx", weights=np.eye(3, dtype=np.float32) * 0.01), "the evaluation said green"),
        (lambda m: write_onnx(m / "model.onnx", weights=np.full((3, 3), np.nan, dtype=np.float32)), "was classified as"),
        (lambda m: (m / "model.onnx").write_bytes(b"no model"), "could not be loaded"),
        (lambda m: (m / "model.onnx").unlink(), "is missing"),
        (lambda m: (m / "model.json").write_text("{"), "is damaged"),
    ],
    ids=["other labels", "unsure", "not a number", "corrupt", "no file", "no description"],
)
def test_a_broken_model_never_serves(model: Path, spoil: Any, named: str):
    spoil(model)
    with pytest.raises(ModelError, match=named):
        ServedModel(model).self_test(5000)


def test_a_slow_model_never_serves(model: Path):
    with pytest.raises(ModelError, match=r"more than 0: choose a smaller backbone"):
        ServedModel(model).self_test(0)


# --- one preprocessing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "CMYK"), ("PNG", "I;16"), ("PNG", "LA"), ("PNG", "P"), ("WEBP", "RGB")],
)
def test_a_posted_picture_gets_the_logits_of_training_and_evaluation(model: Path, tmp_path: Path, kind: str, mode: str):
    from classifier.dataset import _decode_one

    noise = np.random.default_rng(1).integers(0, 255, (150, 210, 3), dtype=np.uint8)  # large enough for a JPEG to be scaled
    picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    out = io.BytesIO()
    options = {"exif": Image.Exif()} if kind == "JPEG" and mode == "RGB" else {}
    if options:
        options["exif"][0x0112] = 6  # to be turned
    picture.save(out, kind, **options)
    served = ServedModel(model)
    posted = served.classify(served.decode(out.getvalue()))
    square, _ = _decode_one(out.getvalue(), 0, PREPROCESSING.resize_size)
    evaluated = served.logits(serving.normalise(serving.centre(square, SIZE)[None], PREPROCESSING))
    assert np.abs(posted - evaluated).max() < 1e-4


def smooth(width: int, height: int) -> Image.Image:
    few = np.random.default_rng(2).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def test_a_large_jpeg_comes_smaller_and_upright_and_looks_the_same():
    out, lossless = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    smooth(1600, 1200).save(out, "JPEG", exif=exif)
    smooth(1600, 1200).save(lossless, "PNG")
    small, whole = serving.decode(out.getvalue(), 100), serving.decode(out.getvalue())
    assert (small.size, whole.size) == ((300, 400), (1200, 1600))
    difference = serving.to_square(small, 100).astype(int) - serving.to_square(whole, 100)
    assert np.abs(difference).mean() < 1.0
    assert serving.decode(lossless.getvalue(), 100).size == (1600, 1200)
    assert serving.decode(out.getvalue(), 601).size == (1200, 1600)  # less than twice as large: nothing to gain


def test_the_server_decodes_no_more_pixels_than_the_network_needs(model: Path, monkeypatch: pytest.MonkeyPatch):
    service, sizes, square = server.Service(str(model)), list[tuple[int, int]](), ServedModel.square
    service.load()
    monkeypatch.setattr(ServedModel, "square", lambda model, picture: sizes.append(picture.size) or square(model, picture))
    out = io.BytesIO()
    smooth(1600, 1200).save(out, "JPEG")
    assert service.one(out.getvalue(), server.Parameters())["predictions"]
    service.explanation(out.getvalue(), server.Parameters(explain=True))
    assert sizes == [(200, 150)] * 2


@given(size=st.integers(1, 40), beyond=st.integers(0, 20), factor=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_square_is_the_middle_of_the_resized_picture(size: int, beyond: int, factor: int):
    picture = smooth(size * factor, (size + 2 * beyond) * factor)
    expected = np.asarray(serving.resize_short_side(picture, size))[beyond : beyond + size]
    if beyond <= 3 * size:  # much longer pictures are cut by resize_short_side
        assert np.abs(serving.to_square(picture, size).astype(int) - expected).max() <= 1


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_square_favours_no_side(width: int, height: int, size: int):
    picture = smooth(width, height)
    square = serving.to_square(picture, size)
    assert square.shape == (size, size, 3)
    if size != min(width, height):  # else pixels are kept as they are, and the middle may lie between two
        turned = serving.to_square(picture.transpose(Image.Transpose.ROTATE_180), size)[::-1, ::-1]
        assert np.abs(square.astype(int) - turned).max() <= 1
