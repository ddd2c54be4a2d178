"""The OpenAPI description: what FastAPI knows of its routes, and inference, which goes around it.

Inference is described by the very structures that decode it, with an example for every model that
is ready when the description is asked for.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import fastapi
import msgspec
from fastapi.openapi.utils import get_openapi
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from serve.errors import ModelNotReady
from serve.model_config_pb2 import ModelConfig
from serve.service import InferenceService
from serve.tensor import NUMPY_DTYPES, TensorSpec
from serve.transport.documents import ErrorDocument
from serve.transport.json_codec import BINARY_ONLY, JSON_ELEMENTS, RequestDocument

Schema = dict[str, Any]
Answers = dict[int | str, dict[str, Any]]

MAX_EXAMPLES = 20
MAX_EXAMPLE_ELEMENTS = 4096
DESCRIPTIONS = {
    400: "The request doesn't fit the model or the protocol.",
    403: "Not allowed on this port.",
    404: "Unknown model or version.",
    413: "Larger than is allowed.",
    415: "A content encoding that isn't supported.",
    429: "The queue is full; `Retry-After` says when to try again.",
    500: "The engine or the server failed; the cause is in the server's log.",
    501: "A part of the protocol that isn't there.",
    503: "Loading, failed to load, or draining.",
    504: "The deadline was exceeded.",
}
INFER_ERRORS = (400, 404, 413, 415, 429, 500, 501, 503, 504)
_INFER_PATHS = {
    "/v2/models/{model}/infer": ("model",),
    "/v2/models/{model}/versions/{version}/infer": ("model", "version"),
}


# The answer that holds a model's configuration, for FastAPI.
CONFIG_ANSWER: Answers = {
    200: {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ModelConfig"}}}}
}


def responses(*statuses: int) -> Answers:
    """The error answers of a route, for FastAPI."""
    return {
        status: {"model": ErrorDocument, "description": DESCRIPTIONS[status]}
        for status in (*statuses, 500)
    }


def described(
    app: fastapi.FastAPI, service: InferenceService, with_inference: bool
) -> Callable[[], Schema]:
    """The function that makes the description of `app`, of what is loaded at that moment."""

    def openapi() -> Schema:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _forget_framework_errors(document)
        if with_inference:
            _add_inference(document, service)
        return document

    return openapi


def _forget_framework_errors(document: Schema) -> None:
    """FastAPI announces answers of its own kind (422), which this server doesn't give."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    schemas = document.get("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)


def _add_inference(document: Schema, service: InferenceService) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= _inference_schemas() | _config_schemas()
    examples = _examples(service)
    for path, parameters in _INFER_PATHS.items():
        document["paths"][path] = {"post": _operation(parameters, examples)}


def _operation(parameters: tuple[str, ...], examples: Schema) -> Schema:
    json_body: Schema = {"schema": {"$ref": "#/components/schemas/InferRequest"}}
    if examples:
        json_body["examples"] = examples
    return {
        "tags": ["inference"],
        "summary": "Infer",
        "operationId": "infer" + "".join(f"_{name}" for name in parameters),
        "description": _PROSE,
        "parameters": [*(_path_parameter(name) for name in parameters), *_HEADERS],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": json_body,
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "responses": {
            "200": {
                "description": "The outputs.",
                "headers": {"Inference-Header-Content-Length": _LENGTH_OF_JSON},
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/InferResponse"}},
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                },
            },
            **{str(status): _error(status) for status in INFER_ERRORS},
        },
    }


def _path_parameter(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _error(status: int) -> Schema:
    schema = {"$ref": "#/components/schemas/ErrorDocument"}
    return {
        "description": DESCRIPTIONS[status],
        "content": {"application/json": {"schema": schema}},
    }


@functools.cache
def _inference_schemas() -> Schema:
    """The request by its decoder's structures; data, which they keep raw, by what its elements
    may be; the response."""
    _, schemas = msgspec.json.schema_components(
        [RequestDocument], ref_template="#/components/schemas/{name}"
    )
    for old, new in (
        ("RequestDocument", "InferRequest"),
        ("InputDocument", "InferInput"),
        ("OutputDocument", "InferRequestedOutput"),
    ):
        schemas[new] = schemas.pop(old)
        schemas[new].pop("title", None)
    request = schemas["InferRequest"]["properties"]
    request["inputs"]["items"]["$ref"] = "#/components/schemas/InferInput"
    outputs = next(one for one in request["outputs"]["anyOf"] if one.get("type") == "array")
    outputs["items"]["$ref"] = "#/components/schemas/InferRequestedOutput"
    tensor = schemas["InferInput"]["properties"]
    tensor["datatype"] = {"type": "string", "enum": list(NUMPY_DTYPES)}
    tensor["shape"] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 32}
    tensor["data"] = {"$ref": "#/components/schemas/TensorData"}
    schemas["TensorData"] = _TENSOR_DATA
    schemas["InferOutput"] = _INFER_OUTPUT
    schemas["InferResponse"] = _INFER_RESPONSE
    return schemas


