"""The smdebug hook: what the training saves of itself while it runs, for smdebug's readers and the rules.

smdebug's own module hooks run Python code for every layer in every step, and its reductions are slow. Here nothing runs in a step
that is not saved; in one that is, a few torch calls reduce the followed tensors, and one transfer brings all figures to the CPU.
"""

from __future__ import annotations

import atexit
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classifier import profiling, saved_tensors
from classifier.config import TrainingConfig
from classifier.engine import Position, Result, Trainer
from classifier.errors import ConfigError
from classifier.profiling import StepTimeline

MAX_LAYERS = 12
"""Layers that are followed: enough to see where a signal dies, cheap to reduce and to store."""
MAX_SAVES = 500
"""A long training saves at most so many steps, spread evenly: a step is two objects in S3 and some 170 figures."""
FREE_SAVES = 20
"""So many saves are always made: short trainings need them for the rules."""
MAX_SHARE = 0.015
"""Beyond them, a step is left out while the hook has taken more than this share of the training's time."""
SAMPLED_PICTURES = 32
SAMPLED_VALUES = 2**18
"""Activations are reduced over about so many values of the batch's first pictures: a first layer has 25 million. Zeros of weights
are counted in so many, too."""
ACTIVE_SHARE = 0.01
"""A channel that is active in a smaller share of positions is dead (threshold_inactivity of AWS's DeadRelu)."""

RELUS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
ACTIVATIONS = (*RELUS, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh)


