"""The service's OpenAPI document is true, as schemathesis finds out."""

import contextlib
import json
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import schemathesis
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from optimizer.client import Client
from tests.optimizer.service.conftest import a_spec

PATIENCE_S = 30.0
MAX_EXAMPLES = 15
# An endless answer: test_rest.py follows it.
ENDLESS = "/v1/jobs/{job_id}/events/stream"
# What the document can't say: whether a spec is valid, whose an id is, what a job's state allows.
REFUSABLE = {
    "positive_data_acceptance": {
        "expected-statuses": ["2xx", "3xx", 400, 403, 404, 409, 411, 413, 422, 429],
    }
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service started by its command, with a queued job and an upload."""
    folder = tmp_path_factory.mktemp("service")
    command = [
        sys.executable, "-m", "trimserve", "service", "run", "--data", str(folder / "data"),
        "--port", "0", "--grpc-port", "0", "--workers", "0",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    assert service.stdout is not None
    try:
        port = json.loads(service.stdout.readline())["http_port"]
        yield f"http://127.0.0.1:{port}"
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(PATIENCE_S)
        service.stdout.close()


def job_in(url: str, folder: Path) -> str:
    """The id of one that waits, since there is no worker."""
    for name in ("m.onnx", "d.npz"):
        (folder / name).write_bytes(name.encode())
    with contextlib.closing(Client(url)) as client:
        model, data = (client.upload(folder / name) for name in ("m.onnx", "d.npz"))
        return str(client.submit(a_spec(model, data))["id"])


def configuration(job_id: str) -> schemathesis.Config:
    """All checks, the same few examples each time; the job's id among random ones."""
    return schemathesis.Config.from_dict(
        {
            "seed": 1,
            "generation": {
                "max-examples": MAX_EXAMPLES,
                "deterministic": True,
                "database": "none",
            },
            "request-timeout": PATIENCE_S,
            "dictionaries": {"jobs": {"values": [job_id]}},
            "parameters": {"path.job_id": {"dictionary": "jobs", "probability": 0.5}},
            "phases": {"stateful": {"enabled": False}},
            "checks": REFUSABLE,
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


@pytest.mark.full
def test_service_does_what_its_document_says_when_schemathesis_asks(
    url: str, tmp_path: Path
) -> None:
    config = configuration(job_in(url, tmp_path))
    document = f"{url}/openapi.json"
    schema = schemathesis.openapi.from_url(document, config=config).exclude(path=ENDLESS)
    failures: dict[str, list[str]] = defaultdict(list)
    tested: set[str] = set()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError):
            failures[event.label].append(str(event.value))
        elif isinstance(event, events.FatalError):
            failures["schemathesis"].append(str(event.exception))
        elif isinstance(event, events.ScenarioFinished):
            if event.status is not Status.SKIP:
                tested.add(event.recorder.label)
            failures[event.recorder.label] += problems(event.recorder)
    found = {label: texts for label, texts in failures.items() if texts}
    assert not found, json.dumps(found, indent=1)
    wanted = {
        f"{method.upper()} {path}" for method, path in operations(document) if path != ENDLESS
    }
    assert tested >= wanted


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/v1/jobs", "GET, POST"), ("/v1/uploads/0123456789abcdef", "DELETE, GET, PATCH")],
)
def test_wrong_verb_is_told_the_right_ones(url: str, path: str, methods: str) -> None:
    with pytest.raises(HTTPError) as caught:
        urlopen(Request(url + path, method="PUT"), timeout=PATIENCE_S)
    with caught.value as answer:
        assert (answer.code, answer.headers["Allow"]) == (405, methods)


def operations(document: str) -> Iterator[tuple[str, str]]:
    """Method and path of all that are documented there."""
    with urlopen(document, timeout=PATIENCE_S) as answer:
        paths: dict[str, Any] = json.load(answer)["paths"]
    for path, methods in paths.items():
        for method in methods:
            yield method, path
