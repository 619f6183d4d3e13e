"""What the peers with eager torch share: the model, and a picture's way into it (torchvision's transforms)."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import models, transforms

STEPS = transforms.Compose(
    [
        transforms.Resize(224),
        transforms.CenterCrop(224),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


class Eager:
    """The network of ``$BENCH_MODEL`` in fp32, one thread a process or as many as ``$BENCH_THREADS`` says."""

    def __init__(self) -> None:
        folder = Path(os.environ["BENCH_MODEL"])
        torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "1")))
        description = json.loads((folder / "model.json").read_text())
        self.labels = description["labels"]
        self.network = models.get_model(description["architecture"], num_classes=len(self.labels)).eval()
        self.network.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))

    def answer(self, body: bytes) -> dict[str, Any]:
        """A picture's five likeliest classes."""
        with torch.inference_mode():
            batch = STEPS(Image.open(io.BytesIO(body)).convert("RGB"))[None]
            values, indices = self.network(batch).softmax(1)[0].topk(5)
        best = zip(values.tolist(), indices.tolist(), strict=True)
        return {"predictions": [{"label": self.labels[index], "probability": value} for value, index in best]}
