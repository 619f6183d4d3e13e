"""smdebug in our own jobs: the hook of the training and the rules of the report.

smdebug is unmaintained; what it needs today sits in ``prepare_smdebug``. It must run under
``PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python`` (the jobs' environment sets that).
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from classifier.errors import DataError
from classifier.findings import Finding
from classifier.profiling import StepTimeline

REDUCTIONS = ["min", "max", "mean", "std", "l2"]
MAX_LAYERS = 12
"""Layers whose weights, gradients and activations are followed: enough to see where a signal dies, small to store."""


def prepare_smdebug() -> None:
    """Make smdebug 1.0.34 work with today's numpy. Raises RuntimeError when protobuf's C++ implementation is loaded."""
    from google.protobuf.internal import api_implementation  # type: ignore[import-untyped]

    if api_implementation.Type() != "python":
        raise RuntimeError("smdebug needs PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python in the environment before Python starts")
    logging.getLogger("smdebug").setLevel(logging.ERROR)
    os.environ.setdefault("SMDEBUG_LOG_LEVEL", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its generated code and its regular expressions are of another age
        from smdebug.core import writer
        from smdebug.core.tfevent import summary, util

        if not hasattr(np.ndarray, "tostring"):
            for module in (util, summary, writer):  # those that bind the name
                if hasattr(module, "make_tensor_proto"):
                    module.make_tensor_proto = _make_tensor_proto
        import smdebug.pytorch
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


def _followed(network: nn.Module) -> list[str]:
    """Names of at most MAX_LAYERS layers with weights, spread over the depth, first and last included."""
    found = [name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    if len(found) <= MAX_LAYERS:
        return found
    return [found[round(i * (len(found) - 1) / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]


class HookObserver:
    """Feeds the smdebug hook: the loss, reductions of followed weights and gradients, and the share of zeros after ReLUs.

    Implements ``engine.Observer``; step phases go on to the timeline.
    """

    def __init__(self, folder: Path, interval: int, timeline: StepTimeline) -> None:
        prepare_smdebug()
        from smdebug import modes
        from smdebug.pytorch import Hook, ReductionConfig, SaveConfig, SaveConfigMode

        shutil.rmtree(folder, ignore_errors=True)  # smdebug refuses a folder that exists; a resumed job starts a new one
        config = SaveConfig(
            mode_save_configs={modes.TRAIN: SaveConfigMode(save_interval=interval), modes.EVAL: SaveConfigMode(save_interval=10**6)}
        )
        self._modes, self._timeline = modes, timeline
        self.hook = Hook(
            out_dir=str(folder),
            save_config=config,
            reduction_config=ReductionConfig(reductions=REDUCTIONS[:-1], norms=["l2"]),
            include_collections=["losses", "layers", "activations"],
        )
        self.hook.get_collection("activations").include(r"^relu_zero_share/")
        self.hook.get_collection("activations").reduction_config = ReductionConfig(reductions=["mean"])

    def watch(self, network: nn.Module, loss_function: nn.Module) -> None:
        """Attach the hook to the network and its loss."""
        names = "|".join(name.replace(".", r"\.") for name in _followed(network))
        self.hook.get_collection("layers").include(rf"^(gradient/)?[A-Za-z0-9]+_({names})\.weight$")
        self.hook.register_module(network)
        self.hook.register_loss(loss_function)
        self._watch_relus(network)

    def _watch_relus(self, network: nn.Module) -> None:
        kinds = (nn.ReLU, nn.ReLU6)
        relus = [(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]
        for name, module in relus[:: max(1, len(relus) // MAX_LAYERS)]:
            module.register_forward_hook(self._zero_share(f"relu_zero_share/{name}"))

    def _zero_share(self, tag: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if module.training and self.hook._get_collections_to_save_for_step():
                self.hook.record_tensor_value(tag, (output.detach() == 0).float().mean())

        return record

    def mark(self, phase: str) -> None:
        """Pass the end of a phase to the timeline."""
        self._timeline.mark(phase)

    def mode(self, name: str) -> None:
        """Tell the hook whether train or eval steps follow."""
        self.hook.set_mode(self._modes.TRAIN if name == "train" else self._modes.EVAL)
        self._timeline.mode(name)

    @staticmethod
    def bare(network: nn.Module) -> nn.Module:
        """The network without the hooks, for export."""
        for module in network.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return network

    def close(self) -> None:
        """Flush the last step and mark the end of training, so that readers do not wait for more."""
        self.hook.close()
        self._timeline.close()


def _rule_class() -> Any:
    """A smdebug Rule whose judgement of a step is a plain function; built late because smdebug is imported late."""
    from smdebug.rules.rule import Rule

    class StepRule(Rule):  # type: ignore[misc]
        def __init__(self, trial: Any, judge: Callable[[Any, int], str | None]) -> None:
            super().__init__(trial, action_str="")
            self.judge, self.found = judge, dict[int, str]()

        def invoke_at_step(self, step: int) -> bool:
            detail = self.judge(self.base_trial, step)
            if detail:
                self.found[step] = detail
            return bool(detail)

    return StepRule


T = TypeVar("T")


def _value(trial: Any, name: str, step: int, reduction: str | None = None) -> float | None:
    tensor = trial.tensor(name)
    if not tensor.has_step(step) if hasattr(tensor, "has_step") else step not in tensor.steps():
        return None
    found = tensor.reduction_value(step, reduction) if reduction else tensor.value(step)
    return None if found is None else float(np.asarray(found).mean())


def _judge_tensors(
    pattern: str, reduction: str | None, bad: Callable[[float], bool], text: str
) -> Callable[[Any, int], str | None]:
    def judge(trial: Any, step: int) -> str | None:
        hits = []
        for name in trial.tensor_names(step=step, regex=pattern):
            value = _value(trial, name, step, reduction)
            if value is not None and bad(value):
                hits.append(name)
        return f"{text}: {', '.join(hits[:3])}" if hits else None

    return judge


def _initial_weights(trial: Any, step: int) -> str | None:
    names = [name for name in trial.tensor_names(step=step, regex=r"\.weight$") if not name.startswith("gradient/")]
    if step != 0 or not names:
        return None
    still = [name for name in names if (_value(trial, name, step, "std") or 0.0) < 1e-6 and not name.endswith("linear.weight")]
    return f"weights without variance at step 0: {', '.join(still[:3])}" if still else None


_GRADIENTS = r"^gradient/"
_TENSOR_RULES: list[tuple[str, Callable[[Any, int], str | None], str]] = [
    (
        "VanishingGradient",
        _judge_tensors(_GRADIENTS, "l2", lambda v: v < 1e-9, "gradients below 1e-9"),
        "raise the learning rate, use a residual backbone, or check that the layer is trained",
    ),
    (
        "ExplodingTensor",
        _judge_tensors(_GRADIENTS, "l2", lambda v: not np.isfinite(v) or v > 1e4, "gradients above 1e4 or not finite"),
        "lower the learning rate or lengthen the warm-up",
    ),
    (
        "DeadRelu",
        _judge_tensors(r"^relu_zero_share/", "mean", lambda v: v > 0.97, "more than 97 % zeros after a ReLU"),
        "lower the learning rate or use another activation",
    ),
    ("PoorWeightInitialization", _initial_weights, "initialise the layers at random"),
]


def _trial(folder: Path) -> Any:
    """smdebug's reader of saved tensors. Raises DataError where there are none: smdebug would wait for them for ever."""
    from smdebug.trials import create_trial

    if not any((folder / "collections").rglob("*.json")):
        raise DataError(f"{folder} holds no saved tensors")
    return create_trial(str(folder))


