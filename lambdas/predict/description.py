"""The API's OpenAPI 3.1 description, served at /openapi.json."""

from __future__ import annotations

from typing import Any

from bodies import MAX_PICTURES
from pictures import TYPES

Schema = dict[str, Any]


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Schema = {"type": "string"}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_BASE64: Schema = {"type": "string", "contentEncoding": "base64"}
_BINARY: Schema = {"type": "string", "format": "binary"}
_SCHEMAS: dict[str, Schema] = {
    "Problem": _object({"code": _TEXT, "message": _TEXT}),
    "Error": _object({"error": _ref("Problem")}, {"request_id": _TEXT}),
    "Prediction": _object({"label": _TEXT, "probability": _SHARE}),
    "Novelty": {
        "description": "Share of the validation pictures that look more familiar; near 1 it may show none of the classes",
        "anyOf": [_SHARE, {"type": "null"}],
    },
    "Model": {"type": "object", "description": "Run, data set, test accuracy and form of the model that answered"},
    "Answer": _object(
        {"predictions": _list(_ref("Prediction")), "novelty": _ref("Novelty"), "model": _ref("Model"), "request_id": _TEXT}
    ),
    "Result": {
        "anyOf": [
            _object({"predictions": _list(_ref("Prediction"))}, {"novelty": _ref("Novelty")}),
            _object({"error": _ref("Problem")}),
        ]
    },
    "Batch": _object({"results": _list(_ref("Result")), "model": _ref("Model"), "request_id": _TEXT}),
    "Labels": _object({"labels": _list(_TEXT), "model": _ref("Model")}),
    "Health": _object({"status": {"const": "ok"}}),
}

_RETRY: dict[str, Any] = {"Retry-After": {"description": "Seconds to wait before the next try", "schema": {"type": "integer"}}}
_PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "400": ("A parameter or the form of the body is wrong", {}),
    "401": ("Token missing or wrong", {}),
    "403": ("Not allowed", {}),
    "406": ("The answer is a picture; send Accept: image/png", {}),
    "413": ("Picture too large", {}),
    "415": ("Not a supported Content-Type", {}),
    "422": ("Not decodable as a picture, no picture or too many, or a class that the model does not know", {}),
    "429": ("Too many requests", _RETRY),
    "500": ("The service failed", _RETRY),
    "502": ("The model failed", {}),
    "503": ("No model is deployed, or it is starting or waking up", _RETRY),
    "504": ("The model did not answer in time", _RETRY),
}


def description(auth: str) -> dict[str, Any]:
    """OpenAPI 3.1 document; ``auth`` is ``token`` or ``iam``."""
    scheme = (
        {"type": "http", "scheme": "bearer"}
        if auth == "token"
        else {"type": "apiKey", "name": "Authorization", "in": "header", "x-amazon-apigateway-authtype": "awsSigv4"}
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Image classifier", "version": "2", "description": "Names what a picture shows, with probabilities."},
        "servers": [{"url": "."}],
        "components": {"securitySchemes": {"auth": scheme}, "schemas": _SCHEMAS},
        "paths": {
            "/predict": {"post": _predict()},
            "/predict/batch": {"post": _batch()},
            "/explain": {"post": _explain()},
            "/labels": {"get": _read("Names of the classes", "Labels", closed=True)},
            "/health": {"get": _read("Whether the API answers", "Health")},
            "/openapi.json": {"get": {"summary": "This document", "responses": {"200": _json_answer({"type": "object"})}}},
            "/": {"get": {"summary": "The web page", "responses": {"200": {"description": "OK", "content": {"text/html": {}}}}}},
        },
    }


_CLOSED: list[dict[str, list[str]]] = [{"auth": []}]
_NAMED = [
    {
        "name": "top_k",
        "in": "query",
        "description": "How many classes to name",
        "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5},
    },
    {"name": "threshold", "in": "query", "description": "Smallest probability to name", "schema": {**_SHARE, "default": 0}},
]


def _one_picture() -> dict[str, Any]:
    """The body of one picture."""
    kinds = [kind for kind in TYPES if kind != "image/x-ms-bmp"]
    content: dict[str, Any] = {kind: {"schema": _BINARY} for kind in kinds}
    content["application/json"] = {"schema": _object({"image": _BASE64})}
    return {"required": True, "content": content}


def _predict() -> dict[str, Any]:
    return {
        "summary": "Classify one picture",
        "security": _CLOSED,
        "parameters": _NAMED,
        "requestBody": _one_picture(),
        "responses": {"200": _json_answer(_ref("Answer")), **_problems()},
    }


def _batch() -> dict[str, Any]:
    form = _object({"file": _list(_BINARY, minItems=1, maxItems=MAX_PICTURES)})
    content = {
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": _object({"images": _list(_BASE64, minItems=1, maxItems=MAX_PICTURES)})},
    }
    return {
        "summary": f"Classify up to {MAX_PICTURES} pictures; one that cannot be read gets an error of its own",
        "security": _CLOSED,
        "parameters": _NAMED,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": _json_answer(_ref("Batch")), **_problems()},
    }


def _explain() -> dict[str, Any]:
    headers = {
        "X-Label": {"description": "The class that is explained, percent-encoded", "schema": _TEXT},
        "X-Probability": {"description": "Its probability", "schema": _SHARE},
    }
    picture = {"description": "The picture under a heat map", "headers": headers, "content": {"image/png": {"schema": _BINARY}}}
    label = {"name": "label", "in": "query", "description": "The class to explain; the likeliest without", "schema": _TEXT}
    return {
        "summary": "Show where in the picture a class is seen",
        "security": _CLOSED,
        "parameters": [label],
        "requestBody": _one_picture(),
        "responses": {"200": picture, **_problems()},
    }


def _read(summary: str, schema: str, *, closed: bool = False) -> dict[str, Any]:
    """A GET without parameters."""
    others = {status: answer for status, answer in _problems().items() if closed and status not in ("413", "415", "422")}
    found = {"summary": summary, "responses": {"200": _json_answer(_ref(schema)), **others}}
    return {**found, "security": _CLOSED} if closed else found


def _json_answer(schema: Schema) -> dict[str, Any]:
    return {"description": "OK", "content": {"application/json": {"schema": schema}}}


def _problems() -> dict[str, Any]:
    """All answers that are not 200."""
    content = {"application/json": {"schema": _ref("Error")}}
    return {
        status: {"description": text, "content": content, **({"headers": headers} if headers else {})}
        for status, (text, headers) in _PROBLEMS.items()
    }
