"""Files that are never half written: somebody may be reading them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classifier.markup import finite


def replace_text(path: Path, text: str) -> None:
    """Write under another, hidden name, then rename; processes may write beside each other."""
    replace_texts({path: text})


def replace_texts(texts: Mapping[Path, str]) -> None:
    """Files that belong together: none has its name before all are written, so a full disk leaves the earlier ones."""
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in texts}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partials[path].write_text(text, encoding="utf-8")
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def to_text(value: Any) -> str:
    """One line of strict JSON: what it cannot say is null, dates and other objects are their text."""
    return json.dumps(finite(value), ensure_ascii=False, default=str) + "\n"
