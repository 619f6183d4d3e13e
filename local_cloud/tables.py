"""The lists in ``local_cloud/README.md``, made from the tables that the code itself obeys.

``python -m local_cloud.tables`` prints them, ``--write`` puts them into the README. ``tests/unit/test_local_tables.py`` fails when
the two differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from local_cloud import codebuild, dockerfile, interpreter, stepfunctions
from local_cloud.sagemaker.options import IGNORED, REFUSED, SUPPORTED, VALUES

README = Path(__file__).with_name("README.md")
BEGIN = "<!-- tables: written by `python -m local_cloud.tables --write`; do not edit -->"
END = "<!-- end of the tables -->"
_TUNING = "CreateHyperParameterTuningJob"
_DEFINITION = "TrainingJobDefinition."


def tables() -> str:
    """Markdown of every list, in the README's order."""
    parts = [
        "### SageMaker: emulated",
        _table(("operation", "fields"), _supported_rows()),
        "`InvokeEndpoint` (SageMaker Runtime) is emulated too. An operation that is not listed is refused.",
        "### SageMaker: accepted without effect",
        _table(("field", "of", "why it changes nothing here"), _by_field(IGNORED)),
        "### SageMaker: only these values",
        _table(("field", "of", "values", "why"), _value_rows()),
        "### SageMaker: refused",
        _table(("field", "of", "why, or what to do"), _by_field(REFUSED)),
        "A field that is in no table is refused as well. What `CreateTrainingJob` is refused, a tuning job's definition is too.",
        "### Step Functions",
        f"Answered here: {_codes(stepfunctions.OPERATIONS)}. Everything else of the service is ministack's.",
        f"Task states may call {_codes(interpreter.SERVICES)}. Waited for with `.sync`: "
        f"{_codes(f'{service}:{action}' for service, action in interpreter.SYNC_JOBS)}; other `.sync` and "
        "`.waitForTaskToken` integrations are refused.",
        "### CodeBuild",
        f"`StartBuild` takes {_codes(codebuild.SUPPORTED)}. Without effect:",
        _table(("field of `StartBuild`", "why it changes nothing here"), _reasons(codebuild.IGNORED)),
        "Every other field is refused. So is a project whose source is not a `.zip` in S3, whose buildspec does not run "
        "`docker build` and `docker push`, or that lacks the variables `REPOSITORY_URI` and `IMAGE_TAG`.",
        "### Dockerfiles",
        "Executed: `FROM python:<version>` (one stage), `ARG`, `ENV`, `WORKDIR`, `COPY` and `ADD` of plain files, `ENTRYPOINT` and "
        "`CMD` in JSON form, and `RUN` with `mkdir`, `python -m compileall` and `pip install`, the latter with the options "
        f"{_codes([*dockerfile.PIP_KEPT, *dockerfile.PIP_FILES])}; {_codes(dockerfile.PIP_IGNORED)} change nothing. Nor do:",
        _table(("instruction", "why it changes nothing here"), _reasons(dockerfile.IGNORED)),
        _table(("command of `RUN`", "why it changes nothing here"), _reasons(dockerfile.IGNORED_COMMANDS)),
        "Everything else is refused, with its line number.",
    ]
    return "\n\n".join(parts)


def inserted(text: str) -> str:
    """``text`` of the README with fresh tables between its two marks. Raises ``ValueError`` when a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name} lacks the marks {BEGIN!r} and {END!r}: put them where the tables belong")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _supported_rows() -> list[tuple[str, ...]]:
    """One row for operations that take the same fields (all the Lists do)."""
    operations: dict[frozenset[str], list[str]] = {}
    for operation in sorted(SUPPORTED):
        operations.setdefault(SUPPORTED[operation], []).append(operation)
    return [(_codes(names), _codes(fields)) for fields, names in operations.items()]


def _by_field(table: Mapping[str, Mapping[str, str]]) -> list[tuple[str, ...]]:
    """One row for a field and its reason, however many operations share them."""
    operations: dict[tuple[str, str], list[str]] = {}
    for operation, fields in table.items():
        for path, why in fields.items():
            operations.setdefault((_short(operation, path), why), []).append(_owner(operation, path))
    return [(f"`{path}`", _codes(names), why) for (path, why), names in operations.items()]


def _value_rows() -> list[tuple[str, ...]]:
    operations: dict[tuple[str, tuple[Any, ...], str], list[str]] = {}
    for operation, fields in VALUES.items():
        for path, (values, why) in fields.items():
            operations.setdefault((_short(operation, path), values, why), []).append(_owner(operation, path))
    return [(f"`{path}`", _codes(names), _codes(values), why) for (path, values, why), names in operations.items()]


def _short(operation: str, path: str) -> str:
    """A tuning job's training definition obeys the rules of training jobs: named once, for both."""
    return path.removeprefix(_DEFINITION) if operation == _TUNING else path


def _owner(operation: str, path: str) -> str:
    return f"{operation}.{_DEFINITION[:-1]}" if operation == _TUNING and path.startswith(_DEFINITION) else operation


def _reasons(table: Mapping[str, str]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", why) for name, why in table.items()]


def _codes(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name if isinstance(name, str) else json.dumps(name)}`" for name in sorted(names, key=str))


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Print the tables, or write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace the tables in {README.name}")
    if parser.parse_args().write:
        README.write_text(inserted(README.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
