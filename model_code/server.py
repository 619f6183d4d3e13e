"""The serving container: GET /ping and POST /invocations on port 8080, started with the argument ``serve``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from classifier.cpus import cpu_count
from classifier.served_model import ServedModel
from inference import (
    MAX_PICTURES,
    Parameters,
    RequestError,
    bounded,
    decoded,
    explain_fn,
    kind_of,
    model_fn,
    output_fn,
    pictures_in_json,
    predict_fn,
)
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_BODY = 6 * 2**20
"""SageMaker's own limit of a real-time invocation is 6 MiB."""
WORKERS = int(os.environ.get("INFERENCE_WORKERS", "0")) or cpu_count()
MAX_WAIT_S = float(os.environ.get("MAX_WAIT_S", "0.5"))
"""A picture that would wait longer than this for its turn is told to come back instead of queueing without end."""
MIN_INSIDE = 4 * WORKERS
"""So many pictures are let in however slow the model is."""
SMOOTHING = 0.05
"""Weight of the newest picture in the moving average of the time that one takes."""
SELF_TEST_MAX_MS = float(os.environ.get("SELF_TEST_MAX_MS", "5000"))
HEADERS_TIMEOUT_S = 10.0
"""How long a client may take from its connection, or from the first byte of a further request, to the end of its headers."""
BODY_TIMEOUT_S = 10.0
"""How long a client may take to send its body."""
SHUTDOWN_S = 10
_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"


class Service:
    """The model, its threads, and how many pictures are being served."""

    def __init__(self, model_dir: str) -> None:
        self.model_dir = model_dir
        self.model: ServedModel | None = None
        self.problem = "the model is being loaded"
        self.pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="inference")
        self.inside = 0
        self.pace_s = 0.0
        """Moving average of a worker's time for a picture."""

    def load(self) -> None:
        """Load and prove the model, so that /ping says yes only when right answers are possible."""
        try:
            model = model_fn(self.model_dir, WORKERS)
            model.self_test(SELF_TEST_MAX_MS)
            self.model = model
            print(f"serving {model.form.name} with {WORKERS} workers", flush=True)
        except Exception as problem:
            self.problem = f"the model in {self.model_dir} cannot serve: {problem}"
            print(f"error: {self.problem}", file=sys.stderr, flush=True)

    def ready(self) -> ServedModel:
        """The model. Raises RequestError 503 while there is none."""
        if self.model is None:
            raise RequestError(503, "model_not_ready", self.problem)
        return self.model

    @contextlib.contextmanager
    def room_for(self, pictures: int) -> Iterator[None]:
        """Holds places in the house. Raises RequestError 429 when too many wait already."""
        inside = self.inside + pictures
        if self.inside and inside > MIN_INSIDE and inside * self.pace_s / WORKERS > MAX_WAIT_S:
            raise RequestError(429, "too_many_requests", f"{self.inside} pictures are being served: try again in a second")
        self.inside += pictures
        try:
            yield
        finally:
            self.inside -= pictures

    def one(self, body: bytes, parameters: Parameters) -> dict[str, Any]:
        """Decode and predict; runs in a worker thread. Raises RequestError."""
        started = time.perf_counter()
        model = self.ready()
        answer = predict_fn(decoded(body, model.preprocessing.resize_size), model, parameters)
        took = time.perf_counter() - started
        self.pace_s += SMOOTHING * (took - self.pace_s) if self.pace_s else took
        return answer

    def one_of_many(self, body: bytes, parameters: Parameters) -> dict[str, Any]:
        """Like ``one``, but an error is a result: the other pictures' answers are not lost."""
        try:
            return self.one(body, parameters)
        except RequestError as problem:
            return {"error": {"code": problem.code, "message": str(problem)}}

    def explanation(self, body: bytes, parameters: Parameters) -> tuple[bytes, str]:
        """Decode and explain; runs in a worker thread. Raises RequestError."""
        model = self.ready()
        return explain_fn(decoded(body, model.preprocessing.resize_size), model, parameters)


def _error(status: int, code: str, message: str) -> JSONResponse:
    # Who was too slow to send a body does not get to send the rest of it.
    headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(status)
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status, headers=headers)


