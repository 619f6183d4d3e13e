"""Row 14: nothing of a picture, its name, its metadata or a token is kept anywhere a person or a program could read it later."""

from __future__ import annotations

import base64
import io
import json
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_table import Landed
from PIL import Image

pytestmark = [pytest.mark.fault(14), pytest.mark.pipeline]


def forms_of(canary: bytes) -> list[bytes]:
    """The canary as it is, and within base64 at each of its three offsets."""
    found = [canary]
    for offset in range(3):
        coded = base64.b64encode(b"\0" * offset + canary)
        first = -(-offset * 4 // 3) + (1 if offset else 0)
        found.append(coded[first : len(coded) - 4])
    return found


def with_exif(canary: bytes) -> bytes:
    """A JPEG whose description and comment hold the canary."""
    out = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x010E] = canary.decode()
    image.save(out, "JPEG", exif=exif, comment=canary)
    return out.getvalue()


def with_pixels(canary: bytes) -> bytes:
    """A BMP, whose pixels stand in the file as they are."""
    side = 40
    row = (canary * 9)[: side * 3]
    pixels = row * side
    head = struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, len(pixels), 2835, 2835, 0, 0) + pixels


def form(name: bytes, content: bytes, kind: str = "image/jpeg") -> tuple[bytes, str]:
    boundary = secrets.token_hex(16)
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="'.encode() + name
    return head + f'.jpg"\r\nContent-Type: {kind}\r\n\r\n'.encode() + content + f"\r\n--{boundary}--\r\n".encode(), boundary


def texts(deployed: Any) -> Iterator[tuple[str, bytes]]:
    """Everything that the account keeps and that is no picture's own place: (where, content)."""
    root: Path = deployed.cloud.root
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_size < 200_000_000 and "site-packages" not in path.parts:
            yield str(path.relative_to(root)), path.read_bytes()
    logs = deployed.cloud.client("logs")
    for group in logs.describe_log_groups()["logGroups"]:
        for page in logs.get_paginator("filter_log_events").paginate(logGroupName=group["logGroupName"]):
            for event in page["events"]:
                yield f"log {group['logGroupName']}", event["message"].encode()
    metrics = deployed.cloud.client("cloudwatch").list_metrics()["Metrics"]
    yield "metrics", json.dumps(metrics).encode()
    states = deployed.cloud.client("stepfunctions")
    for one in states.list_executions(stateMachineArn=deployed.outputs["StateMachineArn"])["executions"]:
        events = states.get_execution_history(executionArn=one["executionArn"], maxResults=1000)["events"]
        yield f"history of {one['name']}", json.dumps(events, default=str).encode()
    s3, bucket = deployed.cloud.client("s3"), deployed.outputs["DataBucket"]
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="runs/"):
        for item in page.get("Contents", []):
            yield item["Key"], s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()


def test_the_search_would_find_it(deployed: Any, landed: Landed):
    """Otherwise finding nothing would say nothing."""
    canary = secrets.token_hex(12).encode()
    for coded in (canary, base64.b64encode(b"x" + canary), base64.b64encode(b"xy" + canary + b"z"), base64.b64encode(canary)):
        assert any(one in coded for one in forms_of(canary))
        landed()


def test_a_canary_is_found_nowhere(finished: Any, deployed: Any, landed: Landed):
    name, exif, pixels, wrong = (f"canary{secrets.token_hex(12)}".encode() for _ in range(4))
    good = {"name": form(name, with_exif(exif)), "pixels": form(name, with_pixels(pixels), "image/bmp")}
    answers: list[tuple[int, Any]] = []
    for body, boundary in good.values():
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        answers.append(deployed.request("predict/batch", body, {**kind, **deployed.authorized}))
        answers.append(deployed.request("predict", body, {**kind, **deployed.authorized}))
        landed(2)
    for content, kind in ((with_exif(exif), "image/jpeg"), (with_pixels(pixels), "image/bmp")):
        answers.append(deployed.request("predict", content, {"Content-Type": kind, **deployed.authorized}))
        answers.append(deployed.request("predict", content[:-30] + exif, {"Content-Type": kind, **deployed.authorized}))
        answers.append(deployed.request("predict", exif + content, {"Content-Type": kind, **deployed.authorized}))  # no picture
        answers.append(deployed.request("predict", content * 4000, {"Content-Type": kind, **deployed.authorized}))  # too large
        answers.append(deployed.request("predict", content, {"Content-Type": "text/plain", **deployed.authorized}))
        answers.append(deployed.request("explain", content, {"Content-Type": kind, "Accept": "image/png", **deployed.authorized}))
        landed(6)
    as_json = json.dumps({"images": [base64.b64encode(with_exif(exif)).decode(), "%%%" + pixels.decode()]}).encode()
    answers.append(deployed.request("predict/batch", as_json, {"Content-Type": "application/json", **deployed.authorized}))
    answers.append(
        deployed.request("predict", with_exif(exif), {"Content-Type": "image/jpeg", "Authorization": f"Bearer {wrong.decode()}"})
    )
    answers.append(deployed.request(f"predict?top_k={wrong.decode()}", with_exif(exif), {"Content-Type": "image/jpeg"}))
    landed(3)
    statuses = [status for status, _ in answers]
    assert {200, 401} <= set(statuses), statuses
    assert max(statuses) < 500, answers
    said = json.dumps([answer for _, answer in answers], default=str).encode()
    canaries = {"file name": name, "EXIF": exif, "pixels": pixels, "wrong token": wrong, "token": deployed.token.encode()}
    for what, canary in canaries.items():
        # An error may repeat a parameter that it complains of; never a picture, a name or a token.
        assert what == "wrong token" or not any(one in said for one in forms_of(canary)), f"{what} in an answer"
    found = [
        f"{what} in {where}"
        for where, content in texts(deployed)
        for what, canary in canaries.items()
        if any(one in content for one in forms_of(canary))
    ]
    assert found == []
