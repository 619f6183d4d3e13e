"""Hyperparameter tuning: real training jobs, proposed by Optuna.

Strategies: ``Bayesian`` is Optuna's tree-structured Parzen estimator with the constant-liar correction for parallel trials
(SageMaker uses a Gaussian process; both are sequential model-based searches over the same ranges). ``Random`` draws independently.
``Grid`` enumerates categorical values, the only kind SageMaker allows there. ``Hyperband`` draws like ``Random`` and stops weak
trials by Optuna's Hyperband pruner, with one report of the objective as one unit of resource. The ranges are in ``ranges.py``,
what a warm start asks of earlier jobs in ``warm_start.py``.
"""

from __future__ import annotations

import contextlib
import copy
import math
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from local_cloud.sagemaker import ranges, warm_start
from local_cloud.sagemaker.common import Record, Request, Tags, arn, in_use, invalid, now, page, select
from local_cloud.sagemaker.jobs import Jobs, Metrics, TrainingJob, check_spot
from local_cloud.sagemaker.ranges import Dimension, dimensions, grid
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


Observation = tuple[Mapping[str, str], float]
"""A past trial's hyperparameters and its objective."""


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
    past: Sequence[Observation] = ()
    """Trials of earlier searches (warm start): their values and objectives."""
    study: Any = field(init=False)
    _space: list[Dimension] = field(init=False)
    _grid: list[dict[str, str]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        strategy, limits = self.config["Strategy"], self.config["ResourceLimits"]
        self._space = dimensions(self.config.get("ParameterRanges", {}))
        count = limits.get("MaxNumberOfTrainingJobs", 30)
        start = min(count, 10, max(3, count // 3))
        sampler: Any = optuna.samplers.RandomSampler(seed=self.seed)
        if strategy == "Bayesian":
            sampler = optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=start, constant_liar=True)
        direction: Any = "maximize" if self.config["HyperParameterTuningJobObjective"]["Type"] == "Maximize" else "minimize"
        pruner = self._pruner(optuna) if strategy == "Hyperband" else optuna.pruners.NopPruner()
        self.study = optuna.create_study(direction=direction, sampler=sampler, pruner=pruner)
        known = self._recall(optuna)
        if strategy == "Bayesian":
            self._spread(start - known)
        if strategy == "Grid":
            self._grid = grid(self.config["ParameterRanges"])

    def _recall(self, optuna: Any) -> int:
        """Tell the study what earlier searches found inside these ranges; returns how many trials that were."""
        known = 0
        for values, objective in self.past:
            params = {space.name: space.inner(values[space.name]) for space in self._space if space.name in values}
            if len(params) == len(self._space) and all(value is not None for value in params.values()):
                distributions = {space.name: space.distribution for space in self._space}
                self.study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=objective))
                known += 1
        return known

    def _spread(self, count: int) -> None:
        """Begin with a Latin hypercube (McKay et al., 1979): few trials, yet every stratum of every range is tried once."""
        from scipy.stats import qmc

        if not self._space or count < 1:
            return
        for point in qmc.LatinHypercube(len(self._space), rng=self.seed).random(count).tolist():
            self.study.enqueue_trial({space.name: space.at(share) for space, share in zip(self._space, point, strict=True)})

    def _pruner(self, optuna: Any) -> Any:
        given = self.config.get("StrategyConfig", {}).get("HyperbandStrategyConfig", {})
        return optuna.pruners.HyperbandPruner(
            min_resource=given.get("MinResource", 1), max_resource=given.get("MaxResource", "auto")
        )

    def ask(self) -> tuple[Any, dict[str, str]]:
        """The next trial and its hyperparameters as strings."""
        if self._grid is not None:
            return self.study.ask(), self._grid.pop(0)
        trial = self.study.ask({space.name: space.distribution for space in self._space})
        return trial, {space.name: space.outer(trial.params[space.name]) for space in self._space}

    def tell(self, trial: Any, value: float | None) -> None:
        """The trial's objective, or None when it has none."""
        import optuna

        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        self.study.tell(trial, value, state=state)


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

    def __init__(self, cloud: Cloud, jobs: Jobs, request: Request, parents: Sequence[TuningJob] = (), poll: float = 0.5) -> None:
        self.name = request["HyperParameterTuningJobName"]
        self._cloud, self._jobs, self._request, self._poll = cloud, jobs, request, poll
        self._config: Record = request["HyperParameterTuningJobConfig"]
        self._definition: Record = request["TrainingJobDefinition"]
        objective = self._config["HyperParameterTuningJobObjective"]
        self._metric, self._maximize = objective["MetricName"], objective["Type"] == "Maximize"
        self._parents = parents
        past = [observation for parent in parents for observation in parent.observations()]
        self._search = Search(self._config, self._config.get("RandomSeed"), past)
        self._max_resource = max_resource(self._config, self._definition.get("StaticHyperParameters", {}))
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
                usable = series and status != "Failed" and math.isfinite(series[-1])
                self._search.tell(trial.optuna, series[-1] if usable else None)
            elif len(series) > trial.reported and not trial.early:
                self._judge(trial, series)

    def _judge(self, trial: Trial, series: Sequence[float]) -> None:
        strategy, early = self._config["Strategy"], self._config.get("TrainingJobEarlyStoppingType") == "Auto"
        for step in range(trial.reported, len(series)):
            if strategy == "Hyperband":
                trial.optuna.report(series[step], step + 1)
                # "Once a job reaches the MaxResource value, it is stopped": one that ends there by itself is let end.
                trial.early = trial.early or bool(trial.optuna.should_prune()) or step + 1 > self._max_resource
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

    def observations(self) -> list[Observation]:
        """The trials of which the objective was evaluated: what a later search learns from this one."""
        with self._jobs.changed:
            return [
                (trial.job.record.get("HyperParameters", {}), value)
                for trial in self.trials
                if self._objective_status(trial) == "Succeeded"
                and (value := self.objective(trial)) is not None
                and math.isfinite(value)
            ]

    def _overall_best(self) -> Record | None:
        """The best trial of this search and of those that it started from."""
        best = [(job, trial) for job in (self, *self._parents) if (trial := job.best()) is not None]
        if not best:
            return None
        choose: Callable[..., tuple[TuningJob, Trial]] = max if self._maximize else min
        job, trial = choose(best, key=lambda pair: pair[0].objective(pair[1]))
        return {**job.summary(trial), "TuningJobName": job.name}

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
        # Only the service's own errors are worth another try; whatever the trial or its request did wrong stays wrong.
        retryable = sum(trial.job.record.get("FailureReason", "").startswith("InternalServerError") for trial in self._failed())
        answer["TrainingJobStatusCounters"] = {
            "Completed": states.count("Completed"),
            "InProgress": states.count("InProgress") + states.count("Stopping"),
            "RetryableError": retryable,
            "NonRetryableError": states.count("Failed") - retryable,
            "Stopped": states.count("Stopped"),
        }
        answer["ObjectiveStatusCounters"] = {name: goals.count(name) for name in ("Succeeded", "Pending", "Failed")}
        best = self.best()
        if best is not None:
            answer["BestTrainingJob"] = self.summary(best)
        if answer.get("WarmStartConfig", {}).get("WarmStartType") == "IdenticalDataAndAlgorithm":
            overall = self._overall_best()
            answer |= {"OverallBestTrainingJob": overall} if overall else {}
        return answer


