"""The OpenAPI document of the server, made of the very classes that check requests."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from conflayers_cli.server.schema import ChatRequest, CompletionRequest
from conflayers_cli.version import __version__

ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, schemas = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    definitions = schemas["$defs"]
    definitions["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    answer = {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {}},
    }
    json = {"application/json": {"schema": {"type": "object"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "conflayers", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _post("ChatRequest", answer)},
            "/v1/completions": {"post": _post("CompletionRequest", answer)},
            "/v1/models": {"get": _get(json, 401)},
            "/v1/models/{name}": {
                "get": _get(json, 401, 404),
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
            },
            "/health": {"get": _get(json, 503)},
            "/metrics": {"get": _get({"text/plain": {"schema": {"type": "string"}}}, 401)},
        },
        "components": {
            "schemas": definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(schema: str, answer: dict[str, Any]) -> dict[str, Any]:
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {
        "requestBody": {"required": True, "content": body},
        "responses": {**_ok(answer), **_errors(*ERRORS)},
    }


def _get(answer: dict[str, Any], *errors: int) -> dict[str, Any]:
    return {"responses": {**_ok(answer), **_errors(*errors)}}


def _ok(content: dict[str, Any]) -> dict[str, Any]:
    return {"200": {"description": "the answer", "content": content}}


def _errors(*codes: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(code): {"description": "an error", "content": content} for code in codes}
