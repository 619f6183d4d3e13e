"""The test split, once, through the serving path; the calibrated artifact and everything later states read.

Valid steers (temperature, latency sample); test is read once, at the end: one pass over its shards decodes and classifies every
picture and keeps its logits only. What is shown of it afterwards, smoke pictures and examples of confusions, is chosen from
those logits, and only the chosen few are read again, by their number in shard order. The champion, where there is one, makes a
pass of its own.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classifier import choosing, metrics, novelty, storage
from classifier.cpus import cpu_count
from classifier.dataset import DatasetInfo, decoded, members, read_info
from classifier.errors import DataError
from classifier.forms import FORMS
from classifier.pictures import write_thumbnail
from classifier.served_model import HEAD, ServedModel, sha256
from classifier.serving import Floats, Preprocessing, centre, normalise

CODE = (
    "inference.py",
    "server.py",
    *(f"classifier/{name}.py" for name in ("__init__", "cpus", "explaining", "forms", "novelty", "served_model", "serving")),
)
"""What the serving image holds too; the artifact carries it for whoever reads it."""
BATCH = 32
MAX_SMOKE = 4
MAX_PAIRS = 12
EXAMPLES = 3
"""Confused pictures shown of a pair; MAX_PAIRS * (EXAMPLES + 2) thumbnails at most, some 5 KB each."""
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
        with gzip.open(archive) as packed, tarfile.open(fileobj=packed, mode="r:") as tar:
            if sum(member.size for member in tar.getmembers()) > ARTIFACT_BYTES:
                raise DataError(f"{archive} unpacks to more than {ARTIFACT_BYTES:,} bytes: this is not a model artifact")
            tar.extractall(folder, filter="data")
            while packed.read(1 << 20):  # gzip's checksum stands at its end, and a tar ends before it
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise DataError(f"{archive} is not a readable model artifact ({problem}): train again") from None
    return folder


def logits_of(model: ServedModel, info: DatasetInfo, split: str) -> tuple[Floats, metrics.Ints]:
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


def chosen_members(info: DatasetInfo, split: str, numbers: Iterable[int]) -> dict[int, tuple[str, bytes]]:
    """``(member name, stored bytes)`` of some pictures by their number in shard order; the others' headers are passed over."""
    wanted, number = set(numbers), 0
    found: dict[int, tuple[str, bytes]] = {}
    for name in info.shards.get(split, []):
        if len(found) == len(wanted):
            break
        with tarfile.open(info.root / "shards" / name, "r:") as tar:
            for member in tar:
                stream = tar.extractfile(member) if number in wanted else None
                if stream is not None:
                    found[number] = member.name, stream.read()
                number += 1
    if lost := wanted - found.keys():
        raise DataError(f"pictures {sorted(lost)[:5]} of split {split!r} were classified and are gone: run the job again")
    return found


def latency(model: ServedModel, info: DatasetInfo, count: int = 40) -> dict[str, float]:
    """Milliseconds from stored bytes to probabilities, valid's pictures one at a time, after a warm-up."""
    times = []
    for number, (_, _, data) in enumerate(members(info, "valid")):
        started = time.perf_counter()
        model.predict(model.decode(data))
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
            model = ServedModel(unpack_model(archive, Path(work) / "model"), threads=cpu_count())
            result["same_classes"] = model.labels == info.labels
            if result["same_classes"]:
                logits, labels = logits_of(model, info, "test")
                result["top1"] = metrics.top_k_accuracy(logits, labels, 1)
    except Exception as problem:
        # A lost champion must not stop a new model; the report says that nothing was compared.
        result["problem"] = f"{location}: {type(problem).__name__}: {problem}"[:300]
        print(f"note: the champion could not be evaluated ({result['problem']})", flush=True)
    return result


