"""The debugger's rules on a training: smdebug ``Rule`` subclasses over the saved tensors.

Names and, where they have one, thresholds are those of AWS's built-in rules
(https://docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-rules.html, "AWS" below); each class says where it differs and
why. A rule looks at every saved step once, in order, and gives its verdict on all that it has seen, so that the same rules run
beside a training and after it. A rule that cannot judge yet says so and does not fire. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, ClassVar

from classifier import saved_tensors
from classifier.errors import DataError
from classifier.findings import Finding
from classifier.saved_tensors import DEAD, EPOCH_LOSS, EPOCH_TOP1, EXAMPLES, GRADIENT, LOSS, RATE, RATIO, TOP1, Step

AWS = "https://docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-rules.html#"


def _before_peak(rates: list[float]) -> bool:
    """Whether the learning rate is still near the highest one seen: by then a training need not show what it can do."""
    return bool(rates) and rates[-1] > 0.9 * max(rates)


class Judge:
    """What a rule does with the saved steps; ``smdebug_rule`` makes smdebug's ``Rule`` of it."""

    threshold: ClassVar[str]
    source: ClassVar[str]
    remedy: ClassVar[str]

    def __init__(self, class_counts: list[int]) -> None:
        self.class_counts, self.steps = class_counts, list[int]()

    def look(self, step: Step) -> bool:
        """Whether the next saved step shows the symptom."""
        raise NotImplementedError

    def verdict(self) -> Finding:
        """What is to be said of all steps so far."""
        raise NotImplementedError

    def _finding(self, fired: bool, detail: str, **values: Any) -> Finding:
        name = type(self).__name__
        remedy = self.remedy if fired else ""
        return Finding(name, fired, detail, remedy, sorted(set(self.steps)), values, self.threshold, self.source)


class VanishingGradient(Judge):
    """A layer's gradients are too small to train it while the loss is still high.

    AWS's threshold, on the root mean square of the gradient rather than its mean absolute value. Steps with a loss below 0.1 do
    not count: near the end of a good training gradients vanish because nothing is left to learn. Behind a fresh head of zeros
    the first step's gradients are zero by design, hence "most of the steps".
    """

    threshold = "root mean square of a layer's gradient below 1e-7 in over half of at least 5 saved steps with a loss above 0.1"
    source = AWS + "vanishing-gradient (threshold 0.0000001)"
    remedy = "use a residual network, ReLUs instead of sigmoids, batch normalisation, or a better initialisation"
    LIMIT, MIN_LOSS, MIN_STEPS = 1e-7, 0.1, 5

    def __init__(self, class_counts: list[int]) -> None:
        super().__init__(class_counts)
        self.judged, self.small = 0, Counter[str]()
        self.least = dict[str, float]()

    def look(self, step: Step) -> bool:
        """Layers with vanishing gradients."""
        if not step.train or step.values.get(LOSS, 0.0) < self.MIN_LOSS:
            return False
        sizes = {name: math.hypot(r["mean"], r["std"]) for name, r in step.reductions.items() if name.startswith(GRADIENT)}
        self.judged += bool(sizes)
        small = {name: size for name, size in sizes.items() if size < self.LIMIT}
        self.small.update(small.keys())
        self.least.update(small)
        return bool(small)

    def verdict(self) -> Finding:
        """The layer that was worst."""
        if self.judged < self.MIN_STEPS:
            return self._finding(False, f"not judged: {self.judged} saved steps with gradients and a loss above {self.MIN_LOSS}")
        layers = [name for name, count in self.small.items() if count > 0.5 * self.judged]
        if not layers:
            return self._finding(False, f"gradients of all followed layers are large enough ({self.judged} saved steps)")
        worst = min(layers, key=lambda name: self.least[name])
        return self._finding(
            True,
            f"from step {self.steps[0]} to {self.steps[-1]}: {len(layers)} layers with gradients below {self.LIMIT:g}, such as "
            f"{worst.removeprefix(GRADIENT)} with {self.least[worst]:.1e}",
            layers=sorted(layers),
        )


