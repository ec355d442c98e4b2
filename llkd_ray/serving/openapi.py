"""The protocol as an OpenAPI 3.1 document, with the limits of the endpoint that serves it."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llkd_ray.serving.dialects import TEIRequest, TEIResponse, VLLMRequest, VLLMResponse
from llkd_ray.serving.protocol import (
    ClassifyRequest,
    ClassifyResponse,
    Health,
    ModelCard,
    Problem,
)

_Schema = dict[str, Any]
_READ: tuple[type[BaseModel], ...] = (ClassifyRequest, VLLMRequest, TEIRequest)
_WRITTEN: tuple[type[BaseModel], ...] = (
    *(ClassifyResponse, VLLMResponse, ModelCard, Health, Problem),
    TEIResponse,
)
_REFUSALS = {
    "400": "The body is not JSON.",
    "401": "The token is missing or wrong.",
    "404": "Another model answers here.",
    "413": "The body is too large.",
    "422": "The body is another request, or goes past a limit.",
    "429": "More requests wait than can; ask again after the seconds of Retry-After.",
    "500": "A mistake of the endpoint's own; its log has the reason under the request's id.",
    "503": "The endpoint cannot answer now.",
    "504": "The request's time was up before its answer was there.",
}


def document(card: ModelCard, *, guarded: bool) -> _Schema:
    """Describe an endpoint.

    Args:
        card: What answers, and its limits.
        guarded: Whether it asks for a bearer token.

    Returns:
        What /openapi.json answers.
    """
    refused = set(_REFUSALS) - (set() if guarded else {"401"})
    on_reading = refused & {"401", "500"}
    on_asking = refused - {"404"}
    paths = {
        "/v1/classify": _ask("classify", ClassifyRequest, ClassifyResponse, on_asking),
        "/classify": _ask("classifyAsVLLM", VLLMRequest, VLLMResponse, refused),
        "/predict": _ask("predictAsTEI", TEIRequest, TEIResponse, on_asking),
        "/v1/model": _read("getModel", ModelCard, on_reading),
        "/healthz": _read("getHealth", Health, {"500", "503"}),
        "/openapi.json": _read("getOpenAPI", None, on_reading),
    }
    content: _Schema = {
        "openapi": "3.1.0",
        "info": {"title": f"llkd_ray {card.kind}", "version": card.name},
        "paths": paths,
        "components": {"schemas": _schemas(card)},
    }
    if guarded:
        content["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        content["security"] = [{"token": []}]
        paths["/healthz"]["get"]["security"] = []
    return content


def _schemas(card: ModelCard) -> _Schema:
    """Return the shapes, those of requests with the endpoint's limits."""
    shapes = [(shape, "validation") for shape in _READ]
    shapes += [(shape, "serialization") for shape in _WRITTEN]
    _, definitions = models_json_schema(
        shapes,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    schemas: _Schema = definitions["$defs"]
    schemas["Text"] = {
        "type": "string",
        "pattern": r"\S",
        "maxLength": card.max_text_chars,
        "description": "Not blank. What goes beyond the tokens that the model reads is cut.",
    }
    text = {"$ref": "#/components/schemas/Text"}
    many = {"type": "array", "minItems": 1, "maxItems": card.max_texts}
    texts = {**many, "items": text}
    single = {"type": "array", "minItems": 1, "maxItems": 1, "items": text}
    _put(schemas["ClassifyRequest"], "texts", texts)
    _put(schemas["VLLMRequest"], "input", {"anyOf": [text, texts]})
    _put(schemas["VLLMRequest"], "model", {"enum": [card.name, None]})
    _put(schemas["TEIRequest"], "inputs", {"anyOf": [text, single, {**many, "items": single}]})
    return schemas


def _put(schema: _Schema, key: str, limited: _Schema) -> None:
    kept = {"title", "description"} & schema["properties"][key].keys()
    described = {name: schema["properties"][key][name] for name in kept}
    schema["properties"][key] = {**described, **limited}


def _ask(
    operation: str, asked: type[BaseModel], answered: type[BaseModel], refused: set[str]
) -> _Schema:
    body = {"required": True, "content": _json(asked)}
    path = _read(operation, answered, refused, method="post")
    path["post"]["requestBody"] = body
    return path


def _read(
    operation: str, answered: type[BaseModel] | None, refused: set[str], method: str = "get"
) -> _Schema:
    # A plain text is what Serve's proxy answers where it refuses before the endpoint does.
    plain = {"text/plain": {"schema": {"type": "string"}}}
    responses: _Schema = {
        status: {
            "description": _REFUSALS[status],
            "content": {**_json(Problem), **(plain if status >= "429" else {})},
        }
        for status in sorted(refused)
    }
    responses["200"] = {
        "description": ((answered.__doc__ if answered else None) or "This document.").strip(),
        "content": _json(answered),
    }
    return {method: {"operationId": operation, "responses": responses}}


def _json(shape: type[BaseModel] | None) -> _Schema:
    schema = {"$ref": f"#/components/schemas/{shape.__name__}"} if shape else {"type": "object"}
    return {"application/json": {"schema": schema}}
