"""Faults on demand: AWS calls that fail, slow down or lose their answer, to see what a stack makes of it.

Rules are read from ``faults.json`` in the cloud's folder, a list of objects:

``call``
    Regular expression for ``<service>:<operation>``, or ``<service>:<METHOD> <path>`` where the protocol names no operation:
    ``sagemaker:CreateModel``, ``s3:PUT /bucket/champion.json``, ``lambda:POST /2015-03-31/functions/x/invocations``.
``caller``
    Regular expression for the caller's ARN; without it every caller but the account's root.
``code``, ``status``, ``message``
    The error, such as ``ThrottlingException`` and 400. Without a code the call only waits.
``after``
    True: the call is carried out and its answer is lost; the caller gets the error instead.
``delay_s``
    Seconds before the call is carried out.
``times``
    How often the rule is obeyed; 1 unless told otherwise.

Each time a rule is obeyed a line is added to ``faults.jsonl``.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_XML = frozenset({"s3", "sns", "sts", "iam", "cloudformation"})
"""Services that answer errors in XML; the others do in JSON."""


@dataclass(frozen=True)
class Rule:
    """One rule that was obeyed for one call."""

    call: str
    code: str
    status: int
    message: str
    after: bool
    delay_s: float

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The error in the form of the service's protocol."""
        service = self.call.partition(":")[0]
        if service in _XML:
            error = f"<Code>{escape(self.code)}</Code><Message>{escape(self.message)}</Message>"
            body = f"<Error>{error}</Error>" if service == "s3" else f"<ErrorResponse><Error>{error}</Error></ErrorResponse>"
            return self.status, {"content-type": "application/xml"}, body.encode()
        headers = {"content-type": "application/x-amz-json-1.1", "x-amzn-errortype": self.code}
        return self.status, headers, json.dumps({"__type": self.code, "message": self.message}).encode()


class Faults:
    """The rules, and how often each was obeyed."""

    def __init__(self, root: Path) -> None:
        self._file, self._log = root / "faults.json", root / "faults.jsonl"
        self._lock = threading.Lock()
        self._read_ns = 0
        self._rules: list[dict[str, Any]] = []

    def take(self, call: str, caller: str) -> Rule | None:
        """The rule for a call, used up by one; None for most calls."""
        if not self._file.exists():
            return None
        with self._lock:
            self._read()
            for rule in self._rules:
                if rule["times"] > 0 and re.search(rule["call"], call) and re.search(rule["caller"], caller):
                    rule["times"] -= 1
                    self._note(rule, call, caller)
                    return Rule(call, rule["code"], int(rule["status"]), rule["message"], rule["after"], float(rule["delay_s"]))
        return None

    def _read(self) -> None:
        changed_ns = self._file.stat().st_mtime_ns
        if changed_ns == self._read_ns:
            return
        self._read_ns = changed_ns
        usual = {
            "caller": r":(assumed-role|role)/",
            "code": "",
            "status": 400,
            "message": "a fault on demand",
            "after": False,
            "delay_s": 0.0,
            "times": 1,
        }
        self._rules = [{**usual, **rule} for rule in json.loads(self._file.read_text(encoding="utf-8") or "[]")]

    def _note(self, rule: dict[str, Any], call: str, caller: str) -> None:
        line = {"time": time.time(), "call": call, "caller": caller, "code": rule["code"], "after": rule["after"]}
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def name_of(scope: dict[str, Any], headers: dict[str, str]) -> str:
    """A call's name as rules match it; empty for a request that nobody signed."""
    signed = re.search(r"Credential=[^/]+/\d{8}/[^/]+/([^/]+)/", headers.get("authorization", ""))
    if signed is None:
        return ""
    _, _, operation = headers.get("x-amz-target", "").partition(".")
    return f"{signed.group(1)}:{operation or scope['method'] + ' ' + scope['path']}"
