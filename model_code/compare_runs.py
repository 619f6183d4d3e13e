"""Compares all runs of a bucket on one page: ``python model_code/compare_runs.py --bucket_uri s3://bucket --report folder``."""

from __future__ import annotations

from classifier.comparing import CompareFlags, compare
from classifier.config import parse_dataclass
from classifier.errors import run_entry_point


def main(argv: list[str]) -> None:
    """Compare the runs of the bucket that the flags name."""
    flags = parse_dataclass(CompareFlags, argv)
    rows = compare(flags)
    print(f"runs={len(rows)} page={flags.report}/runs.html", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
