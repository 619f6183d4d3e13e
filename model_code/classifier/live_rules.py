"""The rules beside the training: one process of low priority that reads what the training saves and says what it finds.

It writes ``<Rule>/<Rule>.json`` whenever a finding changes. It ends with the training, even with one that is killed: the training
holds the other end of its stdin, and on Linux the kernel ends it with its parent. When it fails, the training only notes that.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from classifier.findings import Finding
from classifier.rules import TrainingRules

INTERVAL_S = 5.0
REST = 10
"""It rests so many times as long as a pass over the rules took: at most a tenth of one CPU, and that only where no one wants it."""
LAST_PASS_S = 60.0
END = "end"


@dataclass(frozen=True)
class Watched:
    """What the process is told: folders, facts of the training, and the rules that stop it."""

    tensors: str
    profile: str
    out: str
    class_counts: list[int] = field(default_factory=list)
    started: float | None = None
    batch_size: int | None = None
    stop_rules: list[str] = field(default_factory=list)


def _stop_file(out: Path) -> Path:
    return out / ".stop"  # hidden: not uploaded


class RuleProcess:
    """Starts the process and ends it; use as a context manager around the training."""

    def __init__(self, watched: Watched) -> None:
        self._watched, self._out = watched, Path(watched.out)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> RuleProcess:
        self._out.mkdir(parents=True, exist_ok=True)
        _stop_file(self._out).unlink(missing_ok=True)
        root = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        try:
            command = [sys.executable, "-m", "classifier.live_rules", str(os.getpid())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
            self._tell(json.dumps(asdict(self._watched)))
        except OSError as problem:
            print(f"note: the rules do not run beside the training ({problem})", flush=True)
        return self

    def _tell(self, line: str) -> None:
        if self._process and self._process.stdin:
            with contextlib.suppress(OSError):  # it has ended and said why
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()

    def stop_reason(self) -> str:
        """Why the training is to end, or nothing. Cheap enough to be asked after every step."""
        if not self._watched.stop_rules:
            return ""
        try:
            return _stop_file(self._out).read_text(encoding="utf-8")
        except OSError:
            return ""

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is None:
            return
        if kind and issubclass(kind, SystemExit):  # interrupted: the machine will soon be gone
            self._process.kill()
        self._tell(END)
        try:
            self._process.wait(LAST_PASS_S)
        except subprocess.TimeoutExpired:
            print(f"note: the rules beside the training had not ended after {LAST_PASS_S:.0f} s", flush=True)
            self._process.kill()
            self._process.wait()
        finally:
            if self._process.stdin:
                with contextlib.suppress(OSError):  # what was not read by a process that has ended
                    self._process.stdin.close()


def write_findings(found: list[Finding], out: Path) -> None:
    """``<Rule>/<Rule>.json`` of every finding that has changed."""
    for finding in found:
        path = out / finding.rule / f"{finding.rule}.json"
        text = json.dumps(finding.to_json(), indent=1) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.part")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)


def stop_text(finding: Finding) -> str:
    """The line that a stopped training ends with."""
    return f"stopped by rule {finding.rule}: {finding.detail}; what to change: {finding.remedy or 'see the report'}"


class _Passes:
    """One look at everything after the other."""

    def __init__(self, watched: Watched) -> None:
        self._watched, self._out = watched, Path(watched.out)
        self._rules = TrainingRules(Path(watched.tensors), watched.class_counts)

    def look(self) -> None:
        """Read what is new, write what has changed."""
        found = self._training() + self._profile()
        write_findings(found, self._out)
        fired = [finding for finding in found if finding.triggered and finding.rule in self._watched.stop_rules]
        if fired and not _stop_file(self._out).exists():
            temporary = self._out / ".stop.part"
            temporary.write_text(stop_text(fired[0]), encoding="utf-8")
            temporary.replace(_stop_file(self._out))

    def _training(self) -> list[Finding]:
        from classifier.errors import DataError

        try:
            return self._rules.findings()
        except DataError:  # nothing is saved yet
            return []

    def _profile(self) -> list[Finding]:
        from classifier.profile_rules import profile_findings

        if not Path(self._watched.profile).is_dir():
            return []
        return profile_findings(Path(self._watched.profile), self._watched.started, self._watched.batch_size)


def _die_with(parent: int) -> None:
    """Have the kernel end this process with its parent (Linux); elsewhere the closed stdin does."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the training has ended before its rules began")


def _wait(seconds: float) -> str | None:
    """What the training says next: nothing within ``seconds`` (None), END, or '' when it is gone."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.readline().strip() if ready else None


def run(parent: int) -> None:
    """The process: pass after pass until the training ends."""
    _die_with(parent)
    os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training decides
    sys.modules["torch"] = None  # type: ignore[assignment]  # smdebug imports it where it can; no rule needs its 4 s and 300 MB
    watched = Watched(**json.loads(sys.stdin.readline()))
    passes = _Passes(watched)
    told: str | None = None
    while told != "":
        started = time.monotonic()
        passes.look()
        if told == END:
            return
        told = _wait(max(INTERVAL_S, REST * (time.monotonic() - started)))


def main(argv: list[str]) -> None:
    """Run; a failure is one line, and no one's but this process's."""
    try:
        run(int(argv[0]))
    except Exception as problem:
        text = " ".join(str(problem).split())
        print(f"note: the rules beside the training have ended ({type(problem).__name__}: {text})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
