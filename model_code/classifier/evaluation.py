"""The test split, once, through the serving path; the calibrated artifact and everything later states read."""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classifier import metrics, storage
from classifier.dataset import DatasetInfo, cpu_count, decoded, members, read_info
from classifier.errors import DataError
from classifier.serving import Floats, OnnxModel, centre, decode, normalise, softmax

CODE = ("inference.py", "server.py", "classifier/__init__.py", "classifier/serving.py")
BATCH = 32
MAX_SMOKE = 4
ARTIFACT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class EvaluateFlags:
    """Flags of evaluate.py."""

    dataset: str
    model: str
    evaluation: str
    artifact: str
    champion_uri: str = ""
    dataset_hash: str = ""
    code_hash: str = ""
    run: str = ""
    model_uri: str = ""
    """Where ``artifact`` will be uploaded; empty derives it from champion_uri's bucket and the run."""


def unpack_model(archive: Path, folder: Path) -> Path:
    """Unpack a model.tar.gz: plain files only, bounded. Raises DataError."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            if sum(member.size for member in tar.getmembers()) > ARTIFACT_BYTES:
                raise DataError(f"{archive} unpacks to more than {ARTIFACT_BYTES:,} bytes: this is not a model artifact")
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as problem:
        raise DataError(f"{archive} is not a readable model artifact ({problem}): train again") from None
    return folder


def logits_of(model: OnnxModel, info: DatasetInfo, split: str) -> tuple[Floats, metrics.Ints]:
    """Logits ``(N, C)`` and labels ``(N,)`` of a split, in shard order. Raises DataError when pictures are missing."""
    parts: list[Floats] = []
    labels: list[int] = []
    batch: list[Any] = []
    for pixels, label in decoded(info, split, model.preprocessing.resize_size, cpu_count()):
        batch.append(centre(pixels, model.preprocessing.image_size))
        labels.append(label)
        if len(batch) == BATCH:
            parts.append(model.logits(normalise(np.stack(batch), model.preprocessing)))
            batch.clear()
    if batch:
        parts.append(model.logits(normalise(np.stack(batch), model.preprocessing)))
    if len(labels) != info.num_pictures[split]:
        raise DataError(f"split {split!r} holds {len(labels)} pictures, dataset.json says {info.num_pictures[split]}")
    return np.concatenate(parts), np.asarray(labels, dtype=np.int64)


def latency(model: OnnxModel, info: DatasetInfo, count: int = 40) -> dict[str, float]:
    """Milliseconds from stored bytes to probabilities, one picture at a time, after a warm-up."""
    times = []
    for number, (_, _, data) in enumerate(members(info, "test")):
        started = time.perf_counter()
        model.predict(decode(data))
        if number >= 3:
            times.append((time.perf_counter() - started) * 1000)
        if number >= count:
            break
    times = sorted(times) or [0.0]
    return {"p50": times[len(times) // 2], "p95": times[int(len(times) * 0.95)], "pictures": len(times)}


def champion_result(uri: str, info: DatasetInfo) -> dict[str, Any] | None:
    """The deployed model on the same test split; its top1 is None when its classes differ or it cannot be read."""
    found = storage.read_json_optional(uri) if uri else None
    if found is None:
        return None
    location = str(found.get("model_data_url") or found.get("model") or "")
    result: dict[str, Any] = {"run": found.get("run"), "top1": None, "same_classes": False}
    try:
        with tempfile.TemporaryDirectory() as work:
            archive = Path(work) / "model.tar.gz"
            storage.download(location, archive)
            model = OnnxModel(unpack_model(archive, Path(work) / "model"), threads=cpu_count())
            result["same_classes"] = model.labels == info.labels
            if result["same_classes"]:
                logits, labels = logits_of(model, info, "test")
                result["top1"] = metrics.top_k_accuracy(logits, labels, 1)
    except Exception as problem:
        # A lost champion must not stop a new model; the report says that nothing was compared.
        result["problem"] = f"{location}: {type(problem).__name__}: {problem}"[:300]
        print(f"note: the champion could not be evaluated ({result['problem']})", flush=True)
    return result


def write_smoke(model: OnnxModel, info: DatasetInfo, right: set[int], folder: Path) -> int:
    """Up to MAX_SMOKE correctly classified test pictures of different classes, with the expected labels."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen: list[dict[str, str]] = []
    used: set[int] = set()
    for number, (name, label, data) in enumerate(members(info, "test")):
        if number in right and label not in used:
            file = f"{len(chosen)}{Path(name).suffix}"
            (folder / file).write_bytes(data)
            chosen.append({"file": file, "expected": model.labels[label]})
            used.add(label)
        if len(chosen) == MAX_SMOKE:
            break
    (folder / "smoke.json").write_text(json.dumps(chosen, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(chosen)


def pack(model: Path, artifact: Path) -> None:
    """model.tar.gz with the code that serves it; the same input gives the same bytes."""
    code = Path(__file__).resolve().parent.parent
    files = [(name, model / name) for name in ("model.json", "model.onnx", "weights.safetensors")]
    files += [(f"code/{name}", code / name) for name in CODE]
    artifact.mkdir(parents=True, exist_ok=True)
    # Weights hardly compress; level 1 keeps the job short.
    with tarfile.open(artifact / "model.tar.gz", "w:gz", compresslevel=1) as tar:
        for name, path in sorted(files):
            info = tarfile.TarInfo(name)
            info.size, info.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                tar.addfile(info, file)


def _model_uri(flags: EvaluateFlags) -> str:
    return flags.model_uri.rstrip("/") or f"{flags.champion_uri.rsplit('/', 1)[0]}/models/{flags.run}"


def evaluate(flags: EvaluateFlags) -> dict[str, Any]:
    """The whole of evaluate.py; returns summary.json's content."""
    info = read_info(Path(flags.dataset))
    if flags.dataset_hash and flags.dataset_hash != info.hash:
        raise DataError(f"the channel holds data set {info.hash}, the run used {flags.dataset_hash}: give the job the same one")
    folder = Path(flags.evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        source = unpack_model(_archive(Path(flags.model)), Path(work))
        model = OnnxModel(source, threads=cpu_count())
        if model.info["classes"] != info.classes:
            raise DataError("the model's classes are not the data set's: evaluate it on the data set it was trained on")
        valid_logits, valid_labels = logits_of(model, info, "valid")
        temperature = metrics.fit_temperature(valid_logits, valid_labels)
        logits, labels = logits_of(model, info, "test")
        result = _result(logits, labels, temperature, info)
        model.temperature = temperature
        result["latency_ms"] = latency(model, info)
        result["champion"] = champion_result(flags.champion_uri, info)
        right = set(np.flatnonzero(logits.argmax(axis=1) == labels).tolist())
        result["num_smoke"] = write_smoke(model, info, right, folder / "smoke")
        _finish_model(source, model.info, result, flags)
        pack(source, Path(flags.artifact))
        # What serves and what is deployed again later outlives the run's own folder, which expires.
        shutil.copytree(folder / "smoke", Path(flags.artifact) / "smoke", dirs_exist_ok=True)
        history = source / "training.json"
        if history.is_file():
            shutil.copyfile(history, folder / "training.json")
    return _write(result, info, flags)


def _archive(folder: Path) -> Path:
    found = sorted(folder.rglob("model.tar.gz"))
    if len(found) != 1:
        raise DataError(f"{folder} holds {len(found)} files named model.tar.gz, expected one: give the training job's output")
    return found[0]


def _result(logits: Floats, labels: metrics.Ints, temperature: float, info: DatasetInfo) -> dict[str, Any]:
    table = metrics.confusion(logits.argmax(axis=1).astype(np.int64), labels, info.num_classes)
    confidence = softmax(logits, temperature)
    wrong = np.flatnonzero(logits.argmax(axis=1) != labels)
    worst = wrong[np.argsort(-confidence[wrong].max(axis=1))][:20] if len(wrong) else wrong
    return {
        "test": {
            "top1": metrics.top_k_accuracy(logits, labels, 1),
            "top5": metrics.top_k_accuracy(logits, labels, 5),
            "num_pictures": len(labels),
            "ece_before": metrics.expected_calibration_error(logits, labels),
            "ece_after": metrics.expected_calibration_error(logits, labels, temperature),
        },
        "per_class": metrics.per_class(table, info.labels),
        "confusion": table.tolist(),
        "reliability": {
            "before": metrics.reliability(logits, labels),
            "after": metrics.reliability(logits, labels, temperature),
        },
        "confident_errors": [
            {
                "expected": info.labels[labels[i]],
                "said": info.labels[int(logits[i].argmax())],
                "probability": float(confidence[i].max()),
            }
            for i in worst
        ],
        "temperature": temperature,
        "classes": info.labels,
        "folders": info.classes,
    }


def _finish_model(folder: Path, description: dict[str, Any], result: dict[str, Any], flags: EvaluateFlags) -> None:
    description = {
        **description,
        "temperature": result["temperature"],
        "top1": result["test"]["top1"],
        "top5": result["test"]["top5"],
        "run": flags.run,
        "code_hash": flags.code_hash,
    }
    (folder / "model.json").write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(result: dict[str, Any], info: DatasetInfo, flags: EvaluateFlags) -> dict[str, Any]:
    folder = Path(flags.evaluation)
    model_uri = _model_uri(flags)
    champion = result["champion"]
    summary = {
        "top1": result["test"]["top1"],
        "top5": result["test"]["top5"],
        "num_pictures": result["test"]["num_pictures"],
        "champion_top1": champion["top1"] if champion else None,
        "num_classes": info.num_classes,
        "labels_uri": f"{model_uri}/labels.json",
        "model_data_url": f"{model_uri}/model.tar.gz",
        "smoke_uri": f"{model_uri}/smoke/",
    }
    for name, value in (("evaluation.json", result), ("summary.json", summary), ("labels.json", info.labels)):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(folder / "labels.json", Path(flags.artifact) / "labels.json")
    return summary
