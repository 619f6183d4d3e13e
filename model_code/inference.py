"""SageMaker's four functions for a model artifact: model_fn, input_fn, predict_fn, output_fn. No torch here.

A request is one picture, or a batch: a JSON list of base64 texts, or the file parts of a multipart form. Parameters come in the
header ``X-Amzn-SageMaker-Custom-Attributes``: ``top_k=3,threshold=0.1,explain=true,label=Beagle``.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from classifier.served_model import ServedModel, load_model
from classifier.serving import Floats, PictureError, PictureTooLargeError, decode, top_k
from PIL import Image

MAX_PICTURES = 16
"""Pictures of one request."""
JSON_TYPES = ("application/json",)
PICTURE_TYPES = ("application/x-image", "application/octet-stream")


class RequestError(Exception):
    """A request that gets an error answer: HTTP ``status``, machine-readable ``code``, and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Parameters:
    """What a request asks for beside its pictures."""

    top_k: int = 5
    threshold: float = 0.0
    """Smallest probability that is named."""
    explain: bool = False
    label: str = ""
    """Class to explain; empty: the likeliest."""

    @classmethod
    def of(cls, attributes: str) -> Parameters:
        """From ``name=value`` pairs between commas; unknown names are left to others. Raises RequestError 422."""
        pairs = {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in attributes.split(","))}
        count, least, explain = pairs.get("top_k", "5"), pairs.get("threshold", "0"), pairs.get("explain", "false")
        if not (count.isascii() and count.isdigit() and len(count) <= 4 and 1 <= int(count) <= 1000):
            raise RequestError(422, "bad_top_k", f"top_k={count[:20]!r} is not a whole number from 1 to 1000")
        if explain not in ("true", "false"):
            raise RequestError(422, "bad_explain", f"explain={explain[:20]!r} is neither true nor false")
        return cls(int(count), _threshold(least), explain == "true", unquote(pairs.get("label", "")))


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RequestError(422, "bad_threshold", f"threshold={text[:20]!r} is not a number from 0 to 1")
    return value


def model_fn(model_dir: str, threads: int = 1) -> ServedModel:
    """Load the model from its folder. Raises ModelError."""
    return load_model(Path(model_dir), threads)


def kind_of(content_type: str) -> str:
    """``picture``, ``json`` or ``form``. Raises RequestError 415 for any other type."""
    kind = content_type.split(";")[0].strip().lower()
    if kind.startswith("image/") or kind in PICTURE_TYPES:
        return "picture"
    if kind in JSON_TYPES:
        return "json"
    if kind == "multipart/form-data":
        return "form"
    raise RequestError(
        415, "unsupported_media_type", f"content type {kind[:60]!r} is not accepted: send image/jpeg, image/png, JSON or a form"
    )


def pictures_in_json(body: bytes) -> tuple[list[bytes], bool]:
    """``(encoded pictures, whether a batch was sent)``.

    ``{"image": "<base64>"}``, ``{"images": [...]}`` or ``{"instances": [{"image": "<base64>"}, ...]}``. Raises RequestError.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "bad_json", 'the body is not JSON: send {"image": "<base64>"} or {"images": [...]}') from None
    if not isinstance(content, dict) or not ({"image", "images", "instances"} & content.keys()):
        raise RequestError(400, "bad_json", 'the JSON names no picture: send {"image": "<base64>"} or {"images": [...]}')
    if "image" in content:
        return [_bytes(content["image"], "image")], False
    texts = content["images"] if "images" in content else content["instances"]
    if not isinstance(texts, list):
        raise RequestError(400, "bad_json", 'images is no list: send {"images": ["<base64>", ...]}')
    bounded(len(texts))
    return [_bytes(one.get("image") if isinstance(one, dict) else one, f"picture {n}") for n, one in enumerate(texts)], True


def bounded(count: int) -> None:
    """Raises RequestError for no pictures, or too many."""
    if count == 0:
        raise RequestError(422, "no_pictures", "the request holds no picture: send at least one")
    if count > MAX_PICTURES:
        raise RequestError(422, "too_many_pictures", f"the request holds {count} pictures: send at most {MAX_PICTURES} at a time")


def _bytes(text: object, name: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise RequestError(400, "bad_base64", f"{name} is not base64 text: encode the picture's bytes") from None


def input_fn(body: bytes, content_type: str) -> Image.Image:
    """Decode one picture. Raises RequestError 415 for another type, 413 for too many pixels, 422 for what is no picture."""
    kind = kind_of(content_type)
    if kind == "json":
        pictures, many = pictures_in_json(body)
        if many:
            raise RequestError(422, "one_picture", 'this takes one picture: send {"image": "<base64>"}')
        body = pictures[0]
    elif kind == "form":
        raise RequestError(422, "one_picture", "this takes one picture: send its bytes")
    return decoded(body)


def decoded(body: bytes, short_side: int = 0) -> Image.Image:
    """One picture; ``short_side`` as for ``serving.decode``. Raises RequestError 413 or 422."""
    if not body:
        raise RequestError(422, "empty_body", "the body is empty: send the bytes of one picture")
    try:
        return decode(body, short_side)
    except PictureTooLargeError as problem:
        raise RequestError(413, "too_many_pixels", f"{problem}: send a smaller picture") from None
    except PictureError as problem:
        raise RequestError(422, "not_decodable", f"the body could not be decoded: {problem}") from None


def predict_fn(picture: Image.Image, model: ServedModel, parameters: Parameters | None = None) -> dict[str, Any]:
    """The likeliest labels and how strange the picture is."""
    return named(model.classify(picture), model, parameters or Parameters())


def named(logits: Floats, model: ServedModel, parameters: Parameters) -> dict[str, Any]:
    """Logits ``(1, C)`` as the answer to one picture."""
    likeliest = top_k(model.probabilities(logits)[0], model.labels, parameters.top_k)
    strange = model.novelty(logits)
    return {
        "predictions": [entry for entry in likeliest if entry["probability"] >= parameters.threshold],
        "novelty": None if strange is None else strange[0],
    }


def explain_fn(picture: Image.Image, model: ServedModel, parameters: Parameters) -> tuple[bytes, str]:
    """A PNG that shows where a class is seen, and custom attributes with that class. Raises RequestError 422."""
    label = None
    if parameters.label:
        if parameters.label not in model.labels:
            raise RequestError(422, "unknown_label", f"label={parameters.label[:60]!r} is none of the model's classes")
        label = model.labels.index(parameters.label)
    content, chosen, probability = model.explain(picture, label)
    return content, f"label={quote(model.labels[chosen])},probability={probability:.6f}"


def output_fn(prediction: dict[str, Any] | Sequence[dict[str, Any]], accept: str = "application/json") -> bytes:
    """JSON bytes. Raises RequestError 406 for another format."""
    kinds = [part.split(";")[0].strip() for part in accept.split(",")]
    if not any(kind in ("", "*/*", "application/*", "application/json") for kind in kinds):
        raise RequestError(406, "not_acceptable", f"cannot answer with {accept[:60]!r}: ask for application/json")
    return json.dumps(prediction, ensure_ascii=False).encode()
