"""Mechanical faults in a deployment, for the proof that ``infra.verify`` sees them.

Each class of fault is made wherever it can be made: a key misspelt, a scalar of another type, a step of a path broken, an action
dropped, a resource widened. Nothing is chosen by hand.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from infra.verify.deployment import Statement

Json = dict[str, Any]


class Mutant(NamedTuple):
    """A faulty definition: what was done, where, and the result."""

    kind: str
    where: str
    machine: Json


def misspelt(name: str) -> str:
    """The name with two letters exchanged, or one added."""
    for index in range(len(name) - 1, 0, -1):
        if name[index] != name[index - 1] and name[index].isalpha() and name[index - 1].isalpha():
            return f"{name[: index - 1]}{name[index]}{name[index - 1]}{name[index + 1 :]}"
    return f"{name}x"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """``(path, value)`` of everything in a structure."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(machine: Json, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Json:
    """A copy in which ``change(parent, key)`` was done at ``path``; what lies beside the path is shared with ``machine``."""
    made = parent = copy.copy(machine)
    for key in path[:-1]:
        parent[key] = copy.copy(parent[key])
        parent = parent[key]
    change(parent, path[-1])
    return made


def keys_misspelt(machine: Json) -> Iterator[Mutant]:
    """Every key of every object, those inside expressions included. The names of states are names, not keys."""
    for path, value in places(machine):
        if isinstance(value, dict) and path != ("States",):
            for key in value:

                def rename(parent: Any, name: Any, key: str = key) -> None:
                    holder = parent[name]
                    parent[name] = {misspelt(one) if one == key else one: item for one, item in holder.items()}

                if path:
                    yield Mutant("misspelt key", ".".join(map(str, (*path, key))), changed(machine, path, rename))
                else:
                    renamed = {misspelt(one) if one == key else one: item for one, item in machine.items()}
                    yield Mutant("misspelt key", key, renamed)
    # "Key": inside JSONata, as requests.jsonata writes objects of AWS's requests.
    yield from _inside(machine, r'"([A-Z]\w+)": ', 1, misspelt, "misspelt key")


def _inside(machine: Json, pattern: str, group: int, change: Callable[[str], str], kind: str) -> Iterator[Mutant]:
    for path, value in places(machine):
        if not isinstance(value, str) or not value.startswith("{%"):
            continue
        for match in re.finditer(pattern, value):
            start, end = match.span(group)
            text = f"{value[:start]}{change(match.group(group))}{value[end:]}"

            def put(parent: Any, name: Any, text: str = text) -> None:
                parent[name] = text

            yield Mutant(kind, f"{'.'.join(map(str, path))} {match.group(group)}", changed(machine, path, put))


def retyped(value: Any) -> Any:
    """The scalar as another type would hold it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return 7


def scalars_retyped(machine: Json) -> Iterator[Mutant]:
    """Every number, text and boolean outside comments; a text becomes a number, the others texts."""
    for path, value in places(machine):
        if isinstance(value, str | int | float) and path[-1] != "Comment":

            def put(parent: Any, name: Any, value: Any = value) -> None:
                parent[name] = retyped(value)

            yield Mutant("retyped scalar", ".".join(map(str, path)), changed(machine, path, put))


def paths_broken(machine: Json) -> Iterator[Mutant]:
    """Every variable, and every step of a path that begins with one, misspelt."""
    for path, value in places(machine):
        if not isinstance(value, str) or not value.startswith("{%"):
            continue
        for position, name in _steps(value):
            text = f"{value[:position]}{misspelt(name)}{value[position + len(name) :]}"

            def put(parent: Any, key: Any, text: str = text) -> None:
                parent[key] = text

            yield Mutant("broken path", f"{'.'.join(map(str, path))} {name}@{position}", changed(machine, path, put))


def _steps(value: str) -> Iterator[tuple[int, str]]:
    """``(position, name)`` of the steps of all paths in an expression: ``$a.b.c`` has three."""
    for match in re.finditer(r"\$([A-Za-z_]\w*)((?:\.[A-Za-z_]\w*|\[[^\[\]]*\])*)(?!\w*\()", value):
        if _in_text(value, match.start()):
            continue
        yield match.start(1), match.group(1)
        for step in re.finditer(r"\.([A-Za-z_]\w*)", match.group(2)):
            yield match.start(2) + step.start(1), step.group(1)


def _in_text(value: str, position: int) -> bool:
    """Whether a position lies inside quotes."""
    quote = ""
    for index, letter in enumerate(value[:position]):
        if quote:
            if letter == quote and value[index - 1] != "\\":
                quote = ""
        elif letter in "'\"":
            quote = letter
    return bool(quote)


# --- policies --------------------------------------------------------------------------------------------------------------

Policies = dict[str, list[Statement]]


def actions_dropped(policies: Policies) -> Iterator[tuple[str, Policies]]:
    """Every action of every statement taken away."""
    for role, statements in policies.items():
        for index, statement in enumerate(statements):
            for action in statement.actions:
                rest = statement._replace(actions=tuple(one for one in statement.actions if one != action))
                yield f"{role} {action}", {**policies, role: [*statements[:index], rest, *statements[index + 1 :]]}


def resources_widened(policies: Policies) -> Iterator[tuple[str, Policies]]:
    """Every resource replaced by ``*``, and cut off before its last part, and opened to other accounts."""
    for role, statements in policies.items():
        for index, statement in enumerate(statements):
            for place, resource in enumerate(statement.resources):
                for wider in sorted(_wider(resource) - {resource}):
                    resources = (*statement.resources[:place], wider, *statement.resources[place + 1 :])
                    made = [*statements[:index], statement._replace(resources=resources), *statements[index + 1 :]]
                    yield f"{role} {resource} -> {wider}", {**policies, role: made}


def _wider(resource: str) -> set[str]:
    head, slash, _ = resource.removesuffix("/*").rpartition("/")
    found = {"*", resource.replace("111122223333", "*")}
    return found | ({f"{head}/*"} if slash else set())


def conditions_dropped(policies: Policies) -> Iterator[tuple[str, Policies]]:
    """Every statement without its conditions."""
    for role, statements in policies.items():
        for index, statement in enumerate(statements):
            if statement.conditions:
                made = [*statements[:index], statement._replace(conditions={}), *statements[index + 1 :]]
                yield f"{role} {', '.join(statement.actions)} {json.dumps(statement.conditions)}", {**policies, role: made}
