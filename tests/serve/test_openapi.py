"""The OpenAPI documents of both ports: complete, typed, and true, as schemathesis finds out."""

import asyncio
import contextlib
import json
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastapi
import pytest
import schemathesis
from fastapi.routing import APIRoute
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from serve.metrics import Metrics
from serve.service import InferenceService
from serve.transport.admin import control_app, data_app
from tests.clients.models import bfloat16
from tests.serve import onnx_models
from tests.serve.running_server import HOST, PATIENCE_S, ask, connect, fetch, running
from tests.serve.versions import publish

INFER = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")
INFER_STATUSES = {"200", "400", "404", "413", "415", "429", "500", "501", "503", "504"}
ALIASES = {"/v2/": "/v2"}  # served without a redirect, and the same
WITH_EXAMPLE = {"fixed", "linear", "pair", "spare", "text"}  # bfloat16 has no form in JSON
MAX_EXAMPLES = 25
CHECKS = {
    "allow_header_conformance", "content_type_conformance", "ensure_resource_availability",
    "ignored_auth", "missing_required_header", "negative_data_rejection", "not_a_server_error",
    "positive_data_acceptance", "response_headers_conformance", "response_schema_conformance",
    "status_code_conformance", "unsupported_method", "use_after_free",
}  # fmt: skip


# What schemathesis takes for an error without being told, and why it isn't one.
def known(*statuses: int) -> dict[str, Any]:
    """Server errors of the document that requests of the document may be answered by."""
    return {"not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", *statuses]}}


REFUSABLE = {
    "positive_data_acceptance": {
        "expected-statuses": ["2xx", "3xx", 400, 403, 404, 429, "5xx"],
    }
}
OPERATIONS: list[dict[str, Any]] = [
    {
        # Whether names, shapes and data fit the model isn't in the schema (400), nor which
        # parameters ask for what isn't there (501); a deadline of 0 ms is over at once (504), and
        # another operation unloads a model (503).
        "include-path": list(INFER),
        "checks": REFUSABLE | known(501, 503, 504),
    },
    {
        # Another operation unloads a model (503).
        "include-name-regex": "^GET /v2/models/",
        "checks": known(503),
    },
    {
        # A configuration is JSON within a string, a digest one that some version has.
        "include-path": "/v2/repository/models/{model}/load",
        "checks": REFUSABLE,
    },
    {
        # The model that no other operation needs.
        "include-path": "/v2/repository/models/{model}/unload",
        "parameters": {"path.model": "spare"},
    },
    {
        # Each severity includes the greater ones (400); files and formats aren't there (501).
        "include-name": "POST /v2/logging",
        "checks": REFUSABLE | known(501),
    },
    {
        # Requests aren't traced: anything but off is 501; and a model may be unloaded (503).
        "include-name-regex": "^POST .*/trace/setting$",
        "checks": known(501, 503),
    },
    {
        # Which regions and memory exist isn't in the schema.
        "include-path": [
            "/v2/systemsharedmemory/region/{region}/status",
            "/v2/systemsharedmemory/region/{region}/register",
        ],
        "checks": REFUSABLE,
    },
    {
        # There is none, which is all that these say.
        "include-path-regex": "^/v2/cudasharedmemory/",
        "checks": known(501),
    },
]


@dataclass(frozen=True)
class Documented:
    """A port of the running server, and the document that it serves."""

    port: int
    document: Any

    def operations(self) -> Iterator[tuple[str, str, Any]]:
        """Method, path and description of all of them."""
        for path, methods in self.document["paths"].items():
            for method, operation in methods.items():
                yield method, path, operation


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Documented]]:
    """The data port and the control port of a server that allows everything on both."""
    scratch = tmp_path_factory.mktemp("openapi")
    root = scratch / "repository"
    builders = (
        bfloat16, onnx_models.fixed, onnx_models.linear, onnx_models.pair, onnx_models.text, spare,
    )  # fmt: skip
    for builder in builders:
        publish(root, builder, scratch)
    control_port = free_port()
    with running(
        scratch / "log",
        f"--repository={root}",
        "--model-control=explicit",
        f"--control-port={control_port}",
        "--control-on-data-port",
        "--shared-memory-prefix=trimserve-test-openapi",
        "--drain-delay-s=0",
        *(f"--load-model={builder.__name__}" for builder in builders),
    ) as server:
        yield {
            name: Documented(port, fetch(port, "GET", "/openapi.json").json)
            for name, port in (("data", server.http_port), ("control", control_port))
        }


