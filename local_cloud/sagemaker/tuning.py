"""Hyperparameter tuning: real training jobs, proposed by Optuna.

Strategies: ``Bayesian`` is Optuna's tree-structured Parzen estimator with the constant-liar correction for parallel trials
(SageMaker uses a Gaussian process; both are sequential model-based searches over the same ranges). ``Random`` draws independently.
``Grid`` enumerates categorical values, the only kind SageMaker allows there. ``Hyperband`` draws like ``Random`` and stops weak
trials by Optuna's Hyperband pruner, with one report of the objective as one unit of resource.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from local_cloud.sagemaker.common import Record, Request, Tags, arn, in_use, invalid, now, page, select
from local_cloud.sagemaker.jobs import Jobs, Metrics, TrainingJob
from local_cloud.service import Cloud, ServiceError

_ATTEMPTS = 5
"""SageMaker gives up when this many trials failed and none succeeded."""
_PREVIOUS_FOR_EARLY_STOPPING = 2
_MAX_JOBS = 750
_OVER = frozenset({"Completed", "Failed", "Stopped"})
_NONE_SUCCEEDED = (
    "No training job succeeded after {count} attempts. For additional details, please take a look at the training job failures "
    "by listing training jobs for the hyperparameter tuning job."
)


@dataclass
class Trial:
    """One training job of a tuning job."""

    job: TrainingJob
    values: dict[str, str]
    optuna: Any
    told: bool = False
    early: bool = False
    reported: int = 0


@dataclass
class Search:
    """The ranges as Optuna's ask and tell."""

    config: Record
    seed: int | None
    study: Any = field(init=False)
    _grid: list[dict[str, str]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        strategy, limits = self.config["Strategy"], self.config["ResourceLimits"]
        count = limits.get("MaxNumberOfTrainingJobs", 30)
        start = min(count, 10, max(3, count // 3))
        sampler: Any = optuna.samplers.RandomSampler(seed=self.seed)
        if strategy == "Bayesian":
            sampler = optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=start, constant_liar=True)
        direction: Any = "maximize" if self.config["HyperParameterTuningJobObjective"]["Type"] == "Maximize" else "minimize"
        pruner = self._pruner(optuna) if strategy == "Hyperband" else optuna.pruners.NopPruner()
        self.study = optuna.create_study(direction=direction, sampler=sampler, pruner=pruner)
        if strategy == "Bayesian":
            self._spread(start)
        if strategy == "Grid":
            self._grid = grid(self.config["ParameterRanges"])

    def _spread(self, count: int) -> None:
        """Begin with a Latin hypercube (McKay et al., 1979): few trials, yet every stratum of every range is tried once."""
        from scipy.stats import qmc

        ranges = self.config.get("ParameterRanges", {})
        kinds = ("Continuous", "Integer", "Categorical")
        items = [(kind, item) for kind in kinds for item in ranges.get(f"{kind}ParameterRanges", [])]
        if not items:
            return
        for point in qmc.LatinHypercube(len(items), rng=self.seed).random(count).tolist():
            values = {item["Name"]: _at(kind, item, share) for (kind, item), share in zip(items, point, strict=True)}
            self.study.enqueue_trial(values)

    def _pruner(self, optuna: Any) -> Any:
        given = self.config.get("StrategyConfig", {}).get("HyperbandStrategyConfig", {})
        return optuna.pruners.HyperbandPruner(
            min_resource=given.get("MinResource", 1), max_resource=given.get("MaxResource", "auto")
        )

    def ask(self) -> tuple[Any, dict[str, str]]:
        """The next trial and its hyperparameters as strings."""
        trial = self.study.ask()
        if self._grid is not None:
            return trial, self._grid.pop(0)
        ranges = self.config.get("ParameterRanges", {})
        values: dict[str, str] = {}
        for item in ranges.get("ContinuousParameterRanges", []):
            values[item["Name"]] = _continuous(trial, item)
        for item in ranges.get("IntegerParameterRanges", []):
            low, high = int(item["MinValue"]), int(item["MaxValue"])
            values[item["Name"]] = str(trial.suggest_int(item["Name"], low, high, log=_logarithmic(item, low, high)))
        for item in ranges.get("CategoricalParameterRanges", []):
            values[item["Name"]] = str(trial.suggest_categorical(item["Name"], item["Values"]))
        return trial, values

    def tell(self, trial: Any, value: float | None) -> None:
        """The trial's objective, or None when it has none."""
        import optuna

        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        self.study.tell(trial, value, state=state)


def _at(kind: str, item: Record, share: float) -> Any:
    """The value at ``share`` (0 to 1) of a range, on the scale that the range names; Optuna's form of it."""
    if kind == "Categorical":
        return item["Values"][int(share * len(item["Values"]))]
    low, high = float(item["MinValue"]), float(item["MaxValue"])
    reverse = item.get("ScalingType") == "ReverseLogarithmic"
    if reverse:
        low, high = 1.0 - high, 1.0 - low
    logarithmic = reverse or _logarithmic(item, low, high)
    value = low * (high / low) ** share if logarithmic else low + share * (high - low)
    value = min(max(value, low), high)  # rounding must not leave the range
    return round(value) if kind == "Integer" else value


def grid(ranges: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every combination of the categorical ranges, in order."""
    items = ranges.get("CategoricalParameterRanges", [])
    names = [item["Name"] for item in items]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(item["Values"] for item in items))]


def _continuous(trial: Any, item: Record) -> str:
    low, high = float(item["MinValue"]), float(item["MaxValue"])
    if item.get("ScalingType") == "ReverseLogarithmic":  # dense near 1: logarithmic in 1 - x
        return repr(1.0 - trial.suggest_float(item["Name"], 1.0 - high, 1.0 - low, log=True))
    return repr(trial.suggest_float(item["Name"], low, high, log=_logarithmic(item, low, high)))


def _logarithmic(item: Record, low: float, high: float) -> bool:
    """``Auto`` chooses logarithmic where a positive range spans a factor of ten or more."""
    scaling = item.get("ScalingType", "Auto")
    return scaling == "Logarithmic" or (scaling == "Auto" and low > 0 and high / low >= 10)


def worse_than_median(series: Sequence[float], previous: Sequence[Sequence[float]], *, maximize: bool) -> bool:
    """SageMaker's early stopping rule ("Stop Training Jobs Early" in its guide), for the last value of ``series``.

    The running average of each previous job up to the same epoch is taken; the job stops when its value is worse than their median.
    Two previous jobs at least are asked for, since the median of one is no comparison.
    """
    epoch = len(series)
    averages = [statistics.fmean(values[:epoch]) for values in previous if values]
    if not series or len(averages) < _PREVIOUS_FOR_EARLY_STOPPING:
        return False
    median = statistics.median(averages)
    return series[-1] < median if maximize else series[-1] > median


class TuningJob:
    """A tuning job and the thread that runs it."""

    def __init__(self, cloud: Cloud, jobs: Jobs, request: Request, poll: float = 0.5) -> None:
        self.name = request["HyperParameterTuningJobName"]
        self._cloud, self._jobs, self._request, self._poll = cloud, jobs, request, poll
        self._config: Record = request["HyperParameterTuningJobConfig"]
        self._definition: Record = request["TrainingJobDefinition"]
        objective = self._config["HyperParameterTuningJobObjective"]
        self._metric, self._maximize = objective["MetricName"], objective["Type"] == "Maximize"
        self._search = Search(self._config, self._config.get("RandomSeed"))
        self._limit = self._number_of_jobs()
        self.trials: list[Trial] = []
        self._stop = threading.Event()
        created = now()
        self.record: Record = {
            **{key: copy.deepcopy(value) for key, value in request.items() if key != "Tags"},
            "HyperParameterTuningJobArn": arn(cloud, "hyper-parameter-tuning-job", self.name),
            "HyperParameterTuningJobStatus": "InProgress",
            "CreationTime": created,
            "LastModifiedTime": created,
        }
        static = self._definition.get("StaticHyperParameters", {})
        self.record["TrainingJobDefinition"]["StaticHyperParameters"] = {**static, "_tuning_objective_metric": self._metric}
        self._thread = threading.Thread(target=self._run, name=f"tuning-{self.name}", daemon=True)

    def _number_of_jobs(self) -> int:
        if self._config["Strategy"] == "Grid":
            return len(grid(self._config["ParameterRanges"]))
        return int(self._config["ResourceLimits"]["MaxNumberOfTrainingJobs"])

    def start(self) -> None:
        """Run in the background."""
        self._thread.start()

    def request_stop(self) -> None:
        """Start no further trial and stop those under way."""
        self._stop.set()
        with self._jobs.changed:
            self._jobs.changed.notify_all()

    def join(self, timeout: float) -> None:
        """Wait for the end."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except ServiceError as error:
            self._end("Failed", FailureReason=error.message[:1024])
        except Exception as error:  # a tuning job must always end in a status
            self._end("Failed", FailureReason=f"InternalServerError: {type(error).__name__}: {error}"[:1024])

    def _loop(self) -> None:
        runtime = self._config["ResourceLimits"].get("MaxRuntimeInSeconds")
        deadline = time.monotonic() + runtime if runtime else math.inf
        while True:
            with self._jobs.changed:
                self._settle()
                halting = self._stop.is_set() or time.monotonic() > deadline or self._hopeless()
                running = [trial for trial in self.trials if not trial.told]
                if halting:
                    self._halt(running)
                if not running and (halting or len(self.trials) >= self._limit):
                    break
            room = self._config["ResourceLimits"]["MaxParallelTrainingJobs"] - len(running)
            if not halting and room > 0 and len(self.trials) < self._limit:
                self._launch()
                continue
            with self._jobs.changed:
                self._jobs.changed.wait(self._poll)
        self._finish()

    def _launch(self) -> None:
        proposed, values = self._search.ask()
        name = f"{self.name}-{len(self.trials) + 1:03d}-{secrets.token_hex(4)}"
        neighbours = min(self._limit, self._config["ResourceLimits"]["MaxParallelTrainingJobs"])
        request = self._training_request(name, values)
        job = self._jobs.create_training(request, self.record["HyperParameterTuningJobArn"], neighbours)
        with self._jobs.changed:
            self.trials.append(Trial(job=job, values=values, optuna=proposed))

    def _training_request(self, name: str, values: Mapping[str, str]) -> Request:
        definition = self.record["TrainingJobDefinition"]
        request = {
            key: copy.deepcopy(value) for key, value in definition.items() if key not in ("StaticHyperParameters", "DefinitionName")
        }
        request["TrainingJobName"] = name
        request["HyperParameters"] = {**definition["StaticHyperParameters"], **values}
        if "CheckpointConfig" in request:  # trials must not resume from each other
            uri = request["CheckpointConfig"]["S3Uri"].rstrip("/")
            request["CheckpointConfig"]["S3Uri"] = f"{uri}/{name}"
        return request

    def _settle(self) -> None:
        """Take in what the trials reported. Called under the lock."""
        for trial in self.trials:
            if trial.told:
                continue
            series = trial.job.metrics.series.get(self._metric, [])
            status = trial.job.record["TrainingJobStatus"]
            if status in _OVER:
                trial.told = True
                self._search.tell(trial.optuna, series[-1] if series and status != "Failed" else None)
            elif len(series) > trial.reported and not trial.early:
                self._judge(trial, series)

    def _judge(self, trial: Trial, series: Sequence[float]) -> None:
        strategy, early = self._config["Strategy"], self._config.get("TrainingJobEarlyStoppingType") == "Auto"
        for step in range(trial.reported, len(series)):
            if strategy == "Hyperband":
                trial.optuna.report(series[step], step + 1)
                trial.early = trial.early or bool(trial.optuna.should_prune())
            elif early:
                previous = [
                    other.job.metrics.series.get(self._metric, [])
                    for other in self.trials
                    if other.told and other.job.record["TrainingJobStatus"] == "Completed"
                ]
                trial.early = trial.early or worse_than_median(series[: step + 1], previous, maximize=self._maximize)
        trial.reported = len(series)
        if trial.early:
            trial.job.say(f"stopped early: {self._metric}={series[-1]} after {len(series)} values ({strategy})")
            self._stop_trial(trial)

    def _stop_trial(self, trial: Trial) -> None:
        if trial.job.record["TrainingJobStatus"] == "InProgress":
            with contextlib.suppress(ServiceError):
                self._jobs.stop_training({"TrainingJobName": trial.job.name})

    def _halt(self, running: Sequence[Trial]) -> None:
        for trial in running:
            self._stop_trial(trial)

    def _hopeless(self) -> bool:
        failed = self._failed()
        return len(failed) >= _ATTEMPTS and all(trial in failed for trial in self.trials if trial.told)

    def _failed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.job.record["TrainingJobStatus"] == "Failed"]

    def _finish(self) -> None:
        with self._jobs.changed:
            if self._stop.is_set():
                self._end("Stopped")
            elif self.best() is not None:
                self._end("Completed")
            elif any(trial.job.record["TrainingJobStatus"] == "Completed" for trial in self.trials):
                reason = f"No training job reported the objective metric {self._metric!r}: check its regex against the job's log."
                self._end("Failed", FailureReason=reason)
            else:
                self._end("Failed", FailureReason=_NONE_SUCCEEDED.format(count=len(self._failed())))

    def _end(self, status: str, **changes: Any) -> None:
        with self._jobs.changed:
            moment = now()
            self.record.update(
                HyperParameterTuningJobStatus=status, HyperParameterTuningEndTime=moment, LastModifiedTime=moment, **changes
            )
            self._jobs.changed.notify_all()

    # -- what Describe answers; all called under the lock ----------------------------------------------------------------

    def objective(self, trial: Trial) -> float | None:
        """Last value of the objective metric."""
        series = trial.job.metrics.series.get(self._metric)
        return series[-1] if series else None

    def best(self) -> Trial | None:
        """The best trial that ended well or was stopped."""
        scored = [
            (value, trial)
            for trial in self.trials
            if trial.job.record["TrainingJobStatus"] in ("Completed", "Stopped")
            and (value := self.objective(trial)) is not None
            and math.isfinite(value)
        ]
        choose: Callable[..., tuple[float, Trial]] = max if self._maximize else min
        return choose(scored, key=lambda pair: pair[0])[1] if scored else None

    def summary(self, trial: Trial) -> Record:
        """HyperParameterTrainingJobSummary of a trial."""
        record = trial.job.record
        fields = ("TrainingJobName", "TrainingJobArn", "CreationTime", "TrainingStartTime", "TrainingEndTime", "TrainingJobStatus")
        found = {key: record[key] for key in (*fields, "FailureReason") if key in record}
        found["TunedHyperParameters"] = dict(trial.values)
        if "DefinitionName" in self._definition:
            found["TrainingJobDefinitionName"] = self._definition["DefinitionName"]
        value = self.objective(trial)
        if value is not None:
            # AWS leaves Type out in summaries of training jobs that have not ended; it is harmless, and readers want it.
            objective = self._config["HyperParameterTuningJobObjective"]
            found["FinalHyperParameterTuningJobObjectiveMetric"] = {**objective, "Value": value}
        found["ObjectiveStatus"] = self._objective_status(trial)
        return found

    def _objective_status(self, trial: Trial) -> str:
        status = trial.job.record["TrainingJobStatus"]
        if status not in _OVER:
            return "Pending"
        return "Succeeded" if status != "Failed" and self.objective(trial) is not None else "Failed"

    def describe(self) -> Record:
        """DescribeHyperParameterTuningJob."""
        answer = copy.deepcopy(self.record)
        states = [trial.job.record["TrainingJobStatus"] for trial in self.trials]
        goals = [self._objective_status(trial) for trial in self.trials]
        answer["TrainingJobStatusCounters"] = {
            "Completed": states.count("Completed"),
            "InProgress": states.count("InProgress") + states.count("Stopping"),
            "RetryableError": 0,
            "NonRetryableError": states.count("Failed"),
            "Stopped": states.count("Stopped"),
        }
        answer["ObjectiveStatusCounters"] = {name: goals.count(name) for name in ("Succeeded", "Pending", "Failed")}
        best = self.best()
        if best is not None:
            answer["BestTrainingJob"] = self.summary(best)
        return answer


class Tuning:
    """All tuning jobs of the cloud."""

    def __init__(self, cloud: Cloud, jobs: Jobs, tags: Tags) -> None:
        self._cloud, self._jobs, self._tags = cloud, jobs, tags
        self._tuning: dict[str, TuningJob] = {}

    def create(self, request: Request) -> Record:
        """CreateHyperParameterTuningJob."""
        check_ranges(request)
        definition = request["TrainingJobDefinition"]
        Metrics(definition["AlgorithmSpecification"].get("MetricDefinitions", []))
        name, resource = (
            request["HyperParameterTuningJobName"],
            arn(self._cloud, "hyper-parameter-tuning-job", request["HyperParameterTuningJobName"]),
        )
        with self._jobs.changed:
            if name in self._tuning:
                message = (
                    f"Hyper parameter tuning job names must be unique within an AWS account and region: {resource} already exists."
                )
                raise in_use(message)
            job = self._tuning[name] = TuningJob(self._cloud, self._jobs, request)
            self._tags.add(resource, request.get("Tags", []))
        job.start()
        return {"HyperParameterTuningJobArn": resource}

    def _job(self, request: Request) -> TuningJob:
        name = request["HyperParameterTuningJobName"]
        if name not in self._tuning:
            message = f"Amazon SageMaker can't find a tuning job with the name {name} in this account and region."
            raise ServiceError("ResourceNotFound", message)
        return self._tuning[name]

    def describe(self, request: Request) -> Record:
        """DescribeHyperParameterTuningJob."""
        job = self._job(request)
        with self._jobs.changed:
            return job.describe()

    def stop_job(self, request: Request) -> Record:
        """StopHyperParameterTuningJob."""
        job = self._job(request)
        with self._jobs.changed:
            status = job.record["HyperParameterTuningJobStatus"]
            if status not in ("InProgress", "Stopping"):
                raise invalid(f"The request was rejected because the hyperparameter tuning job is in status {status}.")
            job.record.update(HyperParameterTuningJobStatus="Stopping", LastModifiedTime=now())
        job.request_stop()
        return {}

    def list_jobs(self, request: Request) -> Record:
        """ListHyperParameterTuningJobs."""
        fields = (
            *("HyperParameterTuningJobName", "HyperParameterTuningJobArn", "HyperParameterTuningJobStatus", "CreationTime"),
            *("HyperParameterTuningEndTime", "LastModifiedTime", "TrainingJobStatusCounters", "ObjectiveStatusCounters"),
        )
        items = []
        with self._jobs.changed:
            for job in self._tuning.values():
                answer = job.describe()
                config = answer["HyperParameterTuningJobConfig"]
                extra = {"Strategy": config["Strategy"], "ResourceLimits": config["ResourceLimits"]}
                items.append({**{key: answer[key] for key in fields if key in answer}, **extra})
        chosen = select(items, request, name="HyperParameterTuningJobName", status="HyperParameterTuningJobStatus")
        return page("HyperParameterTuningJobSummaries", chosen, request)

    def list_training(self, request: Request) -> Record:
        """ListTrainingJobsForHyperParameterTuningJob."""
        job = self._job(request)
        with self._jobs.changed:
            items = [job.summary(trial) for trial in job.trials]

        def objective(item: Record) -> float:
            return float(item.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value", -math.inf))

        chosen = select(
            items,
            request,
            name="TrainingJobName",
            status="TrainingJobStatus",
            sort={"FinalObjectiveMetricValue": objective},
            default_order="Ascending",
        )
        return page("TrainingJobSummaries", chosen, request)

    def stop(self) -> None:
        """Start nothing more. The trials end with ``Jobs.stop``, which must come next."""
        for job in list(self._tuning.values()):
            job.request_stop()

    def join(self) -> None:
        """Wait for the threads, once the trials have ended."""
        for job in list(self._tuning.values()):
            job.join(30)


def check_ranges(request: Request) -> None:
    """Refuse a configuration that SageMaker refuses: missing parts, empty or reversed ranges, Grid with anything but categories."""
    config = request["HyperParameterTuningJobConfig"]
    for part, where in (
        ("HyperParameterTuningJobObjective", config),
        ("ParameterRanges", config),
        ("TrainingJobDefinition", request),
    ):
        if part not in where:
            raise invalid(f"{part} is required.")
    ranges, strategy = config["ParameterRanges"], config["Strategy"]
    for item in [*ranges.get("ContinuousParameterRanges", []), *ranges.get("IntegerParameterRanges", [])]:
        _check_range(item, reverse_allowed=item in ranges.get("ContinuousParameterRanges", []))
    numeric = bool(ranges.get("ContinuousParameterRanges") or ranges.get("IntegerParameterRanges"))
    if not numeric and not ranges.get("CategoricalParameterRanges"):
        raise invalid("ParameterRanges must name at least one hyperparameter to tune.")
    limits = config["ResourceLimits"]
    if strategy == "Grid":
        _check_grid(ranges, limits, numeric=numeric)
    elif "MaxNumberOfTrainingJobs" not in limits:
        raise invalid(f"ResourceLimits.MaxNumberOfTrainingJobs is required for the strategy {strategy}.")
    if limits.get("MaxNumberOfTrainingJobs", 1) > _MAX_JOBS:
        raise invalid(f"MaxNumberOfTrainingJobs={limits['MaxNumberOfTrainingJobs']} is more than {_MAX_JOBS}.")
    if strategy == "Hyperband" and config.get("TrainingJobEarlyStoppingType") == "Auto":
        raise invalid("TrainingJobEarlyStoppingType must be Off for the Hyperband strategy, which has its own early stopping.")
    _check_metric(config, request["TrainingJobDefinition"])


def _check_metric(config: Record, definition: Record) -> None:
    metric = config["HyperParameterTuningJobObjective"]["MetricName"]
    names = [item["Name"] for item in definition["AlgorithmSpecification"].get("MetricDefinitions", [])]
    if metric not in names:
        raise invalid(
            f"The objective metric {metric!r} is not in MetricDefinitions ({', '.join(names) or 'none'}): define its regex there."
        )


def _check_grid(ranges: Record, limits: Record, *, numeric: bool) -> None:
    if numeric:
        raise invalid("The Grid strategy accepts categorical parameters only: give CategoricalParameterRanges.")
    count, wanted = len(grid(ranges)), limits.get("MaxNumberOfTrainingJobs")
    if wanted is not None and wanted != count:
        raise invalid(f"MaxNumberOfTrainingJobs={wanted} must be {count}, the number of combinations of the grid, or be left out.")


def _check_range(item: Record, *, reverse_allowed: bool) -> None:
    name, scaling = item["Name"], item.get("ScalingType", "Auto")
    try:
        low, high = float(item["MinValue"]), float(item["MaxValue"])
    except ValueError as error:
        raise invalid(f"The range of {name!r} is not numeric: {item['MinValue']!r} to {item['MaxValue']!r}.") from error
    if low > high:
        raise invalid(f"The range of {name!r} is empty: MinValue {item['MinValue']} is greater than MaxValue {item['MaxValue']}.")
    if scaling == "Logarithmic" and low <= 0:
        raise invalid(f"Logarithmic scaling of {name!r} needs MinValue > 0, got {item['MinValue']}.")
    if scaling == "ReverseLogarithmic" and not (reverse_allowed and low >= 0 and high < 1):
        raise invalid(f"ReverseLogarithmic scaling of {name!r} needs a continuous range with 0 <= MinValue and MaxValue < 1.")