class ExplodingTensor(Judge):
    """A saved tensor is not finite (AWS), or a layer's gradient has a 2-norm above 1e4, which comes shortly before.

    Overflows that the fp16 loss scaler handles are not saved and thus not seen.
    """

    threshold = "a loss, weight, gradient or activation that is not finite, or a gradient with a 2-norm above 1e4"
    source = AWS + "exploding-tensor (not finite); the norm: Pascanu et al. 2013, arXiv:1211.5063"
    remedy = "lower learning_rate, lengthen warmup_epochs, or set gradient_clip_norm to 1"
    LIMIT = 1e4

    def __init__(self, class_counts: list[int]) -> None:
        super().__init__(class_counts)
        self.first = ""

    def look(self, step: Step) -> bool:
        """The first tensor that exploded."""
        bad = [f"{name} is {value}" for name, value in step.values.items() if not math.isfinite(value)]
        for name, found in step.reductions.items():
            if not all(map(math.isfinite, found.values())):
                bad.append(f"{name} is not finite")
            elif name.startswith(GRADIENT) and found["l2"] > self.LIMIT:
                bad.append(f"{name} has the norm {found['l2']:.1e}")
        if bad and not self.first:
            self.first = f"at step {step.number}: {bad[0]}" + (f", and {len(bad) - 1} more" if len(bad) > 1 else "")
        return bool(bad)

    def verdict(self) -> Finding:
        """Where it began."""
        return self._finding(bool(self.first), self.first or "all saved tensors are finite and no gradient is above 1e4")


class DeadRelu(Judge):
    """Nearly all channels of a ReLU are inactive, so that nothing reaches the layers before it.

    A channel counts as dead when it is active in less than 1 % of the sampled positions (AWS: threshold_inactivity), a ReLU when
    more than 90 % of its channels are. AWS's threshold_layer is 50 %, which pretrained networks on pictures unlike ImageNet's pass
    in good health: their channels are specialists, and up to 59 % of a late layer were seen to stay silent.
    """

    threshold = "more than 90 % of a ReLU's channels active in less than 1 % of positions, in most of at least 3 saved steps"
    source = AWS + "dead-relu (threshold_inactivity 1.0; threshold_layer 50.0, here 90)"
    remedy = "lower learning_rate, look at biases and initialisation, or use another activation"
    LIMIT, MIN_STEPS = 0.9, 3

    def __init__(self, class_counts: list[int]) -> None:
        super().__init__(class_counts)
        self.shares = defaultdict[str, list[float]](list)

    def look(self, step: Step) -> bool:
        """ReLUs that are mostly dead."""
        found = {name: value for name, value in step.values.items() if name.startswith(DEAD)}
        for name, value in found.items():
            self.shares[name.removeprefix(DEAD)].append(value)
        return any(value > self.LIMIT for value in found.values())

    def verdict(self) -> Finding:
        """The worst of them."""
        judged = {name: values for name, values in self.shares.items() if len(values) >= self.MIN_STEPS}
        if not judged:
            return self._finding(False, "not judged: the network has no ReLU that is followed, or fewer than 3 steps were saved")
        medians = {name: statistics.median(values) for name, values in judged.items()}
        dead = {name: value for name, value in medians.items() if value > self.LIMIT}
        worst = max(medians, key=lambda name: medians[name])
        if not dead:
            return self._finding(False, f"at most {medians[worst]:.0%} of a ReLU's channels are silent ({worst})")
        return self._finding(
            True,
            f"from step {self.steps[0]} to {self.steps[-1]}: {medians[worst]:.0%} of the channels after {worst} are dead"
            + (f", and {len(dead) - 1} more ReLUs" if len(dead) > 1 else ""),
            layers=sorted(dead),
        )