@pytest.fixture(params=["data", "control"])
def documented(request: pytest.FixtureRequest, ports: dict[str, Documented]) -> Documented:
    return ports[request.param]


@pytest.fixture
def applications() -> Iterator[dict[str, fastapi.FastAPI]]:
    async def made() -> dict[str, fastapi.FastAPI]:
        service = InferenceService(Metrics(), workers)
        return {"data": data_app(service), "control": control_app(service)}

    with ThreadPoolExecutor(1) as workers:
        yield asyncio.run(made())


def spare(path: Path) -> Path:
    """A model to unload."""
    return onnx_models.linear(path)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


# --- the document is true


def configuration() -> schemathesis.Config:
    """All checks, the same few examples each time; real names of models among random ones."""
    return schemathesis.Config.from_dict(
        {
            "seed": 1,
            "generation": {
                "max-examples": MAX_EXAMPLES,
                "deterministic": True,
                "database": "none",
            },
            "request-timeout": PATIENCE_S,
            "dictionaries": {
                "models": {"values": ["linear", "pair", "text"]},
                "versions": {"values": ["1"]},
            },
            "parameters": {
                "path.model": {"dictionary": "models", "probability": 0.7},
                "path.version": {"dictionary": "versions", "probability": 0.7},
            },
            # Nothing links one operation to the next: a test of sequences would repeat this one.
            "phases": {"stateful": {"enabled": False}},
            "operations": OPERATIONS,
        }
    )


def problems(recorder: ScenarioRecorder) -> list[str]:
    """What failed, and how to see it again."""
    return [
        f"{check.name}: {check.failure_info.failure}\n{check.failure_info.code_sample}"[:2000]
        for checks in recorder.checks.values()
        for check in checks
        if check.failure_info is not None
    ]


def test_server_does_what_its_document_says_when_schemathesis_asks(
    documented: Documented,
) -> None:
    url = f"http://{HOST}:{documented.port}/openapi.json"
    schema = schemathesis.openapi.from_url(url, config=configuration())
    failures: dict[str, list[str]] = defaultdict(list)
    tested: set[str] = set()
    checked: set[str] = set()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError):
            failures[event.label].append(str(event.value))
        elif isinstance(event, events.FatalError):
            failures["schemathesis"].append(str(event.exception))
        elif isinstance(event, events.ScenarioFinished):
            if event.status is not Status.SKIP:
                tested.add(event.recorder.label)
            checked |= {one.name for checks in event.recorder.checks.values() for one in checks}
            failures[event.recorder.label] += problems(event.recorder)
    found = {label: texts for label, texts in failures.items() if texts}
    assert not found, json.dumps(found, indent=1)
    wanted = {f"{method.upper()} {path}" for method, path, _ in documented.operations()}
    assert tested >= wanted
    assert checked >= CHECKS


def test_examples_are_answered_when_they_are_sent_as_documented(
    ports: dict[str, Documented],
) -> None:
    data = ports["data"]
    fetch(data.port, "POST", "/v2/repository/models/spare/load")  # whoever unloaded it
    document = fetch(data.port, "GET", "/openapi.json").json
    for path in INFER:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert set(body["examples"]) == WITH_EXAMPLE
        for model, example in body["examples"].items():
            url = path.format(model=model, version="1")
            answer = fetch(data.port, "POST", url, example["value"])
            assert answer.status == 200, (model, answer.body)
            assert answer.json["model_name"] == model


@pytest.mark.parametrize("path", [*INFER, "/v2/logging", "/v2/models/{model}/trace/setting"])
def test_wrong_verbs_are_told_the_right_ones_when_a_path_has_any(
    ports: dict[str, Documented], path: str
) -> None:
    data = ports["data"]
    allowed = {method.upper() for method, other, _ in data.operations() if other == path}
    with contextlib.closing(connect(data.port)) as connection:
        answer = ask(connection, "DELETE", path.format(model="linear", version="1"))
    assert answer.status == 405
    assert set(answer.headers["Allow"].split(", ")) == allowed


# --- the document is complete


