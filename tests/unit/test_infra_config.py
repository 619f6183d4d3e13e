"""The configuration: stages resolve, and every mistake is one line with value, expectation and remedy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from infra.config import ConfigError, load, merged
from infra.machines import GPUS
from local_cloud.validation import service_model

CONTEXT = json.loads((Path(__file__).resolve().parents[2] / "cdk.json").read_text())["context"]


class Node:
    """A stand-in for a construct node with cdk.json's context."""

    def __init__(self, **values: Any) -> None:
        self.values = CONTEXT | values

    def try_get_context(self, key: str) -> Any:
        return self.values.get(key)


@pytest.mark.parametrize("stage", ["dev", "prod", "local"])
def test_stages_load(stage: str):
    config = load(Node(stage=stage))
    assert config.stage == stage
    assert len(config.prefix) <= 12


def test_dev_costs_nothing_when_idle_and_prod_keeps_its_data():
    assert load(Node(stage="dev")).endpoint.mode == "serverless"
    assert load(Node(stage="dev")).destroys_data
    assert not load(Node(stage="prod")).destroys_data


def test_a_stage_inherits_what_it_does_not_say():
    local = load(Node(stage="local"))
    assert local.input.recipe == "scratch"
    assert local.processing == load(Node(stage="dev")).processing