class PoorWeightInitialization(Judge):
    """The network cannot learn well from where it starts.

    Weights without variance keep all channels of a layer alike for ever; one layer of zeros is a fresh head and right. AWS compares
    the layers' variances, which differ by design with their width, so that here the loss is judged instead: one that starts far
    above that of guessing means outputs of an absurd size.
    """

    threshold = "at step 0: a layer's weights with a standard deviation below 1e-6, or a loss above 3 times ln(classes)"
    source = (
        AWS
        + "poor-weight-initialization; Glorot and Bengio 2010; the loss: Karpathy, https://karpathy.github.io/2019/04/25/recipe/"
    )
    remedy = "initialise the layers at random (He et al. 2015) or start from pretrained weights"
    LIMIT, LOSS_FACTOR = 1e-6, 3.0

    def __init__(self, class_counts: list[int]) -> None:
        super().__init__(class_counts)
        self.text, self.seen = "", False

    def look(self, step: Step) -> bool:
        """Only the first step of the training tells."""
        if not step.train or step.number:
            return False
        self.seen, problems = True, []
        weights = {name: r for name, r in step.reductions.items() if name.endswith("weight") and not name.startswith(GRADIENT)}
        zero = [name for name, r in weights.items() if r["l2"] == 0]
        still = [name for name, r in weights.items() if r["std"] < self.LIMIT and (name not in zero or len(zero) > 1)]
        if still:
            problems.append(f"{len(still)} layers of weights without variance, such as {still[0]}")
        guess = math.log(max(len(self.class_counts), 2))
        loss = step.values.get(LOSS, 0.0)
        if self.class_counts and not loss <= self.LOSS_FACTOR * guess:
            problems.append(f"a loss of {loss:.3g}, where guessing has {guess:.3g}")
        self.text = " and ".join(problems)
        return bool(problems)

    def verdict(self) -> Finding:
        """What the first step showed."""
        if not self.seen:
            return self._finding(False, "not judged: the first step of the training is not saved here")
        return self._finding(bool(self.text), f"at step 0: {self.text or 'weights vary and the loss is sound'}")


class LossNotDecreasing(Judge):
    """The training loss stays where it was, near that of guessing.

    Judged once the learning rate has begun to fall, so that a warm-up is no fault, and on means of several steps or of epochs, so
    that the noise of single batches is none. A loss well below that of guessing may rest: such a training began with good weights,
    or has ended.
    """

    threshold = "the mean training loss less than 1 % below the first, after 2 epochs or 16 saved steps, and above 0.8 ln(classes)"
    source = AWS + "loss-not-decreasing (diff_percent 0.1, here 1)"
    remedy = "raise or lower learning_rate tenfold, and check that labels and pictures belong together"
    PERCENT, GUESS, MIN_STEPS, MIN_EPOCHS = 1.0, 0.8, 16, 2

    def __init__(self, class_counts: list[int]) -> None:
        super().__init__(class_counts)
        self.losses, self.epochs = list[float](), list[float]()
        self.rates, self.last = list[float](), 0

    def look(self, step: Step) -> bool:
        """Collects; one loss alone shows nothing."""
        self.last = step.number
        if RATE in step.values:
            self.rates.append(step.values[RATE])
        if step.train and LOSS in step.values:
            self.losses.append(step.values[LOSS])
        if EPOCH_LOSS in step.values:
            self.epochs.append(step.values[EPOCH_LOSS])
        return False

    def verdict(self) -> Finding:
        """First against last quarter of the steps, or first against best later epoch."""
        if _before_peak(self.rates):
            return self._finding(False, "not judged yet: the learning rate has not passed its peak")
        if len(self.epochs) >= self.MIN_EPOCHS:
            first, now, of = self.epochs[0], min(self.epochs[1:]), f"{len(self.epochs)} epochs"
        elif len(self.losses) >= self.MIN_STEPS:
            quarter = len(self.losses) // 4
            first, now = statistics.fmean(self.losses[:quarter]), statistics.fmean(self.losses[-quarter:])
            of = f"{len(self.losses)} saved steps"
        else:
            return self._finding(False, f"not judged: {len(self.losses)} saved steps and {len(self.epochs)} epochs are too few")
        guess = math.log(len(self.class_counts)) if len(self.class_counts) > 1 else first
        fired = now > (1 - self.PERCENT / 100) * first and now > self.GUESS * guess
        values = {"first": first, "now": now, "guessing": guess}
        return self._finding(fired, f"up to step {self.last}: training loss {first:.3f} to {now:.3f} over {of}", **values)


