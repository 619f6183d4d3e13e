"""A cheap HTTP client for load: keep-alive connections on one event loop, nothing parsed but status and length.

``python bench/serving_load.py PORT PATH --pictures FOLDER --clients 16 --seconds 8 [--rate 50]`` prints JSON: statuses, seconds,
latencies in ms, and the client's own CPU seconds. With ``--rate`` requests start at that pace whatever the answers do (an open
loop, without coordinated omission: a request's time counts from when it should have started).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any


class Connection:
    """One keep-alive connection, opened again when the server closes it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> int:
        """Status of one request; 0 when the connection broke."""
        try:
            if self.streams is None:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self.streams
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head[9:12])
            length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
            await reader.readexactly(int(length.split(b":")[1]))
            if b"connection: close" in head.lower():
                await self.close()
            return status
        except (OSError, asyncio.IncompleteReadError, ValueError):
            await self.close()
            return 0

    async def close(self) -> None:
        """Let go of the connection."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'


def requests_of(folder: Path, path: str, form: bool = False) -> list[bytes]:
    """Whole requests, a picture each, as it is or in a form."""
    bodies = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    if form:
        bodies = [FORM + body + b"\r\n--b--\r\n" for body in bodies]
    kind = "multipart/form-data; boundary=b" if form else "image/jpeg"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: "
    return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]


async def closed_loop(port: int, requests: list[bytes], clients: int, seconds: float) -> list[tuple[int, float]]:
    """Every client asks again as soon as it is answered; ``(status, ms)`` of each request."""
    seen: list[tuple[int, float]] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        connection, count = Connection(port), number
        while (started := time.perf_counter()) < end:
            status = await connection.ask(requests[count % len(requests)])
            seen.append((status, (time.perf_counter() - started) * 1000))
            count += clients
        await connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return seen


async def open_loop(port: int, requests: list[bytes], clients: int, seconds: float, rate: float) -> list[tuple[int, float]]:
    """Requests are due at ``rate`` a second; those for which no client is free wait, and their wait counts."""
    seen: list[tuple[int, float]] = []
    start, number = time.perf_counter(), 0

    async def client() -> None:
        nonlocal number
        connection = Connection(port)
        while (due := start + number / rate) < start + seconds:
            mine, number = number, number + 1
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            status = await connection.ask(requests[mine % len(requests)])
            seen.append((status, (time.perf_counter() - due) * 1000))
        await connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--form", action="store_true")
    flags = parser.parse_args()
    requests, started, used = requests_of(flags.pictures, flags.path, flags.form), time.perf_counter(), time.process_time()
    if flags.rate:
        seen = asyncio.run(open_loop(flags.port, requests, flags.clients, flags.seconds, flags.rate))
    else:
        seen = asyncio.run(closed_loop(flags.port, requests, flags.clients, flags.seconds))
    took = time.perf_counter() - started
    print(json.dumps(summary(seen, took, time.process_time() - used)))


def summary(seen: list[tuple[int, float]], seconds: float, cpu_s: float) -> dict[str, Any]:
    """Statuses, answers a second and latencies of those answered with 200."""
    times = sorted(ms for status, ms in seen if status == 200)
    at = {f"p{share}_ms": times[min(len(times) - 1, int(len(times) * share / 100))] if times else None for share in (50, 95, 99)}
    statuses = dict(Counter(str(status) for status, _ in seen))
    return {"statuses": statuses, "per_s": len(times) / seconds, "seconds": seconds, "client_cpu": cpu_s / seconds, **at}


if __name__ == "__main__":
    main()
