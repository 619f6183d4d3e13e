"""JSONata without evaluating it: every variable exists, every path exists in what earlier states produce, every function is known.

A *form* describes a value: a dictionary of fields, a list with one element's form, or None where nothing is known. Forms of
``$states.result`` come from botocore's output shapes, those of variables from every ``Assign`` in the definition.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from botocore.model import ListShape, MapShape, Shape, StructureShape
from jsonata import Jsonata

from infra.verify.findings import Finding, shown

Form = Any

FUNCTIONS = frozenset(
    [
        "string",
        "length",
        "substring",
        "substringBefore",
        "substringAfter",
        "uppercase",
        "lowercase",
        "trim",
        "pad",
        "contains",
        "split",
        "join",
        "match",
        "replace",
        "base64encode",
        "base64decode",
        "encodeUrlComponent",
        "encodeUrl",
        "decodeUrlComponent",
        "decodeUrl",
        "number",
        "abs",
        "floor",
        "ceil",
        "round",
        "power",
        "sqrt",
        "random",
        "formatNumber",
        "formatBase",
        "formatInteger",
        "parseInteger",
        "sum",
        "max",
        "min",
        "average",
        "boolean",
        "not",
        "exists",
        "count",
        "append",
        "sort",
        "reverse",
        "shuffle",
        "distinct",
        "zip",
        "keys",
        "lookup",
        "spread",
        "merge",
        "sift",
        "each",
        "error",
        "assert",
        "type",
        "map",
        "filter",
        "single",
        "reduce",
        "now",
        "millis",
        "fromMillis",
        "toMillis",
        "hash",
        "uuid",
        "parse",
        "partition",
        "range",
    ]
)
"""JSONata's functions, less ``$eval``, and those that Step Functions adds.
https://docs.jsonata.org/overview, https://docs.aws.amazon.com/step-functions/latest/dg/transforming-data.html"""

CONTEXT: Form = {
    "Execution": {
        "Id": None, "Input": None, "Name": None, "RoleArn": None, "StartTime": None, "RedriveCount": None, "RedriveTime": None,
    },
    "State": {"EnteredTime": None, "Name": None, "RetryCount": None},
    "StateMachine": {"Id": None, "Name": None},
    "Task": {"Token": None},
}  # fmt: skip
"""https://docs.aws.amazon.com/step-functions/latest/dg/input-output-contextobject.html"""


def source(text: Any) -> str | None:
    """The JSONata between ``{%`` and ``%}``; None for anything else."""
    if isinstance(text, str) and text.startswith("{%") and text.endswith("%}"):
        return text[2:-2].strip()
    return None