class _Epochs(Judge):
    """Collects the figures of the epochs."""

    def __init__(self, class_counts: list[int]) -> None:
        super().__init__(class_counts)
        self.rows = list[Step]()

    def look(self, step: Step) -> bool:
        """Evaluations with the epoch before them."""
        if not step.train and {LOSS, TOP1, EPOCH_LOSS, EPOCH_TOP1} <= step.values.keys():
            self.rows.append(step)
        return False

    @staticmethod
    def _noise(row: Step) -> float:
        """Two standard errors of the validation accuracy."""
        share, count = row.values[TOP1], row.values.get(EXAMPLES, 0.0)
        return 2 * math.sqrt(share * (1 - share) / count) if count else 0.0


class Overfit(_Epochs):
    """The network knows its training pictures much better than others.

    AWS compares the losses; label smoothing, mixup and augmentation make those of train and valid different things, so that
    accuracies are compared, beyond the noise of the validation split. A gap alone is common and harmless while the validation loss
    still falls, so that a smaller gap counts only together with a loss that has risen by AWS's ratio.
    """

    threshold = (
        "train top1 over valid top1 by more than 0.3, or by more than 0.15 with a validation loss 10 % above its best; "
        "two standard errors are added"
    )
    source = AWS + "overfit (ratio_threshold 0.1)"
    remedy = "add pictures, strengthen augmentation (augmentation, mixup_alpha), raise weight_decay, or train fewer epochs"
    GAP, WIDE_GAP, RISE = 0.15, 0.3, 0.1

    def verdict(self) -> Finding:
        """Judged on the last epoch."""
        if len(self.rows) < 2:
            return self._finding(False, f"not judged: {len(self.rows)} epochs are too few")
        last = self.rows[-1]
        train, valid = last.values[EPOCH_TOP1], last.values[TOP1]
        best = min(row.values[LOSS] for row in self.rows)
        gap, noise = train - valid, self._noise(last)
        risen = last.values[LOSS] > (1 + self.RISE) * best + 0.01
        fired = gap > self.WIDE_GAP + noise or (gap > self.GAP + noise and risen)
        detail = (
            f"at step {last.number}: train top1 {train:.3f}, valid top1 {valid:.3f}, valid loss {last.values[LOSS]:.3f} "
            f"(best {best:.3f})"
        )
        self.steps = [last.number] if fired else []
        return self._finding(fired, detail, gap=gap, noise=noise)


class Overtraining(_Epochs):
    """Training goes on although the validation split gains nothing, and loses.

    AWS asks for 10 evaluations without improvement; these trainings have about ten epochs, so 3 are asked for, together with a
    loss that is clearly higher: 10 % and 0.05, as tiny losses double without meaning, with no better accuracy for it.
    """

    threshold = "the last 3 validation losses 10 % and 0.05 above the best one before them, and no better valid top1"
    source = AWS + "overtraining (patience_validation 10, delta 0.01)"
    remedy = "train fewer epochs, or set early_stopping_patience to 3"
    PATIENCE, RISE, LEAST = 3, 0.1, 0.05

    def verdict(self) -> Finding:
        """The last epochs against the best before them."""
        if len(self.rows) <= self.PATIENCE:
            return self._finding(False, f"not judged: {len(self.rows)} epochs are too few")
        best = min(self.rows, key=lambda row: row.values[LOSS])
        late, last = self.rows[-self.PATIENCE :], self.rows[-1]
        lowest = best.values[LOSS]
        limit = lowest + max(self.RISE * lowest, self.LEAST)
        worse = best not in late and all(row.values[LOSS] > limit for row in late)
        fired = worse and max(row.values[TOP1] for row in late) <= best.values[TOP1] + max(0.01, self._noise(best) / 2)
        self.steps = [row.number for row in late] if fired else []
        detail = (
            f"best valid loss {lowest:.3f} (top1 {best.values[TOP1]:.3f}) at step {best.number}; "
            f"{last.values[LOSS]:.3f} (top1 {last.values[TOP1]:.3f}) at step {last.number}"
        )
        return self._finding(fired, detail)


class ClassImbalance(Judge):
    """Some classes have many more training pictures than others."""

    threshold = "the largest class has at least 10 times the training pictures of the smallest"
    source = AWS + "class-imbalance (threshold_imbalance 10)"
    remedy = "add pictures to the small classes, or set class_weights to balanced"
    LIMIT = 10

    def look(self, step: Step) -> bool:
        """The counts tell all."""
        return False

    def verdict(self) -> Finding:
        """Judged before the first step."""
        if not self.class_counts:
            return self._finding(False, "not judged: the pictures of each class were not counted")
        least, most = min(self.class_counts), max(self.class_counts)
        fired = most >= self.LIMIT * max(least, 1)
        return self._finding(fired, f"before step 0: training pictures per class: {least} to {most}", least=least, most=most)


