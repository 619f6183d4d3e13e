"""The tables of emulated, ignored and refused fields agree with AWS's own model and with each other."""

from __future__ import annotations

import botocore.session
import pytest
from botocore.model import Shape

from local_cloud.sagemaker.options import IGNORED, REFUSED, SUPPORTED, VALUES

MODEL = botocore.session.get_session().get_service_model("sagemaker")
PATHS = sorted(
    {(operation, path) for table in (SUPPORTED, IGNORED, VALUES, REFUSED) for operation, paths in table.items() for path in paths}
)


def find(shape: Shape, path: str) -> Shape | None:
    for name in path.split("."):
        while shape.type_name == "list":
            shape = shape.member
        if shape.type_name != "structure" or name not in shape.members:
            return None
        shape = shape.members[name]
    return shape


def test_every_path_exists_in_botocore() -> None:
    missing = []
    for operation, path in PATHS:
        shape = MODEL.operation_model(operation).input_shape
        # One List table serves all List operations; not each has every filter.
        if find(shape, path) is None and not operation.startswith("List"):
            missing.append(f"{operation}.{path}")
    assert missing == []


@pytest.mark.parametrize("operation", sorted(SUPPORTED))
def test_no_field_is_both_accepted_and_refused(operation: str) -> None:
    accepted = SUPPORTED[operation] | IGNORED.get(operation, {}).keys()
    assert not accepted & REFUSED.get(operation, {}).keys()
    assert not SUPPORTED[operation] & IGNORED.get(operation, {}).keys()


@pytest.mark.parametrize("operation", ["CreateTrainingJob", "CreateProcessingJob", "CreateModel", "CreateEndpointConfig"])
def test_every_top_level_field_has_an_answer(operation: str) -> None:
    listed = {path.split(".")[0] for table in (SUPPORTED, IGNORED, REFUSED) for path in table.get(operation, ())}
    assert set(MODEL.operation_model(operation).input_shape.members) <= listed
