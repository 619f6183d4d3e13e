"""One way to fail: a single clear line on stderr, in SageMaker's failure file, and exit status 1."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

MAX_REASON = 1024  # DescribeTrainingJob and DescribeProcessingJob keep this many characters


class UserError(Exception):
    """Something the user can put right; the message names the value, the expectation and the remedy."""


class ConfigError(UserError):
    """A hyperparameter or flag that is unknown, missing or out of range."""


class DataError(UserError):
    """Pictures, archives or data sets that cannot be used."""


class WeightsError(UserError):
    """Weights that do not fit the architecture."""


def base_dir() -> Path:
    """SageMaker's /opt/ml; the training toolkit's own variable moves it."""
    return Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))


def write_failure(reason: str) -> None:
    """Leave ``reason`` where SageMaker looks for it.

    Training jobs read ``output/failure`` (the toolkit writes it only when it does not exist yet, so ours wins);
    processing jobs read ``output/message``. Of several processes the first one's reason stays: the others fail of its absence.
    """
    output = Path(os.environ.get("SM_OUTPUT_DIR", str(base_dir() / "output")))
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("failure", "message"):
            if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not (output / name).exists():
                (output / name).write_text(reason[:MAX_REASON], encoding="utf-8")
    except OSError as problem:  # outside a container there may be no such folder; the line on stderr remains
        print(f"note: {output} is not writable ({problem.strerror})", file=sys.stderr)


def write_message(text: str) -> None:
    """Leave a processing job's last word where SageMaker looks for it: DescribeProcessingJob shows it as ``ExitMessage``.

    Outside a container, where there is no ``/opt/ml``, nothing is written.
    """
    if base_dir().is_dir():
        (base_dir() / "output").mkdir(exist_ok=True)
        (base_dir() / "output" / "message").write_text(text[:MAX_REASON], encoding="utf-8")


def one_line(problem: BaseException) -> str:
    """The message on one line; unexpected exceptions keep their type's name."""
    if full := _full_disk(problem):
        name = getattr(full, "filename", None)
        where = f" while {name} was written" if name else ""
        return f"the disk is full{where}: give the job a larger volume (volume_gb of its stage in cdk.json)"
    text = " ".join(str(problem).split()) or "no message"
    return text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text}"


def _full_disk(problem: BaseException | None) -> BaseException | None:
    """The lack of space behind a failure: libraries wrap it in errors of their own, and SQLite has one that is no OSError."""
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            return problem
        if getattr(problem, "sqlite_errorname", "") == "SQLITE_FULL":
            return problem
        problem = problem.__cause__ or problem.__context__
    return None


def run_entry_point(main: Callable[[list[str]], None]) -> None:
    """Run ``main(argv)``; a failure ends the process with status 1 and one clear line."""
    try:
        main(sys.argv[1:])
    except Exception as problem:
        if not isinstance(problem, UserError):
            traceback.print_exc()
        reason = one_line(problem)
        write_failure(reason)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)