class _Ratios(Judge):
    """Collects how far a step moves the layers. A layer that starts at zero moves far at first, by any rate, and is left out."""

    MIN_STEPS = 5

    def __init__(self, class_counts: list[int]) -> None:
        super().__init__(class_counts)
        self.fresh, self.begun = set[str](), False
        self.rows, self.rates = list[tuple[int, dict[str, float]]](), list[float]()

    def look(self, step: Step) -> bool:
        """The ratios of the step; whether they show the symptom."""
        if not step.train:
            return False
        self.rates.append(step.values.get(RATE, 0.0))
        if not step.number:
            self.begun = True
            zero = {name.removesuffix(".weight") for name, r in step.reductions.items() if r["l2"] == 0}
            self.fresh = {name for name in zero if not name.startswith(GRADIENT)}
        ratios = {name.removeprefix(RATIO): value for name, value in step.values.items() if name.startswith(RATIO) and value > 0}
        kept = {name: v for name, v in ratios.items() if not any(fresh.endswith(f"_{name}") for fresh in self.fresh)}
        if kept:
            self.rows.append((step.number, kept))
        return self._symptom(kept)

    def _peak(self) -> tuple[int, float]:
        """The step with the largest median ratio of the layers, and that."""
        return max(((number, statistics.median(row.values())) for number, row in self.rows), key=lambda pair: pair[1])

    def _symptom(self, ratios: dict[str, float]) -> bool:
        return False


class UpdateRatioTooSmall(_Ratios):
    """Even in the fastest step the layers hardly move. Judged when the learning rate has passed its peak.

    About 1e-3 is usual in training from scratch; fine-tuning's small rates for the backbone give 1e-5, and 1.5e-6 with
    layer_decay, in good health. Frozen layers do not move at all and are left out.
    """

    threshold = "the median update/weight ratio of the layers below 3e-7 in all of at least 5 saved steps"
    source = "update/weight ratio: CS231n, https://cs231n.github.io/neural-networks-3/#ratio (about 1e-3; fine-tuning 1e-5)"
    remedy = "raise learning_rate, or backbone_lr_scale where the backbone is to learn"
    LIMIT = 3e-7

    def _symptom(self, ratios: dict[str, float]) -> bool:
        return bool(ratios) and statistics.median(ratios.values()) < self.LIMIT

    def verdict(self) -> Finding:
        """The peak of all steps."""
        if not self.begun or len(self.rows) < self.MIN_STEPS:
            return self._finding(False, f"not judged: {len(self.rows)} saved steps from the start that moved a layer are too few")
        if _before_peak(self.rates):
            return self._finding(False, "not judged yet: the learning rate has not passed its peak")
        step, peak = self._peak()
        detail = f"the median update/weight ratio of the layers is at most {peak:.1e}, at step {step}"
        return self._finding(peak < self.LIMIT, detail, ratio=peak)


class UpdateRatioTooLarge(_Ratios):
    """Several steps each replaced much of what the layers had learned.

    The fastest steps of small networks reach 0.16 in good health; with an absurd learning rate the first steps are above 1, and
    then fall, as the weights have grown: a few steps are enough to fire.
    """

    threshold = "the median update/weight ratio of the layers above 0.2 in at least 3 saved steps and a tenth of them"
    source = "update/weight ratio: CS231n, https://cs231n.github.io/neural-networks-3/#ratio (about 1e-3; 0.2 is far above)"
    remedy = "lower learning_rate, or lengthen warmup_epochs"
    LIMIT, LEAST, SHARE = 0.2, 3, 0.1

    def _symptom(self, ratios: dict[str, float]) -> bool:
        return bool(ratios) and statistics.median(ratios.values()) > self.LIMIT

    def verdict(self) -> Finding:
        """How often it was too large."""
        if len(self.rows) < self.LEAST:
            return self._finding(False, f"not judged: {len(self.rows)} saved steps that moved a layer are too few")
        step, peak = self._peak()
        often = len(self.steps)
        detail = (
            f"the median update/weight ratio of the layers is up to {peak:.1e}, at step {step}; above {self.LIMIT:g} in {often} of "
            f"{len(self.rows)} saved steps"
        )
        return self._finding(often >= max(self.LEAST, self.SHARE * len(self.rows)), detail, ratio=peak)


