"""Warm start of a tuning job: SageMaker's restrictions ("Run a Warm Start Hyperparameter Tuning Job" in its guide).

Sentences in AWS's own words are those that users quote from it; the others name value, expectation and remedy as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from local_cloud.sagemaker.common import Record, Request, invalid
from local_cloud.sagemaker.ranges import dimensions

_TERMINAL = ("Completed", "Stopped", "Failed")
_STRATEGIES = ("Bayesian", "Random")
_MAX_CHANGES = 10
_OBJECTIVE = "_tuning_objective_metric"
"""SageMaker adds it to the static hyperparameters of every tuning job."""
_MAY_CHANGE = (
    *("AlgorithmSpecification", "InputDataConfig", "OutputDataConfig", "StaticHyperParameters", "RoleArn", "ResourceConfig"),
    *("StoppingCondition", "VpcConfig", "EnableManagedSpotTraining", "CheckpointConfig"),
)


def parents(request: Request) -> list[str]:
    """Names of the tuning jobs to start from; empty without a warm start."""
    given = request.get("WarmStartConfig", {}).get("ParentHyperParameterTuningJobs", [])
    names = [item.get("HyperParameterTuningJobName", "") for item in given]
    for name in names:
        if names.count(name) > 1:
            raise invalid(f"WarmStartConfig names the parent tuning job {name!r} twice: keep one.")
    return names


def check(request: Request, found: Sequence[Record]) -> None:
    """Refuse what SageMaker refuses. ``found`` are the parents' descriptions."""
    strategy = request["HyperParameterTuningJobConfig"]["Strategy"]
    if found and strategy not in _STRATEGIES:
        raise invalid(f"Strategy is {strategy} with a WarmStartConfig; expected {' or '.join(_STRATEGIES)}: leave one of them out.")
    for parent in found:
        _check_ended(parent)
        _check_objective(request, parent)
        _check_hyperparameters(request, parent)
        _check_definition(request, parent)


def _check_ended(parent: Record) -> None:
    status = parent["HyperParameterTuningJobStatus"]
    if status not in _TERMINAL:
        raise invalid(
            f"Parent tuning job {parent['HyperParameterTuningJobName']!r} is {status}; expected one of {', '.join(_TERMINAL)}: "
            "wait until it has ended."
        )


def _check_objective(request: Request, parent: Record) -> None:
    own, old = (job["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"] for job in (request, parent))
    if own != old:
        raise invalid(
            f"The objective is {own['Type']} {own['MetricName']}; expected {old['Type']} {old['MetricName']}, that of the parent "
            f"tuning job {parent['HyperParameterTuningJobName']!r}."
        )


def _check_hyperparameters(request: Request, parent: Record) -> None:
    own_kinds, old_kinds = _kinds(request), _kinds(parent)
    own_static, old_static = _static(request), _static(parent)
    if own_kinds.keys() | own_static.keys() != old_kinds.keys() | old_static.keys():
        raise invalid(
            "The set of tunable plus static HyperParameter names is not the same across current and parent tuning jobs. Please "
            "ensure this set is constant when warm starting. Note that previously static HyperParameters can be tuned in warm "
            f"start jobs and vice versa. ({_difference({**own_kinds, **own_static}, {**old_kinds, **old_static})})"
        )
    for name in own_kinds.keys() & old_kinds.keys():
        if own_kinds[name] != old_kinds[name]:
            raise invalid(
                f"The hyperparameter {name!r} is {own_kinds[name].lower()}; expected {old_kinds[name].lower()}, as in the parent "
                f"tuning job {parent['HyperParameterTuningJobName']!r}."
            )
    changes = _changes(parent, own_static, old_static)
    if changes > _MAX_CHANGES:
        raise invalid(
            f"{changes} changes of static hyperparameters since the parent tuning job {parent['HyperParameterTuningJobName']!r}; "
            f"expected at most {_MAX_CHANGES}."
        )


def _difference(own: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    """Which names differ: what a user needs to know to mend it."""
    added, missing = sorted(own.keys() - old.keys()), sorted(old.keys() - own.keys())
    parts = [f"only here: {', '.join(added)}"] * bool(added) + [f"only in the parent: {', '.join(missing)}"] * bool(missing)
    return "; ".join(parts)


def _changes(parent: Record, own: Mapping[str, str], old: Mapping[str, str]) -> int:
    """AWS's count: two for a static value that changed, and for a range made static one, or as many as it had categories."""
    changed = sum(2 for name in own.keys() & old.keys() if own[name] != old[name])
    fixed = [space for space in dimensions(parent["HyperParameterTuningJobConfig"]["ParameterRanges"]) if space.name in own]
    return changed + sum(len(space.item.get("Values", "1")) for space in fixed)


def _check_definition(request: Request, parent: Record) -> None:
    own, old = request["TrainingJobDefinition"], parent["TrainingJobDefinition"]
    for name in sorted(own.keys() | old.keys()):
        if name not in _MAY_CHANGE and own.get(name) != old.get(name):
            fields = ", ".join(field[0].lower() + field[1:] for field in _MAY_CHANGE)
            raise invalid(f"Only the following fields in TrainingJobDefinition are allowed to change: [{fields}]. ({name} changed)")
    if request["WarmStartConfig"]["WarmStartType"] == "IdenticalDataAndAlgorithm":
        images = [definition["AlgorithmSpecification"].get("TrainingImage") for definition in (own, old)]
        if images[0] != images[1]:
            raise invalid(
                f"TrainingImage is {images[0]}; expected {images[1]}, that of the parent tuning job, with the warm start type "
                "IdenticalDataAndAlgorithm: use it, or TransferLearning."
            )


def _kinds(job: Mapping[str, Any]) -> dict[str, str]:
    """Searched hyperparameter -> kind of its range."""
    return {space.name: space.kind for space in dimensions(job["HyperParameterTuningJobConfig"]["ParameterRanges"])}


def _static(job: Mapping[str, Any]) -> dict[str, str]:
    given = job["TrainingJobDefinition"].get("StaticHyperParameters", {})
    return {name: value for name, value in given.items() if name != _OBJECTIVE}
