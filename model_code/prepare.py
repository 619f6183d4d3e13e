"""Processing job: pictures in S3 or an archive become a checked, content-addressed data set."""

from __future__ import annotations


def main(argv: list[str]) -> None:
    """Prepare the data set that the flags name."""
    # Worker processes import this file before they start; they need none of this.
    from classifier.config import parse_dataclass
    from classifier.preparation import PrepareFlags, prepare

    prepare(parse_dataclass(PrepareFlags, argv))


if __name__ == "__main__":
    from classifier.errors import run_entry_point

    run_entry_point(main)
