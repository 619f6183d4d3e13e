"""The API's OpenAPI description, served at /openapi.json."""

from __future__ import annotations

from typing import Any

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}
_PREDICTION = {
    "type": "object",
    "required": ["label", "probability"],
    "properties": {"label": {"type": "string"}, "probability": {"type": "number", "minimum": 0, "maximum": 1}},
}
_PROBLEMS = {
    "400": "A parameter is wrong",
    "401": "Token missing or wrong",
    "413": "Picture too large",
    "415": "Not a picture's Content-Type",
    "422": "Not decodable as a picture",
    "429": "Too many requests; see Retry-After",
    "503": "No model is deployed yet, or it is starting; see Retry-After",
    "504": "The model did not answer in time",
}


def description(auth: str) -> dict[str, Any]:
    """OpenAPI 3.1 document; ``auth`` is ``token`` or ``iam``."""
    scheme = (
        {"type": "http", "scheme": "bearer"}
        if auth == "token"
        else {"type": "apiKey", "name": "Authorization", "in": "header", "x-amazon-apigateway-authtype": "awsSigv4"}
    )
    closed: list[dict[str, list[str]]] = [{"auth": []}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Image classifier", "version": "1"},
        "servers": [{"url": "."}],
        "components": {"securitySchemes": {"auth": scheme}, "schemas": {"Error": _ERROR, "Prediction": _PREDICTION}},
        "paths": {
            "/predict": {"post": _predict(closed)},
            "/labels": {"get": {"summary": "Names of the classes", "security": closed, "responses": _answers(_LABELS)}},
            "/health": {"get": {"summary": "Whether the API answers", "responses": _answers({"type": "object"})}},
        },
    }


_LABELS = {"type": "object", "properties": {"labels": {"type": "array", "items": {"type": "string"}}}}
_RESULT = {
    "type": "object",
    "properties": {
        "predictions": {"type": "array", "items": {"$ref": "#/components/schemas/Prediction"}},
        "model": {"type": "object"},
        "request_id": {"type": "string"},
    },
}


def _predict(closed: list[dict[str, list[str]]]) -> dict[str, Any]:
    """POST /predict."""
    kinds = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff", "application/x-image")
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": "Classify one picture",
        "security": closed,
        "parameters": [
            {"name": "top_k", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}}
        ],
        "requestBody": {"required": True, "content": dict.fromkeys(kinds, binary)},
        "responses": _answers(_RESULT),
    }


def _answers(schema: dict[str, Any]) -> dict[str, Any]:
    """A good answer and all the others."""
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    others = {status: {"description": text, "content": problem} for status, text in _PROBLEMS.items()}
    return {"200": {"description": "OK", "content": {"application/json": {"schema": schema}}}, **others}