def _spread(names: list[str]) -> list[str]:
    """At most MAX_LAYERS of the names, evenly over the depth, first and last included."""
    if len(names) <= MAX_LAYERS:
        return names
    return [names[round(i * (len(names) - 1) / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]


def followed_layers(network: nn.Module, pattern: str = "") -> Mapping[str, nn.Module]:
    """Layers whose weights and gradients are followed: at most 12 convolutions and linear layers, spread over the depth.

    With ``pattern`` all those whose name it matches (``re.search``). Raises ConfigError when it matches none.
    """
    found = {name: module for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    if not pattern:
        return {name: found[name] for name in _spread(list(found))}
    chosen = {name: module for name, module in found.items() if re.search(pattern, name)}
    if not chosen:
        raise ConfigError(f"debug_layers={pattern!r} matches no layer: names are such as {', '.join(list(found)[:3])}")
    return chosen


def followed_activations(network: nn.Module, pattern: str = "") -> Mapping[str, nn.Module]:
    """Modules whose outputs are followed: activation functions, chosen as the layers are; the layers where there are none."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, ACTIVATIONS)}
    chosen = [name for name in found if re.search(pattern, name)] if pattern else _spread(list(found))
    return {name: found[name] for name in chosen} or followed_layers(network, pattern)


def _moments(values: Tensor) -> Tensor:
    """Mean, variance and share of values that are not zero, ``(3,) float32`` on the device.

    ``torch.var_mean`` takes 13 ms on a CPU for the 2.4 million weights of a ResNet's last layers, this 1 ms. Zeros are counted in
    the first rows only.
    """
    values = values.detach().float()
    mean = values.mean()
    variance = torch.linalg.vector_norm(values - mean) ** 2 / values.numel()
    rows = values[: max(1, len(values) * SAMPLED_VALUES // values.numel())]
    return torch.stack([mean, variance, torch.count_nonzero(rows) / rows.numel()])


def _reductions(moments: list[float], count: int, scale: float) -> dict[str, float]:
    """smdebug's ``l2``, ``mean`` and ``std``, and ``zeros``, of ``count`` values that were ``scale`` times too large."""
    mean, variance, nonzero = moments[0] / scale, moments[1] / scale**2, moments[2]
    return {"l2": math.sqrt(count * (variance + mean**2)), "mean": mean, "std": math.sqrt(variance), "zeros": 1 - nonzero}


def _sample(output: Tensor) -> Tensor:
    """A part of a batch's activations: of the first pictures, every so-manyth row and column."""
    output = output.detach()[:SAMPLED_PICTURES]
    if output.ndim == 4 and output.numel() > SAMPLED_VALUES:
        stride = math.ceil(math.sqrt(output.numel() / SAMPLED_VALUES))
        output = output[:, :, ::stride, ::stride]
    return output


def _dead_share(output: Tensor) -> Tensor:
    """Share of channels that are active in less than ACTIVE_SHARE of the positions."""
    channel = 1 if output.ndim in (2, 4) else output.ndim - 1
    others = [axis for axis in range(output.ndim) if axis != channel]
    return ((output > 0).float().mean(dim=others) < ACTIVE_SHARE).float().mean()


class HookObserver:
    """Saves losses, rates, accuracies and the reductions of followed tensors through smdebug's hook. An ``engine.Observer``.

    Use as a context manager; leaving it marks the end of the training for readers, unless it was interrupted and will be resumed.
    Step phases go on to the timeline; the hook's own share of the training's time is kept in ``profile``'s overhead.json.
    """

    def __init__(self, folder: Path, config: TrainingConfig, timeline: StepTimeline, profile: Path | None = None) -> None:
        saved_tensors.prepare_smdebug()
        self._folder, self._config, self._timeline, self._profile = folder, config, timeline, profile
        self._spent, self._began, self._saves = 0.0, 0.0, 0
        self._due = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._whole: dict[str, Any] = {}
        self._reduced: dict[str, tuple[Tensor, int, float]] = {}
        self._before: list[Tensor] = []
        self._exported: set[str] = set()

    # --- what the engine calls -------------------------------------------------------------------------------------------

    def watch(self, trainer: Trainer, position: Position) -> None:
        """The training begins, or goes on, at ``position``; what an earlier attempt has saved stays."""
        self._trainer = trainer
        self._timeline.watch(trainer, position)
        network, pattern = trainer.network, self._config.debug_layers
        self._kind = type(network).__name__
        self._layers = followed_layers(network, pattern)
        # A compiled network would be compiled again for every hook that comes or goes.
        self._activations: Mapping[str, nn.Module] = {} if trainer.config.compile else followed_activations(network, pattern)
        self._step = position.epoch * trainer.steps_per_epoch + position.step
        self._evaluations = position.epoch
        self._hook = self._new_hook(fresh=self._step == 0)
        self._began = time.perf_counter()

    def mode(self, name: str) -> None:
        """Train or eval steps follow."""
        self._timeline.mode(name)

    def mark(self, phase: str) -> None:
        """The end of a phase of the current step."""
        self._timeline.mark(phase)
        if phase == "DataLoading":
            self._due = self._is_due()
        if not self._due:
            return
        with self._timed():
            if phase == "DataLoading":
                self._listen()
            elif phase == "Forward":
                self._unlisten()
            elif phase == "Backward":
                self._keep_weights()
            elif phase == "Optimizer":
                self._keep_updates()

    def stepped(self, sums: Tensor) -> None:
        """A step has ended; ``sums (3,)``: losses, hits and examples of this process's part of the batch."""
        if self._due:
            with self._timed():
                self._keep_result(sums)
                self._save(train=True, number=self._step, position=self._step + self._evaluations)
                self._saves, self._due = self._saves + 1, False
        self._step += 1

    def evaluated(self, train: Result, valid: Result) -> None:
        """An epoch has been trained and judged."""
        with self._timed():
            if self._saves_step(train=False, number=self._evaluations):
                self._whole = {
                    saved_tensors.LOSS: valid.loss,
                    saved_tensors.TOP1: valid.top1,
                    saved_tensors.EXAMPLES: valid.examples,
                    saved_tensors.EPOCH_LOSS: train.loss,
                    saved_tensors.EPOCH_TOP1: train.top1,
                }
                self._save(train=False, number=self._step, position=self._step + self._evaluations)
            self._evaluations += 1
        self._write_share()

    # --- when ------------------------------------------------------------------------------------------------------------

    def _new_hook(self, fresh: bool) -> Any:
        from smdebug import modes
        from smdebug.pytorch import Hook, SaveConfig, SaveConfigMode

        trainer = self._trainer
        steps = trainer.config.epochs * trainer.steps_per_epoch
        # Every epoch is seen, and no training saves more than MAX_SAVES steps.
        interval = max(min(self._config.debug_interval, trainer.steps_per_epoch), math.ceil(steps / MAX_SAVES))
        intervals = {
            modes.TRAIN: SaveConfigMode(save_interval=interval),
            modes.EVAL: SaveConfigMode(save_interval=self._config.debug_eval_interval),
        }
        if fresh:
            shutil.rmtree(self._folder, ignore_errors=True)
        for left in self._folder.rglob("*.tmp") if self._folder.is_dir() else []:
            left.unlink()  # half a step of a killed run: smdebug would append to it
        (self._folder / "training_job_end.ts").unlink(missing_ok=True)
        # smdebug refuses a folder that exists; steps are files of their own here, so that a resumed run adds to them.
        hook = Hook(out_dir=str(self._folder / "new"), save_config=SaveConfig(intervals))
        hook.out_dir, hook.first_process = str(self._folder), True
        hook.worker = hook.chief_worker
        atexit.unregister(hook._cleanup)  # it would mark an interrupted training as ended
        for name, names in {
            "losses": [saved_tensors.EPOCH_LOSS],
            "metrics": [saved_tensors.TOP1, saved_tensors.RATE, saved_tensors.EPOCH_TOP1, saved_tensors.EXAMPLES],
        }.items():
            for tensor in names:
                hook.get_collection(name).add_tensor_name(tensor)
        return hook

    def _saves_step(self, train: bool, number: int) -> bool:
        from smdebug import modes

        return bool(self._hook.save_config.should_save_step(modes.TRAIN if train else modes.EVAL, number))

    def _is_due(self) -> bool:
        if not self._saves_step(train=True, number=self._step):
            return False
        return self._saves < FREE_SAVES or self._spent <= MAX_SHARE * (time.perf_counter() - self._began)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent += time.perf_counter() - started

    # --- what ------------------------------------------------------------------------------------------------------------

    def _keep(self, name: str, values: Tensor, scale: float = 1.0) -> None:
        self._reduced[name] = (_moments(values), values.numel(), scale)

    def _listen(self) -> None:
        for name, module in self._activations.items():
            self._handles.append(module.register_forward_hook(self._listener(name)))

    def _listener(self, name: str) -> Any:
        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            # A module that is called again, and the later parts of an accumulated batch, add nothing.
            if isinstance(output, Tensor) and f"{name}{saved_tensors.OUTPUT}" not in self._reduced:
                with self._timed(), torch.no_grad():
                    sample = _sample(output)
                    self._keep(f"{name}{saved_tensors.OUTPUT}", sample)
                    if isinstance(module, RELUS):
                        self._whole[f"{saved_tensors.DEAD}{name}"] = _dead_share(sample)

        return listen

    def _unlisten(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _keep_weights(self) -> None:
        """Weights before the update, and the gradients that it will use, without the loss scale of fp16."""
        scale = self._trainer.scaler.get_scale() if self._trainer.scaler.is_enabled() else 1.0
        self._weights = {name: module.weight for name, module in self._layers.items() if isinstance(module.weight, Tensor)}
        self._before = [weight.detach().clone() for weight in self._weights.values()]
        for name, weight in self._weights.items():
            tensor = f"{self._kind}_{name}.weight".replace(f"{self._kind}_.", f"{self._kind}_")
            self._keep(tensor, weight)
            if weight.grad is not None:
                self._keep(f"{saved_tensors.GRADIENT}{tensor}", weight.grad, scale)
        self._whole[saved_tensors.RATE] = float(self._trainer.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def _keep_updates(self) -> None:
        norms = torch._foreach_norm(self._before)
        changes = torch._foreach_norm(torch._foreach_sub([w.detach() for w in self._weights.values()], self._before))
        for name, norm, change in zip(self._weights, norms, changes, strict=True):
            self._whole[f"{saved_tensors.RATIO}{name}"] = change / norm
        self._before = []

    def _keep_result(self, sums: Tensor) -> None:
        self._whole[saved_tensors.LOSS] = sums[0] / sums[2]
        self._whole[saved_tensors.TOP1] = sums[1] / sums[2]

    # --- where -----------------------------------------------------------------------------------------------------------

    def _figures(self) -> dict[str, float]:
        """All that was kept, by tensor name, brought to the CPU at once."""
        whole = {name: value for name, value in self._whole.items() if isinstance(value, Tensor)}
        plain = {name: float(value) for name, value in self._whole.items() if not isinstance(value, Tensor)}
        parts = [value.float().reshape(1) for value in whole.values()] + [kept[0] for kept in self._reduced.values()]
        numbers = torch.cat(parts).tolist() if parts else []
        figures = {**plain, **dict(zip(whole, numbers, strict=False))}
        scaled = self._trainer.scaler.is_enabled()
        for position, (name, (_, count, scale)) in enumerate(self._reduced.items()):
            first = len(whole) + 3 * position
            found = _reductions(numbers[first : first + 3], count, scale)
            if scaled and name.startswith(saved_tensors.GRADIENT) and not math.isfinite(found["l2"]):
                continue  # the scaler met an overflow: it leaves the step out and lowers the scale, which is its work
            for reduction, value in found.items():
                figures[self._hook._get_reduction_tensor_name(name, reduction, False)] = value
        # A weight that was zero has no ratio.
        return {name: v for name, v in figures.items() if not (name.startswith(saved_tensors.RATIO) and not math.isfinite(v))}

    def _save(self, train: bool, number: int, position: int) -> None:
        """Write a step as one complete file; ``position`` counts steps and evaluations together."""
        from smdebug import modes

        figures, hook = self._figures(), self._hook
        mode = modes.TRAIN if train else modes.EVAL
        hook.set_mode(mode)
        hook.step, hook.mode_steps[mode] = position, number
        hook._initialize_writers()
        for name, value in figures.items():
            hook._write_raw_tensor_simple(name, np.float32(value))
        hook._close_writers()
        self._whole, self._reduced = {}, {}
        self._export_collections(figures)

    def _export_collections(self, figures: dict[str, float]) -> None:
        """The list of collections, when there are tensors that it does not know yet."""
        if new := figures.keys() - self._exported:
            self._exported |= new
            for name in new:
                if name.startswith(saved_tensors.RATIO):
                    self._hook.get_collection("update_ratios").add_tensor_name(name)
                elif name.startswith(saved_tensors.DEAD):
                    self._hook.get_collection("activations").add_tensor_name(name)
                elif name.endswith(saved_tensors.OUTPUT) and name != saved_tensors.LOSS:
                    self._hook.get_collection("activations").add_tensor_name(name.split("/")[-1])
            self._hook.export_collections()

    def _write_share(self) -> None:
        if self._profile and self._began:
            share = self._spent / max(time.perf_counter() - self._began, 1e-9)
            profiling.write_overhead(self._profile, hook_share=round(share, 5))

    def __enter__(self) -> HookObserver:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._unlisten()
        self._timeline.close()
        self._write_share()
        if self._began and not (kind and issubclass(kind, SystemExit)):
            from smdebug.core.access_layer import training_has_ended

            training_has_ended(str(self._folder))