JUDGES: tuple[type[Judge], ...] = (
    VanishingGradient,
    ExplodingTensor,
    DeadRelu,
    PoorWeightInitialization,
    LossNotDecreasing,
    Overfit,
    Overtraining,
    ClassImbalance,
    UpdateRatioTooSmall,
    UpdateRatioTooLarge,
)


@functools.cache
def smdebug_rule(kind: Any) -> Any:
    """The smdebug ``Rule`` subclass of a judge: ``Rule(trial, class_counts)``, for ``invoke_rule``. Imports smdebug."""
    saved_tensors.prepare_smdebug()
    from smdebug.rules.rule import Rule

    def init(self: Any, trial: Any, class_counts: list[int] | None = None) -> None:
        Rule.__init__(self, trial, action_str="")
        kind.__init__(self, class_counts or [])

    def invoke_at_step(self: Any, step: int) -> bool:
        seen = _read(self.base_trial, step)
        shown = bool(self.look(seen))
        if shown:
            self.steps.append(seen.number)
        return shown

    body = {"__init__": init, "invoke_at_step": invoke_at_step, "__doc__": kind.__doc__, "__module__": __name__}
    return type(kind.__name__, (kind, Rule), body)


@functools.lru_cache(maxsize=1)
def _read(trial: Any, step: int) -> Step:
    """A step is read once for all rules."""
    return saved_tensors.read_step(trial, step)


class TrainingRules:
    """All rules over the tensors that a training saves under ``tensors``; asked again, they look at what is new."""

    def __init__(self, tensors: Path, class_counts: list[int]) -> None:
        self._tensors, self._counts = tensors, class_counts
        self._trial: Any = None
        self._rules: list[Any] = []
        self._next = 0

    def findings(self) -> list[Finding]:
        """The verdicts so far. Raises DataError while nothing is saved."""
        if self._trial is None:
            self._trial = saved_tensors.open_trial(self._tensors)
            kinds: list[Any] = [*JUDGES]
            self._rules = [smdebug_rule(kind)(self._trial, self._counts) for kind in kinds]
        from smdebug.rules.rule_invoker import invoke_rule

        for step in [step for step in self._trial.steps() if step >= self._next]:
            for rule in self._rules:
                invoke_rule(rule, start_step=step, end_step=step + 1)
            self._next = step + 1
        return [rule.verdict() for rule in self._rules]


def history_steps(history: list[dict[str, Any]]) -> list[Step]:
    """The epochs' figures as evaluations, numbered by epoch."""
    names = {"valid_loss": LOSS, "valid_top1": TOP1, "train_loss": EPOCH_LOSS, "train_top1": EPOCH_TOP1}
    rows = [{name: float(row[key]) for key, name in names.items() if key in row} for row in history]
    return [Step(number, False, values, {}) for number, values in enumerate(rows, start=1)]


def _history_findings(history: list[dict[str, Any]], class_counts: list[int]) -> list[Finding]:
    judges = [kind(class_counts) for kind in JUDGES]
    for step in history_steps(history):
        for judge in judges:
            judge.look(step)
    return [judge.verdict() for judge in judges]


def training_findings(tensors: Path, history: list[dict[str, Any]], class_counts: list[int]) -> tuple[list[Finding], list[str]]:
    """Every training rule's finding, and notes on what could not be read; ``history`` stands in for tensors that are not there."""
    try:
        return TrainingRules(tensors, class_counts).findings(), []
    except Exception as problem:  # none saved, damaged files, or an smdebug that does not start
        reason = str(problem) if isinstance(problem, DataError) else f"{type(problem).__name__}: {problem}"
        note = f"the saved tensors could not be read ({reason}): the rules judge the epochs' figures"
        return _history_findings(history, class_counts), [note]
