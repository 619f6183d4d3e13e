"""Processing job: pictures in S3 or an archive become a checked, content-addressed data set."""

from __future__ import annotations

from classifier.cpus import cpu_count
from classifier.errors import run_entry_point
from classifier.workforce import Workforce


def warm_up() -> None:
    """Import what looks at pictures."""
    from classifier import pictures

    pictures.warm_up()


def main(argv: list[str]) -> None:
    """Prepare the data set that the flags name."""
    with Workforce(cpu_count(), warm_up) as workforce:
        # Only now: what these import starts threads.
        from classifier.config import parse_dataclass
        from classifier.preparation import PrepareFlags, prepare

        prepare(parse_dataclass(PrepareFlags, argv), workforce)


if __name__ == "__main__":
    run_entry_point(main)
