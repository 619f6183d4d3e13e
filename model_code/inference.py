"""SageMaker's four functions for a model artifact: model_fn, input_fn, predict_fn, output_fn. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from classifier.serving import OnnxModel, PictureError, PictureTooLargeError, decode, top_k
from PIL import Image

ACCEPTED = ("application/x-image", "application/octet-stream")


class RequestError(Exception):
    """A request that gets an error answer: HTTP ``status``, machine-readable ``code``, and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def model_fn(model_dir: str) -> OnnxModel:
    """Load the model from its folder. Raises FileNotFoundError."""
    return OnnxModel(Path(model_dir))


def input_fn(body: bytes, content_type: str) -> Image.Image:
    """Decode one picture. Raises RequestError 415 for another type, 413 for too many pixels, 422 for what is no picture."""
    kind = content_type.split(";")[0].strip().lower()
    if not kind.startswith("image/") and kind not in ACCEPTED:
        raise RequestError(415, "unsupported_media_type", f"content type {kind!r} is not accepted: send image/jpeg or image/png")
    if not body:
        raise RequestError(422, "empty_body", "the body is empty: send the bytes of one picture")
    try:
        return decode(body)
    except PictureTooLargeError as problem:
        raise RequestError(413, "too_many_pixels", f"{problem}: send a smaller picture") from None
    except PictureError as problem:
        raise RequestError(422, "not_decodable", f"the body could not be decoded: {problem}") from None


def predict_fn(picture: Image.Image, model: OnnxModel, k: int = 5) -> dict[str, Any]:
    """The ``k`` likeliest labels and what is known about the model."""
    return {"predictions": top_k(model.predict(picture), model.labels, k), "model": model.describe()}


def output_fn(prediction: dict[str, Any], accept: str = "application/json") -> bytes:
    """JSON bytes. Raises RequestError 406 for another format."""
    kinds = [part.split(";")[0].strip() for part in accept.split(",")]
    if not any(kind in ("", "*/*", "application/*", "application/json") for kind in kinds):
        raise RequestError(406, "not_acceptable", f"cannot answer with {accept!r}: ask for application/json")
    return json.dumps(prediction, ensure_ascii=False).encode()
