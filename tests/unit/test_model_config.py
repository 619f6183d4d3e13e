"""Hyperparameters: strings in, a checked configuration or one clear line out."""

from __future__ import annotations

from pathlib import Path

import pytest
from classifier.config import TrainingConfig, parse
from classifier.errors import ConfigError
from model_fakes import run_script

from infra import requests


def test_strings_become_typed_values_and_recipes_bring_defaults():
    config = parse(["--recipe", "scratch", "--learning_rate=0.05", "--batch_size", "64.0", "--horizontal_flip", "True"])
    assert (config.learning_rate, config.batch_size, config.horizontal_flip) == (0.05, 64, True)
    assert (config.backbone, config.pretrained, config.image_size) == ("resnet18", "none", 32)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rat", "1"], ["learning_rat", "learning_rate"]),
        (["--learning_rate", "fast"], ["learning_rate", "'fast'", "a number"]),
        (["--learning_rate", "nan"], ["learning_rate", "nan", "range"]),
        (["--batch_size", "0"], ["batch_size=0", "1 to 8192"]),
        (["--batch_size", "6.5"], ["batch_size", "whole number"]),
        (["--horizontal_flip", "maybe"], ["horizontal_flip", "true or false"]),
        (["--recipe", "magic"], ["recipe='magic'", "head, finetune, lp-ft, scratch"]),
        (["--recipe", "head", "--pretrained", "none"], ["pretrained", "scratch"]),
        (["--image_size", "64", "--resize_size", "32"], ["resize_size=32", "image_size=64"]),
        (["--batch_size", "64", "--accumulation_steps", "3"], ["batch_size=64", "accumulation_steps=3"]),
        (["--recipe", "scratch", "--batch_norm", "frozen"], ["batch_norm=frozen", "scratch"]),
        (["--epochs"], ["epochs", "no value"]),
        (["--epochs", "1", "--epochs", "2"], ["epochs", "twice"]),
        (["stray"], ["stray", "--name value"]),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(argv: list[str], words: list[str]):
    with pytest.raises(ConfigError) as problem:
        parse(argv)
    assert all(word in str(problem.value) for word in words), str(problem.value)


def test_the_feature_job_s_defaults_are_those_of_the_training():
    from cache_features import Flags

    for name, text in requests._FEATURE_DEFAULTS.items():
        assert text == str(getattr(TrainingConfig(), name)).lower(), name
        assert getattr(Flags("", ""), name) == getattr(TrainingConfig(), name), name


def test_a_job_with_a_bad_hyperparameter_leaves_one_line_as_its_failure_reason(tmp_path: Path):
    done = run_script("hpo.py", "--learning_rate", "-1", SAGEMAKER_BASE_DIR=str(tmp_path), SM_OUTPUT_DIR=str(tmp_path / "output"))
    reason = (tmp_path / "output" / "failure").read_text()
    assert done.returncode == 1
    assert reason == "learning_rate=-1.0 is outside 1e-06 to 10: choose a value in that range"
    assert done.stderr.strip() == f"error: {reason}"
