"""The serving container: GET /ping and POST /invocations on port 8080, started with the argument ``serve``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from classifier.serving import OnnxModel
from inference import RequestError, input_fn, model_fn, output_fn, predict_fn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

MAX_BODY = 6 * 2**20
"""SageMaker's own limit of a real-time invocation is 6 MiB."""
WORKERS = int(os.environ.get("INFERENCE_WORKERS", "0")) or os.cpu_count() or 1
MAX_WAITING = int(os.environ.get("MAX_WAITING", "0")) or 16 * WORKERS
"""Requests in the house at once; the next one is told to come back instead of queueing without end."""


class Service:
    """The model, its threads, and how many requests are being served."""

    def __init__(self, model_dir: str) -> None:
        self.model_dir = model_dir
        self.model: OnnxModel | None = None
        self.problem = "the model is being loaded"
        self.pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="inference")
        self.inside = 0

    def load(self) -> None:
        """Load and run once, so that /ping says yes only when an answer is possible."""
        try:
            model = model_fn(self.model_dir)
            predict_fn(Image.new("RGB", (64, 64)), model)
            self.model = model
        except Exception as problem:
            self.problem = f"the model in {self.model_dir} could not be loaded: {problem}"
            print(f"error: {self.problem}", file=sys.stderr, flush=True)

    def answer(self, body: bytes, content_type: str, accept: str, k: int) -> bytes:
        """Decode, predict, encode; runs in a worker thread. Raises RequestError."""
        if self.model is None:
            raise RequestError(503, "model_not_ready", self.problem)
        return output_fn(predict_fn(input_fn(body, content_type), self.model, k), accept)


def _error(status: int, code: str, message: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status, headers=headers)


async def _read(request: Request) -> bytes:
    """The body, given up as soon as it is longer than MAX_BODY. Raises RequestError 413."""
    message = f"the body is larger than {MAX_BODY} bytes: send a smaller picture"
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY:
        raise RequestError(413, "body_too_large", message)
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > MAX_BODY:
            raise RequestError(413, "body_too_large", message)
    return bytes(parts)


def _top_k(request: Request) -> int:
    """``top_k=3`` in SageMaker's custom attributes; 5 without. Raises RequestError 422."""
    for pair in request.headers.get("x-amzn-sagemaker-custom-attributes", "").split(","):
        name, _, value = pair.partition("=")
        if name.strip() == "top_k":
            if not value.strip().isdigit() or not 1 <= int(value) <= 1000:
                raise RequestError(422, "bad_top_k", f"top_k={value.strip()!r} is not a whole number from 1 to 1000")
            return int(value)
    return 5


async def ping(request: Request) -> Response:
    """200 after one warm-up inference; 503 before, or when the model cannot be loaded."""
    service: Service = request.app.state.service
    return Response(status_code=200) if service.model else _error(503, "model_not_ready", service.problem)


async def invocations(request: Request) -> Response:
    """One picture in, its likeliest labels out."""
    service: Service = request.app.state.service
    if service.inside >= MAX_WAITING:
        return _error(429, "too_many_requests", f"{MAX_WAITING} requests are being served: try again in a second")
    service.inside += 1
    try:
        body, k = await _read(request), _top_k(request)
        content_type, accept = request.headers.get("content-type", ""), request.headers.get("accept", "*/*")
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(service.pool, service.answer, body, content_type, accept, k)
        return Response(answer, media_type="application/json")
    except RequestError as problem:
        return _error(problem.status, problem.code, str(problem))
    finally:
        service.inside -= 1


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


def main(argv: list[str]) -> int:
    """``server.py serve``; anything else is refused."""
    if argv != ["serve"]:
        print(f"error: unknown arguments {argv}: the container is started with 'serve'", file=sys.stderr)
        return 2
    port = int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080"))
    app = build_app(os.environ.get("SM_MODEL_DIR", "/opt/ml/model"))
    # The container is reached through SageMaker's own network only, hence all addresses.
    host = os.environ.get("BIND_HOST", "0.0.0.0")  # noqa: S104
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_keep_alive=75)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
