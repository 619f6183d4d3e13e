"""The configuration: stages resolve, and every mistake is one line with value, expectation and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.config import ConfigError, load, merged

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
        ({"override": '{"endpoint": {"memory": 1}}'}, "endpoint.memory is unknown; expected one of deadline_s, instance_count"),
        ({"override": '{"endpoint": {"instance_count": 0}}'}, "endpoint.instance_count is 0"),
        ({"override": '{"name": "very-long-name"}'}, "name and stage make 'very-long-name-dev'; expected at most 12"),
        ({"override": '{"training": {"volume_gb": 1}}'}, "training.volume_gb is 1"),
        ({"override": '{"training": {"instance_type": "m5.large"}}'}, "training.instance_type is 'm5.large'"),
        ({"override": '{"training": {"spot": true, "max_wait_s": 60}}'}, "max_wait_s is 60; expected 0 or at least"),
        ({"override": '{"processing": {"spot": true}}'}, "SageMaker has no spot for processing jobs"),
        ({"override": '{"input": {"tuning": {"learning_rate": [0.1, 0.01]}}}'}, "learning_rate is [0.1, 0.01]"),
        ({"override": '{"input": {"tuning": {"max_jobs": 400}}}'}, "expected at most max_trials = 100"),
        ({"override": '{"input": {"pretrained": "none"}}'}, "recipe is head with pretrained none"),
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


def test_merging_replaces_lists_and_scalars_and_joins_objects():
    assert merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}}