def write_smoke(info: DatasetInfo, predicted: metrics.Ints, labels: metrics.Ints, folder: Path) -> int:
    """Up to MAX_SMOKE correctly classified test pictures of different classes, with the expected labels."""
    folder.mkdir(parents=True, exist_ok=True)
    right = np.flatnonzero(predicted == labels)
    _, first = np.unique(labels[right], return_index=True)
    numbers = np.sort(right[first])[:MAX_SMOKE].tolist()
    found = chosen_members(info, "test", numbers)
    chosen: list[dict[str, str]] = []
    for number in numbers:
        name, data = found[number]
        file = f"{len(chosen)}{Path(name).suffix}"
        (folder / file).write_bytes(data)
        chosen.append({"file": file, "expected": info.labels[labels[number]]})
    (folder / "smoke.json").write_text(json.dumps(chosen, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(chosen)


def write_pairs(
    info: DatasetInfo, table: metrics.Ints, predicted: metrics.Ints, labels: metrics.Ints, confidence: Floats, folder: Path
) -> list[dict[str, Any]]:
    """The most confused pairs for evaluation.json, with thumbnails under ``folder``/examples, most confident first.

    ``examples/<true>-<predicted>-<n>.jpg`` by class index; a class's reference, a picture that is classified right, is its own
    pair: ``examples/<class>-<class>-0.jpg``. A class with none right has none (null).
    """
    shutil.rmtree(folder / "examples", ignore_errors=True)  # of an earlier evaluation into the same folder
    files: dict[str, int] = {}

    def pick(true: int, said: int, count: int) -> list[str]:
        numbers = np.flatnonzero((labels == true) & (predicted == said))
        numbers = numbers[np.argsort(-confidence[numbers], kind="stable")[:count]]
        names = [f"examples/{true}-{said}-{n}.jpg" for n in range(len(numbers))]
        files.update(zip(names, numbers.tolist(), strict=True))
        return names

    pairs = []
    for true, said, count, share in metrics.confused_pairs(table, MAX_PAIRS):
        names = pick(true, said, EXAMPLES)
        expected_reference, said_reference = (next(iter(pick(c, c, 1)), None) for c in (true, said))
        pairs.append(
            {
                "true": true,
                "predicted": said,
                "expected": info.labels[true],
                "said": info.labels[said],
                "count": count,
                "share": share,
                "examples": [{"file": name, "probability": float(confidence[files[name]])} for name in names],
                "references": {"expected": expected_reference, "said": said_reference},
            }
        )
    found = chosen_members(info, "test", files.values())
    for name, number in files.items():
        write_thumbnail(found[number][1], folder / name)
    return pairs


def pack(model: Path, artifact: Path) -> None:
    """model.tar.gz with the code that serves it, never half of it; the same input gives the same bytes."""
    code = Path(__file__).resolve().parent.parent
    description = json.loads((model / "model.json").read_text(encoding="utf-8"))
    files = [(name, model / name) for name in ("model.json", *artifact_files(description))]
    files += [(f"code/{name}", code / name) for name in CODE]
    artifact.mkdir(parents=True, exist_ok=True)
    partial = artifact / ".model.tar.gz.partial"
    # Weights hardly compress; level 1 keeps the job short.
    with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
        for name, path in sorted(files):
            info = tarfile.TarInfo(name)
            info.size, info.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                tar.addfile(info, file)
    partial.replace(artifact / "model.tar.gz")


def artifact_files(description: dict[str, Any]) -> list[str]:
    """Names of what an artifact holds beside model.json and the code."""
    form = FORMS[description["form"]]
    names = {"weights.safetensors", form.file, FORMS[form.fallback].file}
    names |= {HEAD} if description.get("explanation") == "cam" else set()
    return sorted(names | {example["file"] for example in description["selftest"]})


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
        model, rows = _fastest(source, info)
        valid_logits, valid_labels = logits_of(model, info, "valid")
        temperature = metrics.fit_temperature(valid_logits, valid_labels)
        model.temperature = temperature
        model.info["novelty"] = {
            "temperature": temperature,
            "quantiles": novelty.quantiles(valid_logits, temperature),
        }
        speed = latency(model, info)
        logits, labels = logits_of(model, info, "test")
        result = {**_result(logits, labels, temperature, info, folder), "latency_ms": speed, "forms": rows}
        result["champion"] = champion_result(flags.champion_uri, info)
        model.info["selftest"] = write_selftest(model, folder / "smoke", source)
        _finish_model(source, model.info, result, flags)
        pack(source, Path(flags.artifact))
        # What serves and what is deployed again later outlives the run's own folder, which expires.
        shutil.copytree(folder / "smoke", Path(flags.artifact) / "smoke", dirs_exist_ok=True)
        history = source / "training.json"
        if history.is_file():
            shutil.copyfile(history, folder / "training.json")
    return _write(result, info, flags)


def _fastest(source: Path, info: DatasetInfo) -> tuple[ServedModel, list[dict[str, Any]]]:
    """The model in the form that will serve, and all forms with their figures. Writes the choice into model.json."""
    model = ServedModel(source, form=choosing.REFERENCE)
    if model.info["classes"] != info.classes:
        raise DataError("the model's classes are not the data set's: evaluate it on the data set it was trained on")
    rows = choosing.choose(source, _sample(info, model.preprocessing), model.preprocessing)
    chosen = next(row for row in rows if row["chosen"])["form"]
    for row in rows:
        print(f"form {row['form']}: {_figures(row)}{' <- serves' if row['chosen'] else ''}", flush=True)
    _write_description(source, {**model.info, "form": chosen, "forms": rows})
    return ServedModel(source, cpu_count(), chosen), rows


def _figures(row: dict[str, Any]) -> str:
    if row["batch1_ms"] is None or row["valid_top1"] is None:
        return str(row["refused"])
    figures = f"{row['batch1_ms']:.2f} ms a picture, valid_top1={row['valid_top1']:.4f}, agreement={row['agreement']:.4f}"
    return f"{figures} ({row['refused']})" if row["refused"] else figures


def _sample(info: DatasetInfo, preprocessing: Preprocessing) -> choosing.Sample:
    """Validation pictures, evenly left out where they would take too much memory."""
    every = choosing.stride(info.num_pictures["valid"], preprocessing.image_size)
    squares, labels = [], []
    for number, (pixels, label) in enumerate(decoded(info, "valid", preprocessing.resize_size, cpu_count())):
        if number % every == 0:
            squares.append(centre(pixels, preprocessing.image_size).copy())
            labels.append(label)
    return choosing.Sample(np.stack(squares), np.asarray(labels, dtype=np.int64))


def write_selftest(model: ServedModel, smoke: Path, folder: Path) -> list[dict[str, Any]]:
    """The smoke pictures, with what the model says of them, into the artifact: a server starts only if it says so too."""
    (folder / "selftest").mkdir()
    found = []
    for example in json.loads((smoke / "smoke.json").read_text(encoding="utf-8")):
        name = f"selftest/{example['file']}"
        data = (smoke / example["file"]).read_bytes()
        chances = model.predict(model.decode(data))
        best = int(chances.argmax())
        (folder / name).write_bytes(data)
        found.append({"file": name, "label": model.labels[best], "probability": round(float(chances[best]), 4)})
    return found


def _archive(folder: Path) -> Path:
    found = sorted(folder.rglob("model.tar.gz"))
    if len(found) != 1:
        raise DataError(f"{folder} holds {len(found)} files named model.tar.gz, expected one: give the training job's output")
    return found[0]


def _result(logits: Floats, labels: metrics.Ints, temperature: float, info: DatasetInfo, folder: Path) -> dict[str, Any]:
    """evaluation.json; its pictures are written under ``folder``."""
    predicted = logits.argmax(axis=1).astype(np.int64)
    confidence = metrics.confidences(logits, temperature)
    table = metrics.confusion(predicted, labels, info.num_classes)
    rows = metrics.per_class(table, info.labels)
    return {
        "test": _test(logits, labels, temperature),
        "macro": metrics.macro(rows),
        "per_class": rows,
        "confusion": table.tolist(),
        "confused_pairs": write_pairs(info, table, predicted, labels, confidence, folder),
        "reliability": {
            "before": metrics.reliability(logits, labels),
            "after": metrics.reliability(logits, labels, temperature),
        },
        "confident_errors": _confident_errors(predicted, labels, confidence, info.labels),
        "temperature": temperature,
        "classes": info.labels,
        "folders": info.classes,
        "num_smoke": write_smoke(info, predicted, labels, folder / "smoke"),
    }


def _test(logits: Floats, labels: metrics.Ints, temperature: float) -> dict[str, Any]:
    top1, top5 = (metrics.in_top_k(logits, labels, k) for k in (1, 5))
    return {
        "top1": float(top1.mean()),
        "top1_interval": metrics.bootstrap_interval(top1),
        "top5": float(top5.mean()),
        # With five classes or fewer nothing can be wrong: that is known, not sampled.
        "top5_interval": metrics.bootstrap_interval(top5) if logits.shape[1] > 5 else (1.0, 1.0),
        "num_pictures": len(labels),
        "ece_before": metrics.expected_calibration_error(logits, labels),
        "ece_after": metrics.expected_calibration_error(logits, labels, temperature),
    }


def _confident_errors(predicted: metrics.Ints, labels: metrics.Ints, confidence: Floats, names: list[str]) -> list[dict[str, Any]]:
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:20]
    return [{"expected": names[labels[i]], "said": names[predicted[i]], "probability": float(confidence[i])} for i in worst]


def _finish_model(folder: Path, description: dict[str, Any], result: dict[str, Any], flags: EvaluateFlags) -> None:
    description = {
        **description,
        "temperature": result["temperature"],
        "top1": result["test"]["top1"],
        "top5": result["test"]["top5"],
        "run": flags.run,
        "code_hash": flags.code_hash,
        "sha256": {name: sha256(folder / name) for name in artifact_files(description)},
    }
    _write_description(folder, description)


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    (folder / "model.json").write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(result: dict[str, Any], info: DatasetInfo, flags: EvaluateFlags) -> dict[str, Any]:
    folder = Path(flags.evaluation)
    model_uri = _model_uri(flags)
    champion = result["champion"]
    summary = {
        "top1": result["test"]["top1"],
        "top1_low": result["test"]["top1_interval"][0],
        "top1_high": result["test"]["top1_interval"][1],
        "top5": result["test"]["top5"],
        "ece": result["test"]["ece_after"],
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
