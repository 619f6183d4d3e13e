"""Real pictures and an ImageNet backbone through the same state machine: the frozen-backbone recipe, features cached once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from local_cloud import source

pytestmark = [pytest.mark.pipeline, pytest.mark.real_data]

WEIGHTS = "mobilenet_v2_imagenet_b.pth"


def train(deployed, real_data: Path, data: str, scratch: Path):
    s3, bucket = deployed.cloud.client("s3"), deployed.outputs["DataBucket"]
    source.put(s3, bucket, source._zip(real_data / "data" / data, scratch), f"incoming/{data}.zip")
    source.put(s3, bucket, real_data / "weights" / WEIGHTS, f"incoming/weights/{WEIGHTS}")
    given = {
        "source": f"incoming/{data}.zip",
        "recipe": "head",
        "backbone": "mobilenet_v2",
        "pretrained": f"incoming/weights/{WEIGHTS}",
        "image_size": 224,
        "hyperparameters": {"epochs": 30, "horizontal_flip": True},
        "tuning": {"max_jobs": 3, "max_parallel_jobs": 2},
    }
    follower, ended = deployed.execute(given)
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    return [visit.name for visit in follower.visits], json.loads(ended["output"])


@pytest.mark.slow
def test_ten_breeds_on_cached_features(real_data, deployed, tmp_path):
    """0.933 is what a linear layer on the same features reaches, fitted apart; 60 test pictures."""
    states, output = train(deployed, real_data, "dogs-10", tmp_path)
    assert "CacheFeatures" in states
    assert output["test_top1"] >= 0.90
    picture = next((real_data / "data" / "dogs-10" / "test").glob("*pug/*.jpg"))
    status, answer = deployed.post(picture.read_bytes(), **deployed.authorized, **{"Content-Type": "image/jpeg"})
    assert (status, answer["predictions"][0]["label"]) == (200, "pug")


@pytest.mark.slow
@pytest.mark.timeout(2400)  # 16,560 passes through the backbone: ten minutes on two slow cores alone, longer beside other tests
def test_a_hundred_and_twenty_breeds_on_cached_features(real_data, deployed, tmp_path):
    _, output = train(deployed, real_data, "dogs-120", tmp_path)
    assert output["test_top1"] >= 0.74