def expressions(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """``(where, source)`` of every expression below ``value``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from expressions(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from expressions(item, f"{path}[{index}]")
    elif (found := source(value)) is not None:
        yield path, found


def result_form(shape: Shape | None, depth: int = 8) -> Form:
    """The form of an API's answer as Step Functions shows it: member names begin with a capital letter.

    Shapes may hold themselves, so ``depth`` ends it: enough for the deepest that is read, the message of a build's phase.
    """
    if depth == 0 or shape is None:
        return None
    if isinstance(shape, StructureShape):
        return {name[:1].upper() + name[1:]: result_form(member, depth - 1) for name, member in shape.members.items()}
    if isinstance(shape, ListShape):
        return [result_form(shape.member, depth - 1)]
    if isinstance(shape, MapShape):
        return None
    return None


def merged(first: Form, second: Form) -> Form:
    """The form of a value that has either form."""
    if isinstance(first, dict) and isinstance(second, dict):
        return {
            key: merged(first.get(key), second.get(key)) if key in first and key in second else first.get(key, second.get(key))
            for key in {**first, **second}
        }
    return first if second is None else second if first is None else first


@functools.lru_cache(maxsize=20_000)
def tree(text: str) -> Any:
    """The parsed expression. Raises whatever the parser raises: it has several kinds of error."""
    return Jsonata(text).ast


@functools.lru_cache(maxsize=200_000)
def children(node: Any) -> tuple[Any, ...]:
    """The nodes directly below one. Kept: a definition is looked through many times, and ``tree`` keeps its nodes."""
    outside = ("ancestor", "slot", "seeking_parent", "next_function")
    held = [value for name, value in vars(node).items() if not name.startswith("_outer") and name not in outside]
    return tuple(child for value in held for child in _nodes(value))


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _nodes(item)
    elif hasattr(value, "type") and hasattr(value, "value") and hasattr(value, "position"):
        yield value


def walk(node: Any) -> Iterator[Any]:
    """The node and all below it."""
    yield node
    for child in children(node):
        yield from walk(child)


Scope = dict[str, Form]


class Checker:
    """Checks the expressions of one place; ``known`` are the forms of the variables there, ``states`` of ``$states``.

    ``names`` are the states' names, which tables looked up by ``$failure.state`` have as keys; ``documents`` is the form of what
    ``$parse`` may give.
    """

    def __init__(
        self, where: str, known: Scope, states: Form, *, names: frozenset[str] = frozenset(), documents: Form = None
    ) -> None:
        self.where, self.known, self.states, self.names, self.documents = where, known, states, names, documents
        self.findings: list[Finding] = []
        self.read: set[str] = set()

    def check(self, text: str) -> list[Finding]:
        """Everything wrong with the expression."""
        try:
            root = tree(text)
        except Exception as error:  # the parser raises several unrelated types
            return [Finding("jsonata", self.where, shown(text), f"correct the expression: {error}")]
        self._visit(root, {})
        return self.findings

    def _visit(self, node: Any, local: Scope) -> None:
        match node.type:
            case "path":
                self._path(node.steps, local)
                for step in node.steps:
                    for child in children(step) if step.type == "variable" else (step,):
                        self._visit(child, local)
            case "variable":
                self._variable(node, local)
                for child in children(node):
                    self._visit(child, local)
            case "lambda":
                # A function sees what surrounds it, and its own parameters.
                self._visit(node.body, {**local, **{str(one.value): None for one in node.arguments or []}})
            case "block":
                inner = dict(local)
                for one in node.expressions:
                    self._visit(one, inner)
                    if one.type == "bind":
                        inner[str(one.lhs.value)] = self.form(one.rhs, inner)
            case "bind":
                # A function may call itself by the name it gets.
                self._visit(node.rhs, {**local, str(node.lhs.value): None})
            case "function" | "partial":
                self._function(node, local)
            case _:
                for child in children(node):
                    self._visit(child, local)

    def _function(self, node: Any, local: Scope) -> None:
        procedure = node.procedure
        if procedure is not None and procedure.type == "variable":
            name = str(procedure.value)
            if name not in FUNCTIONS and name not in local:
                self._say(f"${name}(…)", "there is no such function; see those of JSONata and Step Functions")
            if name == "lookup":
                self._table(node.arguments)
        elif procedure is not None:
            self._visit(procedure, local)
        for one in node.arguments or []:
            self._visit(one, local)

    def _table(self, arguments: list[Any]) -> None:
        """A table by the name of the state that failed: its keys are states."""
        table, key = arguments
        by_state = key.type == "path" and [str(step.value) for step in key.steps] == ["failure", "state"]
        if table.type == "unary" and str(table.value) == "{" and by_state:
            for entry, _ in table.lhs_object:
                if self.names and str(entry.value) not in self.names:
                    self._say(str(entry.value), "expected the name of a state")

    def _variable(self, node: Any, local: Scope) -> None:
        name = str(node.value)
        if name not in local:
            self.read.add(name)
        if name in ("", "$", "states") or name in local or name in FUNCTIONS:
            return
        if name not in self.known:
            self._say(f"${name}", f"no state assigns it; expected one of {', '.join(sorted({*self.known, *local}))}")

    def _path(self, steps: list[Any], local: Scope) -> None:
        first = steps[0]
        if first.type == "variable":
            self._variable(first, local)
        form = self.form(first, local)
        if first.predicate:
            form = _element(form)
        said = f"${first.value}" if first.type == "variable" else "…"
        for step in steps[1:]:
            if step.type != "name" or form is None:
                return
            form = _element(form)
            said += f".{step.value}"
            if isinstance(form, dict) and str(step.value) not in form:
                self._say(said, f"there is no such field; expected one of {shown(', '.join(sorted(map(str, form))))}")
                return
            form = form.get(str(step.value)) if isinstance(form, dict) else None

    def form(self, node: Any, local: Scope, depth: int = 8) -> Form:
        """The form of an expression's value."""
        if node is None or depth == 0:
            return None
        match node.type:
            case "variable":
                name = str(node.value)
                return local[name] if name in local else self.states if name == "states" else self.known.get(name)
            case "path":
                form = self.form(node.steps[0], local, depth - 1)
                for step in node.steps[1:]:
                    form = _element(form)
                    form = form.get(str(step.value)) if isinstance(form, dict) and step.type == "name" else None
                return form
            case "block" if node.expressions:
                return self.form(node.expressions[-1], local, depth - 1)
            case "condition":
                return merged(self.form(node.then, local, depth - 1), self.form(node._else, local, depth - 1))
            case "function" if node.procedure is not None and str(node.procedure.value) == "parse":
                return self.documents
            case "function" if node.procedure is not None and str(node.procedure.value) == "lookup":
                # Any of the fields: the name is known only when it runs.
                found = self.form(node.arguments[0], local, depth - 1)
                return functools.reduce(merged, found.values(), None) if isinstance(found, dict) else None
            case "unary" if str(node.value) == "{" and all(key.type == "string" for key, _ in node.lhs_object):
                return {str(key.value): self.form(value, local, depth - 1) for key, value in node.lhs_object}
        return None

    def _say(self, value: str, remedy: str) -> None:
        self.findings.append(Finding("jsonata", self.where, value, remedy))


def _element(form: Form) -> Form:
    """JSONata looks into lists by itself."""
    return form[0] if isinstance(form, list) and form else form
