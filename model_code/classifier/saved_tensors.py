"""The saved tensors: their names, and smdebug as their reader. Nothing here imports torch.

A saved step of training holds, in smdebug's mode TRAIN and numbered by the steps of the optimiser:

- ``CrossEntropyLoss_output_0`` (collection ``losses``), ``top1``, ``learning_rate`` (``metrics``): of this batch;
- weights ``<Network>_<parameter>`` and ``gradient/<Network>_<parameter>``, activations ``<layer>_output_0``: the reductions
  ``l2``, ``mean``, ``std`` and ``zeros`` (the share of values that are zero);
- ``update_ratio/<layer>``: 2-norm of the step's change of the weights over that of the weights before it;
- ``dead_share/<layer>``: share of a ReLU's channels that are active in less than 1 % of the sampled positions.

A saved evaluation (mode EVAL, numbered by the steps done by then, so that both curves share an axis) holds the same loss and
``top1`` on valid, ``examples`` there, and ``epoch_train_loss`` and ``epoch_train_top1`` of the epoch just trained.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from classifier.errors import DataError

LOSS, TOP1, RATE = "CrossEntropyLoss_output_0", "top1", "learning_rate"
EPOCH_LOSS, EPOCH_TOP1, EXAMPLES = "epoch_train_loss", "epoch_train_top1", "examples"
GRADIENT, RATIO, DEAD, OUTPUT = "gradient/", "update_ratio/", "dead_share/", "_output_0"


class Step(NamedTuple):
    """One saved step: what was saved whole, and the reductions of the other tensors."""

    number: int
    train: bool
    values: dict[str, float]
    reductions: dict[str, dict[str, float]]


def prepare_smdebug() -> None:
    """Make smdebug 1.0.34 work with today's numpy. Raises RuntimeError when protobuf's C++ implementation is loaded.

    smdebug is unmaintained and must run under ``PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python`` (the jobs' environment sets it).
    """
    from google.protobuf.internal import api_implementation  # type: ignore[import-untyped]

    if api_implementation.Type() != "python":
        raise RuntimeError("smdebug needs PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python in the environment before Python starts")
    os.environ.setdefault("SMDEBUG_LOG_LEVEL", "error")
    os.environ.setdefault("SMDEBUG_TRAINING_END_DELAY_REFRESH", "0")  # files are complete when they appear: no second of waiting
    logging.getLogger("smdebug").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its generated code and its regular expressions are of another age
        from smdebug.core import writer
        from smdebug.core.tfevent import summary, util

        if not hasattr(np.ndarray, "tostring"):
            for module in (util, summary, writer):  # those that bind the name
                if hasattr(module, "make_tensor_proto"):
                    module.make_tensor_proto = _make_tensor_proto
        import smdebug.rules.rule_invoker
        import smdebug.trials  # noqa: F401


def _make_tensor_proto(nparray_data: Any, tag: str) -> Any:
    """smdebug's function with ``tobytes`` for the ``tostring`` that numpy 2.4 no longer has."""
    from smdebug.core.tfevent import util

    numeric, dtype = util._get_proto_dtype(nparray_data.dtype)
    sizes = [util.TensorShapeProto.Dim(size=size, name=f"{tag}_{size}") for size in nparray_data.shape]
    shape = util.TensorShapeProto(dim=sizes)
    if numeric:
        return util.TensorProto(dtype=dtype, tensor_content=nparray_data.tobytes(), tensor_shape=shape)
    proto = util.TensorProto(tensor_shape=shape)
    proto.string_val.extend(bytes(text, encoding="utf-8") for text in nparray_data)
    return proto


def has_tensors(folder: Path) -> bool:
    """Whether a training has saved its first step under ``folder``."""
    return any((folder / "collections").rglob("*.json")) and any((folder / "index").rglob("*.json"))


def open_trial(folder: Path) -> Any:
    """smdebug's reader of saved tensors. Raises DataError where there are none: smdebug would wait for them for ever."""
    if not has_tensors(folder):
        raise DataError(f"{folder} holds no saved tensors")
    prepare_smdebug()
    from smdebug.trials import create_trial

    return create_trial(str(folder))


def _number(value: Any) -> float:
    """smdebug gives a scalar as an array of one value."""
    return float(np.asarray(value).item())


def read_step(trial: Any, number: int) -> Step:
    """Everything that was saved at the trial's global step ``number``."""
    from smdebug import modes

    mode, own = trial._global_to_mode[number]
    values: dict[str, float] = {}
    reductions: dict[str, dict[str, float]] = {}
    for name in trial.tensor_names(step=number):
        tensor = trial.tensor(name)
        found = tensor.reduction_values(number)
        if found:
            reductions[name] = {reduction: _number(value) for (reduction, _), value in found.items()}
        else:
            values[name] = _number(tensor.value(number))
    return Step(int(own), mode == modes.TRAIN, values, reductions)


def loss_series(folder: Path) -> list[tuple[int, float]]:
    """``(step, loss)`` of the saved training steps. Raises DataError where there are none."""
    trial = open_trial(folder)
    from smdebug import modes

    steps = trial.tensor(LOSS).steps(mode=modes.TRAIN)
    return [(step, _number(trial.tensor(LOSS).value(step, mode=modes.TRAIN))) for step in steps]
