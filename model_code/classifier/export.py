"""The model artifact of a training: weights.safetensors, model.onnx, head.npy and model.json. The evaluation adds the rest."""

from __future__ import annotations

import io
import json
import logging
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from classifier.errors import UserError
from classifier.feature_maps import with_feature_map
from classifier.forms import FEATURES
from classifier.served_model import HEAD, ServedModel, sha256
from classifier.training import Setup

OPSET = 18
TOLERANCE = 1e-3
"""Largest difference between torch's and ONNX Runtime's logits, relative to the largest logit."""


def write_onnx(network: nn.Module, image_size: int, path: Path, outputs: list[str]) -> None:
    """Opset 18, fp32, dynamic batch, weights inside the file; ``outputs`` names what the network answers."""
    network = network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    sample = torch.zeros(2, 3, image_size, image_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # The exporter talks on stdout, where only metrics belong, and warns about its own internals.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (sample,),
            dynamo=True,
            input_names=["input"],
            output_names=outputs,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            verbose=False,
        )
        if program is None:
            raise RuntimeError("the ONNX exporter returned nothing")
        program.save(str(path), external_data=False)


def _write_network(network: nn.Module, image_size: int, folder: Path) -> str:
    """model.onnx, and where its last layer makes class activation maps head.npy; ``cam`` or ``occlusion``."""
    mapped = with_feature_map(network.eval())
    if mapped is None:
        write_onnx(network, image_size, folder / "model.onnx", ["logits"])
        return "occlusion"
    whole, head = mapped
    write_onnx(whole, image_size, folder / "model.onnx", ["logits", FEATURES])
    np.save(folder / HEAD, head.weight.detach().numpy().astype(np.float32))
    return "cam"


def verify_onnx(network: nn.Module, folder: Path, image_size: int) -> float:
    """Largest relative difference of logits between torch and ONNX Runtime. Raises UserError beyond TOLERANCE."""
    batch = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network.eval()(batch).numpy()
    served = ServedModel(folder, threads=torch.get_num_threads())
    worst = 0.0
    for rows in (1, 3):
        difference = np.abs(served.logits(batch[:rows].numpy()) - expected[:rows]).max()
        worst = max(worst, float(difference / max(1.0, np.abs(expected).max())))
    if worst > TOLERANCE:
        raise UserError(f"the ONNX model differs from torch by {worst:.2g}, more than {TOLERANCE:g}: choose another backbone")
    return worst


def versions() -> dict[str, str]:
    """Versions of what made the model."""
    import onnxruntime
    import PIL
    import torchvision

    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def export(setup: Setup, network: nn.Module, history: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Write the artifact into ``folder``; returns model.json's content."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    network = network.cpu()  # exported and compared where it will serve
    save_file({key: value.detach().contiguous() for key, value in network.state_dict().items()}, folder / "weights.safetensors")
    explanation = _write_network(network, setup.preprocessing.image_size, folder)
    description: dict[str, Any] = {
        "format": 2,
        "architecture": setup.config.backbone,
        "stem": "small" if setup.config.stem == "small" else "standard",
        "num_classes": setup.info.num_classes,
        "classes": setup.info.classes,
        "labels": setup.info.labels,
        "preprocessing": setup.preprocessing.to_json(),
        "temperature": 1.0,
        "dataset_hash": setup.info.hash,
        "hyperparameters": asdict(setup.config),
        "precision": setup.precision,
        "valid_top1": history[-1]["best_valid_top1"] if history else None,
        "history": history,
        "versions": versions(),
        "onnx": {"opset": OPSET},
        "form": "onnxruntime-fp32",
        "explanation": explanation,
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.suffix != ".json"},
    }
    path = folder / "model.json"
    path.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    description["onnx"]["difference"] = verify_onnx(network, folder, setup.preprocessing.image_size)
    path.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return description
