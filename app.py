"""Entry point of ``cdk``: the stage's configuration becomes its stack. Calls no AWS service."""

from __future__ import annotations

import aws_cdk as cdk
from cdk_nag import AwsSolutionsChecks

from infra.config import load
from infra.stack import ImageClassifier


def synthesise(app: cdk.App) -> None:
    """Synthesise the stage that the app's context names; CDK's and cdk-nag's findings are errors."""
    config = load(app.node)
    cdk.Validations.of(app).add_plugins(AwsSolutionsChecks(app))
    ImageClassifier(app, config.stack_name, config=config)
    cdk.Tags.of(app).add("project", config.prefix)
    app.synth()


if __name__ == "__main__":
    synthesise(cdk.App())
