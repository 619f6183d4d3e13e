"""The README of the local cloud lists what the code does, no more and no less."""

from __future__ import annotations

import re

import pytest

from local_cloud import tables
from local_cloud.sagemaker.options import IGNORED, REFUSED, SUPPORTED, VALUES

TEXT = tables.README.read_text()


def test_readme_holds_the_tables_as_they_are_now() -> None:
    assert tables.inserted(TEXT) == TEXT, "run: python -m local_cloud.tables --write"


@pytest.mark.parametrize("table", [SUPPORTED, IGNORED, VALUES, REFUSED])
def test_every_field_is_listed(table) -> None:
    listed = set(re.findall(r"`([^`\n]+)`", tables.tables()))
    for operation, fields in table.items():
        assert any(name.split(".")[0] == operation for name in listed)
        missing = [path for path in fields if path not in listed and path.removeprefix("TrainingJobDefinition.") not in listed]
        assert missing == []


def test_a_reason_that_changes_makes_the_readme_stale(monkeypatch) -> None:
    monkeypatch.setitem(REFUSED["CreateModel"], "VpcConfig", "a reason nobody wrote down")
    assert tables.inserted(TEXT) != TEXT


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks the marks"):
        tables.inserted(TEXT.replace(tables.END, ""))