async def _read(request: Request) -> bytes:
    """The body, given up as soon as it is longer than MAX_BODY or too slow. Raises RequestError 413 or 408."""
    message = f"the body is larger than {MAX_BODY} bytes: send a smaller picture"
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY:
        raise RequestError(413, "body_too_large", message)
    parts = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                parts += part
                if len(parts) > MAX_BODY:
                    raise RequestError(413, "body_too_large", message)
    except TimeoutError:
        raise RequestError(408, "slow_body", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s: send it again") from None
    return bytes(parts)


def pictures_in_form(body: bytes, content_type: str) -> list[bytes]:
    """The file parts of a multipart form. Raises RequestError."""
    options = {name.strip().lower(): value for name, _, value in (part.partition("=") for part in content_type.split(";"))}
    boundary = options.get("boundary", "").strip().strip('"')
    found: list[bytes] = []

    def keep(file: Any) -> None:
        bounded(len(found) + 1)
        file.file_object.seek(0)
        found.append(file.file_object.read())

    try:
        if not boundary:
            raise FormParserError("no boundary")
        # The body is bounded already: nothing need be spooled to a disk that is read-only.
        config = {"MAX_MEMORY_FILE_SIZE": MAX_BODY + 1, "MAX_FIELDS": MAX_PICTURES}
        parser = FormParser("multipart/form-data", None, keep, boundary=boundary.encode(), config=config)
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as problem:
        raise RequestError(400, "bad_form", f"the multipart form is damaged ({str(problem)[:80]}): send file parts") from None
    bounded(len(found))
    return found


async def ping(request: Request) -> Response:
    """200 once the model has passed its self-test; 503 before, or when it cannot."""
    service: Service = request.app.state.service
    return Response(status_code=200) if service.model else _error(503, "model_not_ready", service.problem)


async def invocations(request: Request) -> Response:
    """One picture or a batch in, the likeliest labels (or a heat map) out."""
    service: Service = request.app.state.service
    try:
        content_type = request.headers.get("content-type", "")
        kind, parameters = kind_of(content_type), Parameters.of(request.headers.get(_ATTRIBUTES, ""))
        with service.room_for(1):
            body = await _read(request)
            pictures, many = [body], False
            if kind == "json":
                pictures, many = pictures_in_json(body)
            elif kind == "form":
                pictures, many = pictures_in_form(body, content_type), True
            if parameters.explain:
                return await _explained(service, pictures, parameters)
            return await _classified(service, pictures, many, parameters, request.headers.get("accept", "*/*"))
    except RequestError as problem:
        await _drop_body(request)
        return _error(problem.status, problem.code, str(problem))


async def _drop_body(request: Request) -> None:
    """Let go of what has arrived of a body that nobody reads: uvicorn would keep it until the connection's next request."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0):
            await request.receive()


async def _classified(service: Service, pictures: list[bytes], many: bool, parameters: Parameters, accept: str) -> Response:
    loop = asyncio.get_running_loop()
    model = service.ready()
    if not many:
        answer = await loop.run_in_executor(service.pool, service.one, pictures[0], parameters)
    else:
        with service.room_for(len(pictures) - 1):
            # The workers share the pictures of a batch.
            calls = [loop.run_in_executor(service.pool, service.one_of_many, one, parameters) for one in pictures]
            answer = {"results": await asyncio.gather(*calls)}
    return Response(output_fn({**answer, "model": model.describe()}, accept), media_type="application/json")


async def _explained(service: Service, pictures: list[bytes], parameters: Parameters) -> Response:
    if len(pictures) > 1:
        raise RequestError(422, "one_picture", "explain=true takes one picture: send one")
    loop = asyncio.get_running_loop()
    content, attributes = await loop.run_in_executor(service.pool, service.explanation, pictures[0], parameters)
    return Response(content, media_type="image/png", headers={_ATTRIBUTES: attributes})


def build_app(model_dir: str) -> Starlette:
    """The application around the model in ``model_dir``."""
    service = Service(model_dir)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.get_running_loop().run_in_executor(service.pool, service.load)
        yield
        await loading
        service.pool.shutdown(wait=False, cancel_futures=True)

    routes = [Route("/ping", ping), Route("/invocations", invocations, methods=["POST"])]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.service = service
    return app


class Impatient(HttpToolsProtocol):
    """uvicorn's HTTP with a limit on the time of headers: without one, a few hundred clients that never end theirs hold it up."""

    _headers: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._arrived()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._arrived()
        self._headers = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.close)

    def _arrived(self) -> None:
        if self._headers is not None:
            self._headers.cancel()


def main(argv: list[str]) -> int:
    """``server.py serve``; anything else is refused."""
    if argv != ["serve"]:
        print(f"error: unknown arguments {argv}: the container is started with 'serve'", file=sys.stderr)
        return 2
    port = int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080"))
    app = build_app(os.environ.get("SM_MODEL_DIR", "/opt/ml/model"))
    # The container is reached through SageMaker's own network only, hence all addresses.
    host = os.environ.get("BIND_HOST", "0.0.0.0")  # noqa: S104
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=Impatient,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        # On SIGTERM: no new connections, what is inside is answered.
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
