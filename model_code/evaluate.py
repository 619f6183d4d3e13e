"""Processing job: calibrates on valid, measures test once, compares with the champion, packs the final artifact."""

from __future__ import annotations

from classifier.config import parse_dataclass
from classifier.errors import run_entry_point
from classifier.evaluation import EvaluateFlags, evaluate


def main(argv: list[str]) -> None:
    """Evaluate the model that the flags name."""
    summary = evaluate(parse_dataclass(EvaluateFlags, argv))
    print(
        f"test_top1={summary['top1']:.4f} ({summary['top1_low']:.4f} to {summary['top1_high']:.4f}) "
        f"test_top5={summary['top5']:.4f} ece={summary['ece']:.4f} pictures={summary['num_pictures']} "
        f"champion_top1={summary['champion_top1']}",
        flush=True,
    )


if __name__ == "__main__":
    run_entry_point(main)
