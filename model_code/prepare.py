"""Processing job: pictures in S3 or an archive become a checked, content-addressed data set."""

from __future__ import annotations

from classifier.config import parse_dataclass
from classifier.errors import run_entry_point
from classifier.preparation import PrepareFlags, prepare


def main(argv: list[str]) -> None:
    """Prepare the data set that the flags name."""
    prepare(parse_dataclass(PrepareFlags, argv))


if __name__ == "__main__":
    run_entry_point(main)
