"""Processing job: classifies every picture under a prefix and writes Parquet and CSV."""

from __future__ import annotations

from classifier.batch_job import BatchFlags, classify
from classifier.config import parse_dataclass
from classifier.errors import run_entry_point, write_message


def main(argv: list[str]) -> None:
    """Classify the pictures that the flags name."""
    summary = classify(parse_dataclass(BatchFlags, argv))
    said = f"pictures={summary['pictures']} failed={summary['failed']} pictures_per_s={summary['pictures_per_s']}"
    print(said, flush=True)
    write_message(said)


if __name__ == "__main__":
    run_entry_point(main)