class Tuning:
    """All tuning jobs of the cloud."""

    def __init__(self, cloud: Cloud, jobs: Jobs, tags: Tags) -> None:
        self._cloud, self._jobs, self._tags = cloud, jobs, tags
        self._tuning: dict[str, TuningJob] = {}

    def create(self, request: Request) -> Record:
        """CreateHyperParameterTuningJob."""
        check_request(request)
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
            parents = self._parents(request)
            job = self._tuning[name] = TuningJob(self._cloud, self._jobs, request, parents)
            self._tags.add(resource, request.get("Tags", []))
        job.start()
        return {"HyperParameterTuningJobArn": resource}

    def _parents(self, request: Request) -> list[TuningJob]:
        """The earlier searches that a warm start names, held against SageMaker's restrictions."""
        names = warm_start.parents(request)
        for name in names:
            if name not in self._tuning:
                raise invalid(f"Parent tuning job {name!r} does not exist in this account and region: check its name.")
        found = [self._tuning[name] for name in names]
        warm_start.check(request, [job.record for job in found])
        before = sum(len(job.trials) for job in found)
        asked = int(request["HyperParameterTuningJobConfig"]["ResourceLimits"].get("MaxNumberOfTrainingJobs", 0))
        if found and before + asked > _MAX_JOBS:
            raise invalid(
                f"MaxNumberOfTrainingJobs={asked} and the parents' {before} training jobs are more than {_MAX_JOBS}: give fewer."
            )
        return found

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

        objective = "FinalHyperParameterTuningJobObjectiveMetric"
        by = request.get("SortBy", "Name")
        if by == "FinalObjectiveMetricValue":  # AWS lists only trials that have one then
            items = [item for item in items if objective in item]
        chosen = select(
            items,
            {**request, "SortBy": by},
            name="TrainingJobName",
            status="TrainingJobStatus",
            sort={"FinalObjectiveMetricValue": lambda item: item[objective]["Value"]},
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


def max_resource(config: Record, static: Mapping[str, str]) -> float:
    """Most units of resource (epochs) of a Hyperband trial; infinite for other strategies.

    SageMaker infers it from the static hyperparameters of these names, and refuses the request where it cannot.
    """
    if config["Strategy"] != "Hyperband":
        return math.inf
    given = config.get("StrategyConfig", {}).get("HyperbandStrategyConfig", {})
    names = ("epochs", "numepochs", "n-epochs", "n_epochs", "num_epochs")
    found = given.get("MaxResource") or next((static[name] for name in names if name in static), None)
    try:
        most = int(str(found))
    except ValueError:
        raise invalid(
            f"MaxResource of HyperbandStrategyConfig is missing, and none of {', '.join(names)} in StaticHyperParameters is a "
            "whole number to infer it from: give MaxResource."
        ) from None
    least = given.get("MinResource", 1)
    if least > most:
        raise invalid(f"MinResource={least} is more than MaxResource={most}: lower it.")
    return most


def check_request(request: Request) -> None:
    """Refuse a configuration that SageMaker refuses: missing parts, bad ranges and limits, Grid with anything but categories."""
    config = request["HyperParameterTuningJobConfig"]
    for part, where in (
        ("HyperParameterTuningJobObjective", config),
        ("ParameterRanges", config),
        ("TrainingJobDefinition", request),
    ):
        if part not in where:
            raise invalid(f"{part} is required.")
    static = request["TrainingJobDefinition"].get("StaticHyperParameters", {})
    ranges.check(config, static)
    _check_limits(config)
    _check_strategy(config, static)
    _check_metric(config, request["TrainingJobDefinition"])
    check_spot(request["TrainingJobDefinition"])


def _check_limits(config: Record) -> None:
    limits, strategy = config["ResourceLimits"], config["Strategy"]
    numeric = any(config["ParameterRanges"].get(f"{kind}ParameterRanges") for kind in ("Continuous", "Integer"))
    if strategy == "Grid":
        _check_grid(config["ParameterRanges"], limits, numeric=numeric)
    elif "MaxNumberOfTrainingJobs" not in limits:
        raise invalid(f"ResourceLimits.MaxNumberOfTrainingJobs is required for the strategy {strategy}.")
    most, parallel = limits.get("MaxNumberOfTrainingJobs", _MAX_JOBS), limits["MaxParallelTrainingJobs"]
    if most > _MAX_JOBS:
        raise invalid(f"MaxNumberOfTrainingJobs={most} is more than {_MAX_JOBS}.")
    if parallel > most:
        raise invalid(f"MaxParallelTrainingJobs={parallel} is more than MaxNumberOfTrainingJobs={most}: lower it.")


def _check_strategy(config: Record, static: Mapping[str, str]) -> None:
    strategy = config["Strategy"]
    if strategy == "Hyperband" and config.get("TrainingJobEarlyStoppingType") == "Auto":
        raise invalid("TrainingJobEarlyStoppingType must be Off for the Hyperband strategy, which has its own early stopping.")
    if strategy != "Hyperband" and config.get("StrategyConfig"):
        raise invalid(f"StrategyConfig belongs to the Hyperband strategy, not to {strategy}: remove it.")
    max_resource(config, static)


def _check_metric(config: Record, definition: Record) -> None:
    metric = config["HyperParameterTuningJobObjective"]["MetricName"]
    names = [item["Name"] for item in definition["AlgorithmSpecification"].get("MetricDefinitions", [])]
    if metric not in names:
        raise invalid(
            f"The objective metric {metric!r} is not in MetricDefinitions ({', '.join(names) or 'none'}): define its regex there."
        )


def _check_grid(given: Record, limits: Record, *, numeric: bool) -> None:
    if numeric:
        raise invalid("The Grid strategy accepts categorical parameters only: give CategoricalParameterRanges.")
    count, wanted = len(grid(given)), limits.get("MaxNumberOfTrainingJobs")
    if wanted is not None and wanted != count:
        raise invalid(f"MaxNumberOfTrainingJobs={wanted} must be {count}, the number of combinations of the grid, or be left out.")
    if count > _MAX_JOBS:
        raise invalid(f"The grid has {count} combinations, more than {_MAX_JOBS}: give fewer values.")