def test_override_changes_single_values():
    config = load(Node(override='{"training": {"spot": true}}'))
    assert config.training.spot
    assert config.training.wait_s == 2 * config.training.max_runtime_s


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": "staging"}, "stage is 'staging'; expected one of dev, local, prod"),
        ({"override": "{"}, "override is '{'; expected a JSON object"),
        ({"override": "[1]"}, "expected a JSON object such as"),
        ({"override": '{"endpoint": {"mode": "big"}}'}, "endpoint.mode is 'big'"),
        ({"override": '{"endpoint": {"memory": 1}}'}, "endpoint.memory is unknown; expected one of bake_s, canary_percent"),
        ({"override": '{"endpoint": {"min_instances": 0}}'}, "endpoint.min_instances is 0"),
        ({"override": '{"endpoint": {"min_instances": 3}}'}, "max_instances is 1; expected at least min_instances = 3"),
        ({"override": '{"endpoint": {"idle_hours": 2}}'}, "idle_hours is 2 with mode serverless; expected 0"),
        ({"override": '{"endpoint": {"mode": "realtime", "update": "canary"}}'}, "update is canary with min_instances 1"),
        ({"override": '{"endpoint": {"update": "rolling", "canary_percent": 2}}'}, "canary_percent is 2 with update rolling"),
        ({"override": '{"api": {"cors_origins": ["*"]}}'}, "cors_origins"),
        ({"override": '{"name": "very-long-name"}'}, "name and stage make 'very-long-name-dev'; expected at most 12"),
        ({"override": '{"training": {"volume_gb": 1}}'}, "training.volume_gb is 1"),
        ({"override": '{"training": {"instance_type": "m5.large"}}'}, "training.instance_type is 'm5.large'"),
        ({"override": '{"training": {"spot": true, "max_wait_s": 60}}'}, "max_wait_s is 60; expected 0 or at least"),
        ({"override": '{"processing": {"spot": true}}'}, "SageMaker has no spot for processing jobs"),
        ({"override": '{"input": {"tuning": {"learning_rate": [0.1, 0.01]}}}'}, "learning_rate is [0.1, 0.01]"),
        ({"override": '{"input": {"tuning": {"max_jobs": 400}}}'}, "expected at most max_trials = 100"),
        ({"override": '{"input": {"pretrained": "none"}}'}, "recipe is head with pretrained none"),
        ({"override": '{"input": {"recipe": "lp-ft", "pretrained": "none"}}'}, "recipe is lp-ft with pretrained none"),
        (
            {"override": '{"input": {"tuning": {"ranges": {"epochs": {"min": 2, "max": 1}}}}}'},
            "min is 2 and max 1; expected min < max",
        ),
        ({"override": '{"input": {"tuning": {"ranges": {"epochs": {"max": 1}}}}}'}, "ranges.epochs.range.min is missing"),
        ({"override": '{"input": {"tuning": {"ranges": {"epochs": {"low": 1}}}}}'}, "expected one of integer, max, min, scale"),
        (
            {"override": '{"input": {"tuning": {"ranges": {"epochs": {"min": 0, "max": 1, "scale": "Logarithmic"}}}}}'},
            "min is 0 with scale Logarithmic; expected more than 0",
        ),
        (
            {"override": '{"input": {"tuning": {"ranges": {"momentum": {"min": 0, "max": 1, "scale": "ReverseLogarithmic"}}}}}'},
            "scale is ReverseLogarithmic; expected numbers from 0 to below 1",
        ),
        (
            {"override": '{"input": {"tuning": {"ranges": {"epochs": {"min": 1, "max": 2.5, "integer": true}}}}}'},
            "expected whole numbers",
        ),
        ({"override": '{"input": {"tuning": {"ranges": {"epochs": []}}}}'}, "ranges.epochs.list is []"),
        ({"override": '{"input": {"tuning": {"warm_start": ["not a name"]}}}'}, "warm_start.0 is 'not a name'"),
        ({"override": '{"processing": {"instance_count": 2}}'}, "processing.instance_count is 2; expected 1: only PrepareData"),
        ({"override": '{"prepare_instances": 21}'}, "prepare_instances is 21"),
        ({"override": '{"training": {"instance_count": 17}}'}, "training.instance_count is 17"),
        ({"override": '{"training": {"instance_count": 2}}'}, "training.instance_count is 2 with recipe head; expected 1"),
        ({"override": '{"tuning_jobs": {"instance_count": 2}}'}, "tuning_jobs.instance_count is 2 with recipe head; expected 1"),
        ({"override": '{"training": {"instance_type": "ml.g99.large"}}'}, "instance_type is 'ml.g99.large'; expected a machine"),
        ({"api_url": "http://localhost"}, "expected a template with {api}"),
        ({"stages": None}, "context.stages is missing"),
        ({"stages": {"dev": {"extends": "dev"}}}, "extend each other"),
        ({"stages": {"dev": {}}}, "input is missing; add it"),
        ({"stages": {"dev": {"stage": "x"}}}, "remove the name 'stage'"),
    ],
)
def test_mistakes_are_refused_with_advice(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        load(Node(**values))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "distributed"),
    [
        ({"instance_type": "ml.m5.24xlarge"}, False),
        ({"instance_type": "ml.g5.xlarge"}, False),
        ({"instance_type": "ml.g5.12xlarge"}, True),
        ({"instance_type": "ml.m5.xlarge", "instance_count": 2}, True),
    ],
)
def test_a_training_is_distributed_on_several_gpus_or_machines(machine: dict[str, Any], distributed: bool):
    config = load(Node(stage="prod", override=json.dumps({"training": machine})))
    assert config.training.distributed is distributed


def test_gpu_counts_are_those_of_the_sdk():
    """The SDK's table, read as a file because importing the SDK is slow; it misspells one type and lacks the newest ones."""
    spec = importlib.util.find_spec("sagemaker")
    assert spec is not None
    assert spec.submodule_search_locations
    table = Path(spec.submodule_search_locations[0]) / "core" / "image_uri_config" / "instance_gpu_info.json"
    known = {name: entry["Count"] for name, entry in json.loads(table.read_text())["us-east-1"].items() if name in GPUS}
    assert len(known) >= 20
    assert {name: GPUS[name] for name in known} == known


def test_every_gpu_type_that_sagemaker_trains_on_is_in_the_table():
    model = service_model("sagemaker")
    offered = {name for name in model.shape_for("TrainingInstanceType").enum if name.startswith(("ml.g", "ml.p"))}
    assert {name for name in offered - set(GPUS) if not name.startswith("ml.g7.")} == set()


def test_merging_replaces_lists_and_scalars_and_joins_objects():
    assert merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}}
