"""Which tests run in one process, and in which order, when pytest-xdist runs them in several (``make test`` and ``make test-all``).

The tests of a file stay together, for they share the file's fixtures. So do files that share what takes minutes to make: a deployed
stack with its one whole execution, the templates of all configurations. The long ones begin first, so that the processes end at
about the same time.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

GROUPS = {
    "deployment": (
        *(f"tests/pipeline/test_{name}.py" for name in ("execution", "page", "permissions", "real_dogs", "redeploy", "report")),
        *(f"tests/pipeline/test_{name}.py" for name in ("serving", "updates")),
        *(f"tests/faults/test_{name}.py" for name in ("calls", "clocks", "endpoint", "jobs", "secrets")),
    ),
    "templates": (
        "tests/docs/test_operations.py",
        *(f"tests/unit/test_{name}.py" for name in ("infra_configurations", "infra_template", "verify")),
    ),
}
"""Name -> files whose tests run in one process."""
ORDER = ("tests/pipeline/", "tests/faults/", "tests/docs/", *GROUPS["templates"], "tests/")
"""Faults come after the other tests of a deployment, which begin with one that has no model yet."""
SHARED = {"deployed": "deployment", "templates": "templates"}
"""Fixture that takes minutes to make -> the group of all tests that use it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, group in SHARED.items():
            if fixture in getattr(item, "fixturenames", ()) and not item.nodeid.startswith(GROUPS[group]):
                raise pytest.UsageError(f"{item.nodeid} uses {fixture!r}: add its file to the group {group!r} in tests/workers.py")
    items.sort(key=lambda item: next(place for place, start in enumerate(ORDER) if item.nodeid.startswith(start)))


class Scheduling(LoadFileScheduling):  # type: ignore[misc]
    """``--dist loadfile`` with the groups above. (Marks, ``--dist loadgroup``, do nothing with pytest 9.2:
    https://github.com/pytest-dev/pytest-xdist/issues/1386.)"""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return next((name for name, files in GROUPS.items() if file.startswith(files)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    config.option.loadscopereorder = False  # by the number of tests; ours are in their order already
    return Scheduling(config, log)
