"""Files that are never half written: somebody may be reading them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from classifier.markup import finite


def replace_text(path: Path, text: str) -> None:
    """Write under another, hidden name, then rename; processes may write beside each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def to_text(value: Any) -> str:
    """One line of strict JSON: what it cannot say is null, dates and other objects are their text."""
    return json.dumps(finite(value), ensure_ascii=False, default=str) + "\n"
