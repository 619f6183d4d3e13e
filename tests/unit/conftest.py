"""Fixtures that several files of tests share."""

from __future__ import annotations

from typing import Any

import pytest

from infra.verify.configurations import CONFIGURATIONS
from infra.verify.deployment import synthesise_all


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Configuration -> template, all of them; cdk-nag's and CDK's own findings would be errors."""
    return synthesise_all(tmp_path_factory.mktemp("assemblies"), CONFIGURATIONS)