def tensor_rules(folder: Path) -> list[Finding]:
    """Run the rules on saved tensors with smdebug's ``create_trial`` and ``invoke_rule``."""
    prepare_smdebug()
    from smdebug.rules.rule_invoker import invoke_rule

    trial = _trial(folder)
    trial.training_ended = True  # never wait for more steps
    steps = trial.steps()
    if not steps:
        return [Finding(name, False, "no tensors were saved") for name, _, _ in _TENSOR_RULES]
    kind, findings = _rule_class(), []
    for name, judge, remedy in _TENSOR_RULES:
        rule = kind(trial, judge)
        for step in steps:
            invoke_rule(rule, start_step=step, end_step=step + 1)
        bad = sorted(rule.found)
        # The first steps of a training are rough; a rule fires when a twentieth of the saved steps are bad.
        fired = len(bad) > max(0, 0.05 * len(steps)) if name != "PoorWeightInitialization" else bool(bad)
        detail = rule.found[bad[-1]] if fired else f"{len(steps)} saved steps looked right"
        findings.append(Finding(name, fired, detail, remedy if fired else "", bad))
    return findings


def loss_series(folder: Path) -> list[tuple[int, float]]:
    """``(step, loss)`` of the saved training steps."""
    prepare_smdebug()
    trial = _trial(folder)
    names = [name for name in trial.tensor_names(collection="losses") if name.endswith("output_0")]
    if not names:
        return []
    return [(step, value) for step in trial.steps() if (value := _value(trial, names[0], step)) is not None]


def history_rules(history: list[dict[str, Any]], class_counts: list[int]) -> list[Finding]:
    """Rules on the epochs' figures and the class balance."""
    findings = [_loss_not_decreasing(history), _overfit(history), _overtraining(history)]
    smallest, largest = (min(class_counts), max(class_counts)) if class_counts else (0, 0)
    uneven = largest > 5 * max(smallest, 1)
    detail = f"training pictures per class: {smallest} to {largest}"
    findings.append(Finding("ClassImbalance", uneven, detail, "add pictures to the small classes" if uneven else ""))
    return findings


def _loss_not_decreasing(history: list[dict[str, Any]]) -> Finding:
    losses = [row["train_loss"] for row in history]
    fired = len(losses) >= 2 and min(losses[1:]) > 0.99 * losses[0]
    detail = f"training loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "no epochs"
    return Finding("LossNotDecreasing", fired, detail, "change the learning rate; check the labels" if fired else "")


def _overfit(history: list[dict[str, Any]]) -> Finding:
    if not history:
        return Finding("Overfit", False, "no epochs")
    last = history[-1]
    gap = last["train_top1"] - last["valid_top1"]
    fired = gap > 0.15
    detail = f"train top1 {last['train_top1']:.3f}, valid top1 {last['valid_top1']:.3f}"
    return Finding("Overfit", fired, detail, "more pictures, stronger augmentation, more weight decay" if fired else "")


def _overtraining(history: list[dict[str, Any]]) -> Finding:
    if not history:
        return Finding("Overtraining", False, "no epochs")
    best = max(range(len(history)), key=lambda i: history[i]["valid_top1"])
    late = len(history) - 1 - best
    worse = history[best]["valid_top1"] - history[-1]["valid_top1"]
    fired = late >= 3 and worse > 0.02
    detail = f"best valid top1 in epoch {best + 1} of {len(history)}; the last is {worse:.3f} lower"
    return Finding("Overtraining", fired, detail, "fewer epochs or early_stopping_patience" if fired else "")
