"""The rules on a training: on its saved tensors, its epochs and the balance of its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from classifier.debugging import history_rules, tensor_rules
from classifier.findings import Finding


def training_findings(tensors: Path, history: list[dict[str, Any]], class_counts: list[int]) -> tuple[list[Finding], list[str]]:
    """``(findings, notes on what could not be read)``."""
    findings: list[Finding] = []
    notes = []
    try:
        findings += tensor_rules(tensors)
    except Exception as problem:
        notes.append(f"the saved tensors could not be read ({type(problem).__name__}: {problem})")
    return findings + history_rules(history, class_counts), notes
