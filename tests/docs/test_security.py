"""docs/faults.md has every row, docs/security.md names what exists, and no tracked file holds a secret."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import fault_table
import pytest

PROJECT = Path(__file__).resolve().parents[2]
PATTERNS = {
    "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_[A-Za-z0-9_]{60,}",
    "Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "PyPI token": r"\bpypi-[A-Za-z0-9_-]{50,}",
    "JSON web token": r"\beyJ[A-Za-z0-9_-]{20,}\.eyJ[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{20,}",
    "bearer token": r"[Bb]earer [A-Za-z0-9_-]{40,}",
}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True).stdout
    return [PROJECT / name for name in listed.decode().split("\0") if name and (PROJECT / name).is_file()]


def found(text: str) -> list[str]:
    return [name for name, pattern in PATTERNS.items() if re.search(pattern, text)]


EXAMPLES = ["AKIA" + "A1B2" * 4, "-----BEGIN RSA " + "PRIVATE KEY-----", "ghp_" + "aB3" * 12, "xoxb-" + "1" * 24,
            "AIza" + "a" * 35, "npm_" + "a" * 36, "pypi-" + "a" * 60, ".".join(["eyJ" + "a" * 30] * 2 + ["b" * 30]),
            "Bearer " + "a1" * 24]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text[:6])
def test_a_secret_would_be_found(example: str):
    assert found(f"x = '{example}'")


def test_no_tracked_file_holds_a_secret():
    files = tracked()
    assert len(files) > 200
    assert {path.name: hits for path in files if (hits := found(path.read_text("utf-8", "replace")))} == {}


def test_every_row_is_on_the_page_and_has_its_tests():
    rows = re.findall(
        r"^\| (\d+) \| .* \| ([\d,]+) \| (\d+) \| (.*?) \| ([\d,]+) \| 20[\d-]+, Python [\d.]+ \|$",
        fault_table.PAGE.read_text(),
        re.MULTILINE,
    )
    assert [int(row[0]) for row in rows] == list(fault_table.ROWS)
    for number, injections, tests, result, _ in rows:
        assert result == "passed", number
        assert int(injections.replace(",", "")) > 0, number
        assert int(tests) > 0, number
    marked = " ".join(path.read_text() for path in (PROJECT / "tests" / "faults").glob("test_*.py"))
    assert {int(number) for number in re.findall(r"mark\.fault\((\d+)\)", marked)} == set(fault_table.ROWS)


def test_the_threat_model_explains_every_row():
    text = (PROJECT / "docs" / "security.md").read_text()
    told = {int(number) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for number in row.split(",")}
    assert told == set(fault_table.ROWS)


def test_the_files_that_it_names_exist():
    text = (PROJECT / "docs" / "security.md").read_text()
    for name in re.findall(r"`((?:tests|docs|infra|model_code|lambdas)/[^`*]+)`", text):
        assert (PROJECT / name).exists(), name
