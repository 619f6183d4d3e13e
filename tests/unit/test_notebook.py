"""The notebook as it is stored; ``tests/pipeline/test_report.py`` executes it on a real run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOK = PROJECT / "notebooks" / "explore_run.ipynb"


def test_the_notebook_says_what_it_wants_when_no_run_is_named():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(PROJECT)}})
    with pytest.raises(CellExecutionError, match="expected s3://<bucket>/runs/<execution>"):
        client.execute(env={name: value for name, value in os.environ.items() if name != "RUN_URI"})


def test_the_notebook_is_stored_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
