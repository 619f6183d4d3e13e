"""The plain weights in torch, on a GPU where there is one: for the serving image with torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from classifier import model
from classifier.feature_maps import with_feature_map
from classifier.forms import FEATURES
from classifier.serving import Floats


class TorchEngine:
    """See ``forms.Engine``. Safe to call from several threads; a GPU runs one batch after the other."""

    def __init__(self, folder: Path, precision: str) -> None:
        """``precision``: fp32 or bf16 (autocast)."""
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        small = description["stem"] == "small"
        network = model.build(description["architecture"], int(description["num_classes"]), small_stem=small)
        network.load_state_dict(load_file(folder / "weights.safetensors"))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        mapped = with_feature_map(network.eval())
        self._has_map = mapped is not None
        whole = mapped[0] if mapped else network
        self._network = whole.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(self, batch: Floats, outputs: Sequence[str]) -> list[Floats]:
        """See ``forms.Engine``."""
        autocast = torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._dtype is torch.bfloat16)
        with torch.inference_mode(), autocast:
            answered = self._network(torch.from_numpy(batch).to(self._device, memory_format=torch.channels_last))
        parts = dict(zip(("logits", FEATURES), answered if self._has_map else (answered,), strict=False))
        return [np.ascontiguousarray(parts[name].float().cpu().numpy()) for name in outputs]
