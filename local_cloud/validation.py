"""Requests checked against botocore's model as the real API checks them: fields, types, enums, patterns, lengths, ranges."""

from __future__ import annotations

import functools
import re
from typing import Any

import botocore.session
from botocore.model import ListShape, MapShape, OperationModel, ServiceModel, Shape, StructureShape
from botocore.validate import ParamValidator


@functools.cache
def service_model(name: str) -> ServiceModel:
    """botocore's model of a service, e.g. ``sagemaker``."""
    return botocore.session.get_session().get_service_model(name)


def problems(operation: OperationModel, request: dict[str, Any]) -> list[str]:
    """Everything in ``request`` that the operation's model forbids, one sentence each; empty when it is fine."""
    shape = operation.input_shape
    if shape is None:
        return []
    report = ParamValidator().validate(request, shape)
    return [report.generate_report()] if report.has_errors() else list(_constraints(request, shape, operation.name))


def _constraints(value: Any, shape: Shape, path: str) -> list[str]:
    """Constraints of the model that botocore's own validator leaves to the service."""
    if isinstance(shape, StructureShape):
        return [p for name, item in value.items() for p in _constraints(item, shape.members[name], f"{path}.{name}")]
    if isinstance(shape, ListShape):
        inner = [p for i, item in enumerate(value) for p in _constraints(item, shape.member, f"{path}[{i}]")]
        return _bounds(len(value), shape, path, "elements") + inner
    if isinstance(shape, MapShape):
        inner = [p for key, item in value.items() for p in _constraints(item, shape.value, f"{path}.{key}")]
        return _bounds(len(value), shape, path, "entries") + inner
    if shape.type_name == "string":
        return _string(str(value), shape, path)
    if shape.type_name in ("integer", "long", "float", "double"):
        return _bounds(value, shape, path, "")
    return []


def _bounds(size: float, shape: Shape, path: str, unit: str) -> list[str]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if (low is None or size >= low) and (high is None or size <= high):
        return []
    return [
        f"{path}: {f'{size:g} {unit}'.rstrip()} is outside {low if low is not None else '-'} to {high if high is not None else '-'}"
    ]


def _string(value: str, shape: Shape, path: str) -> list[str]:
    found = _bounds(len(value), shape, path, "characters")
    enum = shape.metadata.get("enum")
    if enum and value not in enum:
        found.append(f"{path}: '{value}' is not one of {', '.join(enum)}")
    pattern = _compiled(shape.metadata.get("pattern"))
    if pattern is not None and not pattern.fullmatch(value):
        found.append(f"{path}: '{value[:120]}' does not match {pattern.pattern}")
    return found


@functools.cache
def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The model's pattern, or None where it uses Java's syntax (``\\p{L}``), which Python's ``re`` lacks."""
    if not pattern or "\\p{" in pattern:
        return None
    try:
        return re.compile(pattern)
    except re.error:
        return None