@pytest.mark.parametrize("name", ["data", "control"])
def test_every_route_is_documented_when_it_is_served(
    ports: dict[str, Documented], applications: Mapping[str, fastapi.FastAPI], name: str
) -> None:
    """And every documented one served, of which inference goes around the framework."""
    served = {
        (method.lower(), ALIASES.get(route.path, route.path))
        for route in applications[name].routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    if name == "data":
        served |= {("post", path) for path in INFER}
    assert served == {(method, path) for method, path, _ in ports[name].operations()}


def test_only_the_descriptions_are_beside_the_routes_when_served(
    applications: Mapping[str, fastapi.FastAPI],
) -> None:
    for app in applications.values():
        others = {getattr(one, "path", one) for one in app.routes if not isinstance(one, APIRoute)}
        assert others == {"/openapi.json", "/docs", "/docs/oauth2-redirect"}


def test_operations_take_only_what_their_path_names_when_documented(
    documented: Documented,
) -> None:
    """A parameter of a function that a path doesn't name would become one of the query."""
    for method, path, operation in documented.operations():
        places = {one["in"] for one in operation.get("parameters", [])}
        assert places <= {"path", "header"}, (method, path)
        named = [one["name"] for one in operation.get("parameters", []) if one["in"] == "path"]
        assert sorted(named) == sorted(part[1:-1] for part in path.split("/") if part[:1] == "{")


@pytest.mark.parametrize("path", INFER)
def test_inference_declares_every_status_when_documented(
    ports: dict[str, Documented], path: str
) -> None:
    operation = ports["data"].document["paths"][path]["post"]
    assert set(operation["responses"]) == INFER_STATUSES
    for status, answer in operation["responses"].items():
        assert answer["description"], status
        assert "application/json" in answer["content"], status


# --- the document is typed


def untyped(schema: Any, where: str) -> Iterator[str]:
    """Where a schema, or one within it, allows anything at all."""
    if not isinstance(schema, dict) or not schema.keys() & {"type", "$ref", "anyOf", "enum"}:
        yield where
        return
    if schema.get("type") == "array" or "items" in schema:
        yield from untyped(schema.get("items"), f"{where}[]")
    if schema.get("type") == "object":
        if "properties" not in schema and "additionalProperties" not in schema:
            yield where
        for name, inner in schema.get("properties", {}).items():
            yield from untyped(inner, f"{where}.{name}")
        others = schema.get("additionalProperties", False)
        if not isinstance(others, bool) or others is True:
            yield from untyped(others, f"{where}.*")
    for inner in schema.get("anyOf", ()):
        yield from untyped(inner, f"{where}|")


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for inner in node.values():
            yield from references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from references(inner)


def test_nothing_is_left_open_when_documented(documented: Documented) -> None:
    found: list[str] = []
    for name, schema in documented.document.get("components", {}).get("schemas", {}).items():
        found += untyped(schema, name)
    for method, path, operation in documented.operations():
        where = f"{method} {path}"
        for parameter in operation.get("parameters", []):
            found += untyped(parameter["schema"], f"{where} {parameter['name']}")
        bodies = [operation["requestBody"]] if "requestBody" in operation else []
        for body in (*bodies, *operation["responses"].values()):
            for kind, content in body["content"].items():
                found += untyped(content.get("schema"), f"{where} {kind}")
    assert not found


def test_every_schema_is_used_and_there_when_referred_to(documented: Documented) -> None:
    schemas = documented.document["components"]["schemas"]
    wanted = {reference.rpartition("/")[2] for reference in references(documented.document)}
    assert wanted == set(schemas)


@pytest.mark.parametrize(
    ("schema", "want"),
    [
        pytest.param({}, ["x"], id="an empty schema"),
        pytest.param(None, ["x"], id="no schema"),
        pytest.param({"type": "array"}, ["x[]"], id="an array of anything"),
        pytest.param({"type": "object"}, ["x"], id="an object of anything"),
        pytest.param(
            {"type": "object", "additionalProperties": True}, ["x.*"], id="any other property"
        ),
        pytest.param({"anyOf": [{"type": "string"}, {}]}, ["x|"], id="one of several"),
        pytest.param(
            {"type": "object", "properties": {"a": {"type": "string"}}}, [], id="nothing, if typed"
        ),
    ],
)
def test_untyped_finds_what_is_open_when_it_is(schema: Any, want: list[str]) -> None:
    assert list(untyped(schema, "x")) == want


@pytest.mark.parametrize("body", [b"\x0b", b"[]", b"{", b"nul", b'{"trace_level": "\xff"}'])
def test_settings_stay_when_the_body_is_no_json_object(documented: Documented, body: bytes) -> None:
    answer = fetch(documented.port, "POST", "/v2/trace/setting", body)
    assert answer.status == 400
    assert answer.error.startswith("body: ")
