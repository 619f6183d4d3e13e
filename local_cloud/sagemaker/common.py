"""What the SageMaker modules share: names, times, errors, tags and list pages."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from local_cloud.service import Cloud, ServiceError

Request = dict[str, Any]
Record = dict[str, Any]


def now() -> datetime:
    """The time in UTC, aware."""
    return datetime.now(UTC)


def arn(cloud: Cloud, kind: str, name: str) -> str:
    """ARN of a SageMaker resource. SageMaker writes names in lower case there, and IAM compares them so."""
    return f"arn:aws:sagemaker:{cloud.region}:{cloud.account}:{kind}/{name.lower()}"


def invalid(message: str) -> ServiceError:
    """AWS's ``ValidationException``."""
    return ServiceError("ValidationException", message)


def in_use(message: str) -> ServiceError:
    """AWS's ``ResourceInUse``."""
    return ServiceError("ResourceInUse", message)


class Tags:
    """Tags by ARN (lower case)."""

    def __init__(self) -> None:
        self._tags: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def add(self, resource: str, tags: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
        """Add or overwrite; returns all tags of the resource."""
        with self._lock:
            held = self._tags.setdefault(resource.lower(), {})
            held.update({tag["Key"]: tag["Value"] for tag in tags})
            return [{"Key": key, "Value": value} for key, value in held.items()]

    def of(self, resource: str) -> list[dict[str, str]]:
        """All tags of the resource."""
        with self._lock:
            return [{"Key": key, "Value": value} for key, value in self._tags.get(resource.lower(), {}).items()]

    def remove(self, resource: str, keys: Iterable[str]) -> None:
        """Remove the tags with these keys."""
        with self._lock:
            held = self._tags.get(resource.lower(), {})
            for key in keys:
                held.pop(key, None)

    def drop(self, resource: str) -> None:
        """Forget a deleted resource."""
        with self._lock:
            self._tags.pop(resource.lower(), None)


_DEFAULT_PAGE = 10


def page(key: str, items: list[Record], request: Request) -> Record:
    """One page of ``items`` under ``key`` with ``NextToken`` while there are more (AWS's default page is 10, at most 100)."""
    token = request.get("NextToken")
    try:
        start = int(base64.urlsafe_b64decode(token)) if token else 0
    except ValueError as error:
        message = f"Invalid NextToken {token!r}: use the one of the previous page."
        raise invalid(message) from error
    end = start + min(int(request.get("MaxResults", _DEFAULT_PAGE)), 100)
    answer: Record = {key: items[start:end]}
    if end < len(items):
        answer["NextToken"] = base64.urlsafe_b64encode(str(end).encode()).decode()
    return answer


def select(
    items: Iterable[Record],
    request: Request,
    *,
    name: str,
    status: str | None = None,
    sort: Mapping[str, Callable[[Record], Any]] | None = None,
    default_order: str = "Descending",
) -> list[Record]:
    """Filter and sort as SageMaker's List operations do: ``NameContains``, times, ``StatusEquals``, ``SortBy``, ``SortOrder``."""
    chosen = [item for item in items if _matches(item, request, name, status)]
    keys: dict[str, Callable[[Record], Any]] = {
        "Name": lambda item: item[name],
        "CreationTime": lambda item: item["CreationTime"],
        "LastModifiedTime": lambda item: item.get("LastModifiedTime", item["CreationTime"]),
        "Status": lambda item: item.get(status or "", ""),
        **(sort or {}),
    }
    by = request.get("SortBy", "CreationTime")
    if by not in keys:
        message = f"SortBy={by!r} is not emulated here: use one of {', '.join(sorted(keys))}."
        raise invalid(message)
    return sorted(chosen, key=keys[by], reverse=request.get("SortOrder", default_order) == "Descending")


def _matches(item: Record, request: Request, name: str, status: str | None) -> bool:
    created: datetime = item["CreationTime"]
    modified: datetime = item.get("LastModifiedTime", created)
    checks: tuple[tuple[str, Callable[[Any], bool]], ...] = (
        ("NameContains", lambda wanted: wanted.lower() in item[name].lower()),
        ("StatusEquals", lambda wanted: status is not None and item[status] == wanted),
        ("CreationTimeAfter", lambda wanted: created > as_time(wanted)),
        ("CreationTimeBefore", lambda wanted: created < as_time(wanted)),
        ("LastModifiedTimeAfter", lambda wanted: modified > as_time(wanted)),
        ("LastModifiedTimeBefore", lambda wanted: modified < as_time(wanted)),
    )
    return all(check(request[field]) for field, check in checks if field in request)


def as_time(value: Any) -> datetime:
    """A request's time, whichever form the JSON protocol layer left it in."""
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, UTC)
    parsed = datetime.fromisoformat(str(value))
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
