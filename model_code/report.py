"""Processing job: runs the rules and writes the report pages of a run."""

from __future__ import annotations

from classifier.config import parse_dataclass
from classifier.errors import run_entry_point, write_message
from classifier.reporting import ReportFlags, write


def main(argv: list[str]) -> None:
    """Report on the run that the flags name."""
    facts = write(parse_dataclass(ReportFlags, argv))
    fired = [f["RuleName"] for f in facts["findings"] if f["RuleTriggered"]]
    fired += [name for name, part in facts["profiler"].items() if part["RuleTriggered"]]
    for note in facts["notes"]:
        print(f"note: {note}", flush=True)
    print(f"rules_fired={','.join(fired) or 'none'}", flush=True)
    write_message(",".join(fired) or "none")  # the state machine names them in its output


if __name__ == "__main__":
    run_entry_point(main)