@functools.cache
def _config_schemas() -> Schema:
    """The model configuration and all messages in it, by their names in the .proto file."""
    schemas: Schema = {}
    left: list[Any] = [ModelConfig.DESCRIPTOR]  # of the generated code, which types them its way
    while left:
        message = left.pop()
        schemas[_message_name(message)] = {
            "type": "object",
            "properties": {field.name: _field_schema(field) for field in message.fields},
            "additionalProperties": False,
        }
        types = (_value_field(field).message_type for field in message.fields)
        left += [found for found in types if found and _message_name(found) not in schemas]
    return schemas


def _field_schema(field: FieldDescriptor) -> Schema:
    """As protobuf's JSON shows it, numbers of 64 bits as numbers."""
    value = _value_field(field)
    if value.message_type is not None:
        schema: Schema = {"$ref": f"#/components/schemas/{_message_name(value.message_type)}"}
    elif value.enum_type is not None:
        schema = {"type": "string", "enum": [one.name for one in value.enum_type.values]}
    else:
        schema = {"type": _JSON_TYPES[value.cpp_type]}
    if value is not field:
        return {"type": "object", "additionalProperties": schema}
    return {"type": "array", "items": schema} if field.is_repeated else schema


def _value_field(field: FieldDescriptor) -> FieldDescriptor:
    """That of a map's values, else the field itself."""
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        return message.fields_by_name["value"]
    return field


def _message_name(message: Descriptor) -> str:
    return message.full_name.removeprefix("inference.")


def _examples(service: InferenceService) -> Schema:
    """A body of zeros for every ready model whose inputs have a JSON form."""
    examples: Schema = {}
    for name in dict.fromkeys(slot.name for slot in service.repository.slots() if slot.model):
        try:
            signature, _ = service.signature(name)
        except ModelNotReady:
            continue
        inputs = [_example_input(spec) for spec in signature.inputs]
        if all(inputs) and len(examples) < MAX_EXAMPLES:
            examples[name] = {"summary": f"for model {name}", "value": {"inputs": inputs}}
    return examples


def _example_input(spec: TensorSpec) -> Schema | None:
    shape = [1 if size == -1 else size for size in spec.shape]
    count = math.prod(shape)
    if spec.datatype in BINARY_ONLY or count > MAX_EXAMPLE_ELEMENTS:
        return None
    zero = JSON_ELEMENTS[spec.datatype]()
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": [zero] * count}


_JSON_TYPES = {
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
    FieldDescriptor.CPPTYPE_FLOAT: "number",
    FieldDescriptor.CPPTYPE_INT32: "integer",
    FieldDescriptor.CPPTYPE_INT64: "integer",
    FieldDescriptor.CPPTYPE_STRING: "string",
    FieldDescriptor.CPPTYPE_UINT32: "integer",
    FieldDescriptor.CPPTYPE_UINT64: "integer",
}
_PROSE = """Answer one request. Bodies are JSON; tensors may travel as binary behind it, as Triton's
binary tensor data extension says: `parameters.binary_data_size` of an input, and the length of the
JSON in the header `Inference-Header-Content-Length`. Whether data and shapes fit is the model's
matter (`GET /v2/models/{model}`); what doesn't fit is answered by 400 and a message naming it."""
_WHOLE_NUMBER: Schema = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
_LENGTH_OF_JSON: Schema = {
    "description": "Bytes of JSON before the binary tensors.",
    "schema": _WHOLE_NUMBER,
}
_HEADERS: list[Schema] = [
    {"name": "Inference-Header-Content-Length", "in": "header", "required": False}
    | _LENGTH_OF_JSON,
    {
        "name": "Trimserve-Timeout-Ms",
        "in": "header",
        "required": False,
        "description": "The client's deadline, in milliseconds from the request's arrival.",
        "schema": _WHOLE_NUMBER,
    },
]
_TENSOR_DATA: Schema = {
    "description": "Elements in row-major order, flat or nested as the shape says.",
    "anyOf": [
        {"type": "boolean"},
        {"type": "number"},
        {"type": "string"},
        {"type": "array", "items": {"$ref": "#/components/schemas/TensorData"}},
    ],
}
_PARAMETERS: Schema = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [
            {"type": "boolean"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "string"},
        ]
    },
}
_INFER_OUTPUT: Schema = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string", "enum": list(NUMPY_DTYPES)},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "parameters": _PARAMETERS,
        "data": {
            "type": "array",
            "items": {"anyOf": [{"type": "boolean"}, {"type": "number"}, {"type": "string"}]},
        },
    },
    "additionalProperties": False,
}
_INFER_RESPONSE: Schema = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/InferOutput"}},
    },
    "additionalProperties": False,
}
