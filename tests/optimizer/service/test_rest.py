"""REST: the operations as HTTP, who may call them, and what is refused."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from optimizer.service.app import Parts, Settings, make_parts, make_service
from optimizer.service.auth import Keys, Scope
from tests.optimizer.service.conftest import a_spec

CONTENT = b"x" * 150


@pytest.fixture
def client(parts: Parts, settings: Settings) -> Iterator[TestClient]:
    with TestClient(make_service(parts, settings), base_url="http://localhost") as client:
        yield client


def test_a_job_is_submitted_listed_cancelled_retried_and_deleted(
    client: TestClient, spec: dict[str, Any]
) -> None:
    answer = client.post("/v1/jobs", json={"spec": spec, "labels": {"team": "a"}})
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["owner"], job["name"]) == ("queued", "local", "tiny")
    page = client.get("/v1/jobs", params={"label": "team=a", "state": "queued"}).json()
    assert [one["id"] for one in page["jobs"]] == [job["id"]]
    details = client.get(f"/v1/jobs/{job['id']}").json()
    assert details["spec"] == spec
    assert client.post(f"/v1/jobs/{job['id']}/retry").status_code == 409
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/jobs/{job['id']}/retry").json()["run"] == 2
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert client.get(f"/v1/jobs/{job['id']}").status_code == 404
    actions = [one["action"] for one in client.get("/v1/audit").json()]
    assert actions[:5] == ["delete", "cancel", "retry", "cancel", "submit"]


def test_a_spec_alone_can_be_yaml(client: TestClient, spec: dict[str, Any]) -> None:
    text, headers = yaml.safe_dump(spec), {"Content-Type": "application/yaml"}
    assert client.post("/v1/jobs", content=text, headers=headers).status_code == 201


def test_an_idempotency_key_makes_one_job(client: TestClient, spec: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/v1/jobs", json={"spec": spec}, headers=headers)
    again = client.post("/v1/jobs", json={"spec": spec}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = client.post("/v1/jobs", json={"spec": {**spec, "seed": 1}}, headers=headers)
    assert other.status_code == 409


def test_a_clone_has_the_changes_and_its_parent(client: TestClient, spec: dict[str, Any]) -> None:
    job = client.post("/v1/jobs", json={"spec": {**spec, "seed": 3}}).json()
    changes = {"budget": {"trials": 9}, "seed": None}
    clone = client.post(f"/v1/jobs/{job['id']}/clone", json={"changes": changes}).json()
    assert clone["parent_id"] == job["id"]
    changed = client.get(f"/v1/jobs/{clone['id']}").json()["spec"]
    assert changed["budget"] == {"wall_clock_s": 60, "trials": 9}
    assert "seed" not in changed


def test_quotas_are_kept_and_said(client: TestClient, spec: dict[str, Any]) -> None:
    codes = [client.post("/v1/jobs", json={"spec": spec}).status_code for _ in range(4)]
    assert codes == [201, 201, 201, 429]


def test_an_upload_comes_in_chunks_and_is_resumed(client: TestClient) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    announced = {"name": "m.onnx", "size_bytes": len(CONTENT), "sha256": digest}
    upload = client.post("/v1/uploads", json=announced).json()
    url = f"/v1/uploads/{upload['id']}"

    def send(offset: int, content: bytes) -> Any:
        return client.patch(url, content=content, headers={"Upload-Offset": str(offset)})

    assert send(0, CONTENT[:100]).json()["received_bytes"] == 100
    assert send(0, CONTENT[:100]).json()["received_bytes"] == 100
    wrong = send(120, CONTENT[120:])
    assert (wrong.status_code, wrong.headers["Upload-Offset"]) == (409, "100")
    assert client.post("/v1/uploads", json=announced).json()["received_bytes"] == 100
    assert send(100, CONTENT[100:]).json()["complete"]


def test_an_upload_with_another_content_is_deleted(client: TestClient) -> None:
    announced = {"name": "m.onnx", "size_bytes": 3, "sha256": "0" * 64}
    upload = client.post("/v1/uploads", json=announced).json()
    url = f"/v1/uploads/{upload['id']}"
    answer = client.patch(url, content=b"abc", headers={"Upload-Offset": "0"})
    assert answer.status_code == 422
    assert "the upload is deleted" in answer.json()["detail"]
    assert client.get(url).status_code == 404


@pytest.mark.parametrize(("change", "message"), [
    ({"name": "../x.onnx"}, "without a folder"),
    ({"name": "x/y.onnx"}, "without a folder"),
    ({"name": "m.pt"}, "pickled files can run code"),
    ({"name": "m.pkl"}, "pickled files can run code"),
    ({"name": "m.pt2"}, "want one of"),
    ({"name": "m.exe"}, "want one of"),
    ({"size_bytes": 1_001}, "want 1 to 1000"),
    ({"sha256": "x" * 64}, "sha256"),
])  # fmt: skip
def test_uploads_are_refused_before_they_come(
    change: dict[str, Any], message: str, client: TestClient
) -> None:
    announced = {"name": "m.onnx", "size_bytes": 3, "sha256": "0" * 64, **change}
    answer = client.post("/v1/uploads", json=announced)
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert client.get("/v1/uploads").json() == []


def test_a_chunk_that_is_too_large_is_refused(client: TestClient) -> None:
    announced = {"name": "m.onnx", "size_bytes": 150, "sha256": "0" * 64}
    upload = client.post("/v1/uploads", json=announced).json()
    url = f"/v1/uploads/{upload['id']}"
    answer = client.patch(url, content=CONTENT, headers={"Upload-Offset": "0"})
    assert answer.status_code == 413
    assert client.get(url).json()["received_bytes"] == 0


Send = Callable[[TestClient, dict[str, Any]], Any]
JSON, TEXT = {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}


def post(client: TestClient, spec: dict[str, Any], **values: Any) -> Any:
    return client.post("/v1/jobs", json={"spec": spec, **values})


def result_of_a_queued_job(client: TestClient, spec: dict[str, Any]) -> Any:
    return client.get(f"/v1/jobs/{post(client, spec).json()['id']}/result")


BAD: list[tuple[str, Send, int, str]] = [
    ("not json", lambda c, _: c.post("/v1/jobs", content=b"{", headers=JSON), 422, "JSON"),
    ("type", lambda c, _: c.post("/v1/jobs", content=b"x", headers=TEXT), 415, "application/yaml"),
    ("unknown", lambda c, s: post(c, s, labls={}), 422, "labls"),
    ("label", lambda c, s: post(c, s, labels={"a": "<b>"}), 422, "labels"),
    ("priority", lambda c, s: post(c, s, priority=101), 422, "priority"),
    ("upload", lambda c, _: post(c, a_spec("upload:" + "0" * 16, "x")), 422, "no upload"),
    ("state", lambda c, _: c.get("/v1/jobs?state=odd"), 422, "state"),
    ("id", lambda c, _: c.get("/v1/jobs/..%2f"), 404, ""),
    ("no job", lambda c, _: c.get("/v1/jobs/0123456789abcdef"), 404, "there is no job"),
    ("no result", result_of_a_queued_job, 404, "it is queued"),
    ("origin", lambda c, _: c.post("/v1/jobs", headers={"Origin": "http://evil"}), 403, "Origin"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "send", "code", "message"), BAD, ids=[one[0] for one in BAD])
def test_bad_requests_are_refused_with_a_reason(
    name: str, send: Send, code: int, message: str, client: TestClient, spec: dict[str, Any]
) -> None:
    answer = send(client, spec)
    assert answer.status_code == code
    assert message in answer.text
    if code >= 400 and message:
        assert answer.headers["content-type"] == "application/problem+json"


def test_another_name_for_the_loopback_is_refused_where_nobody_shows_a_key(
    parts: Parts, settings: Settings
) -> None:
    guarded = replace(settings, hosts=frozenset({"localhost"}))
    with TestClient(make_service(parts, guarded), base_url="http://evil.example.com") as client:
        assert client.get("/v1/jobs").status_code == 403


def test_events_are_followed_to_the_end_and_gone_on_with(
    client: TestClient, spec: dict[str, Any], parts: Parts
) -> None:
    job = client.post("/v1/jobs", json={"spec": spec}).json()
    claim = parts.ledger.claim("w", 60.0)
    assert claim is not None
    parts.ledger.tell(job["id"], claim.lease.token, [("note", {"message": "<b>&\n"})])
    parts.ledger.succeed(job["id"], claim.lease.token, "met")
    url = f"/v1/jobs/{job['id']}/events/stream"
    for headers, numbers in (({}, [1, 2, 3, 4]), ({"Last-Event-ID": "2"}, [3, 4])):
        lines = client.get(url, headers=headers).text.splitlines()
        ids = [int(line[3:]) for line in lines if line.startswith("id:")]
        assert ids == numbers
        assert "event: end" in lines
    notes = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    assert notes[0]["payload"] == {"message": "<b>&\n"}


def test_keys_say_who_may_do_what(settings: Settings, spec: dict[str, Any]) -> None:
    guarded = replace(settings, keys=True)
    parts = make_parts(guarded)
    assert isinstance(parts.authenticator.keys, Keys)
    make = parts.authenticator.keys.make
    reader, read_key = make("ann", [Scope.READ])
    _, submit_key = make("bob", [Scope.READ, Scope.SUBMIT])
    _, admin_key = make("eve", [Scope.ADMIN])
    _, old_key = make("old", [Scope.ADMIN], valid_s=-1.0)
    with TestClient(make_service(parts, guarded)) as client:

        def call(method: str, url: str, key: str, **values: Any) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return client.request(method, url, headers=headers, **values).status_code

        assert call("GET", "/v1/jobs", "") == 401
        assert client.get("/v1/jobs").headers["WWW-Authenticate"] == "Bearer"
        assert call("GET", "/livez", "") == 200
        for wrong in (
            "ts_000000000000_" + "x" * 43,
            old_key,
            read_key[:-1],
            "eyJhbGciOiJub25lIn0.e30.",
        ):
            assert call("GET", "/v1/jobs", wrong) == 401
        assert call("GET", "/v1/jobs", read_key) == 200
        assert call("POST", "/v1/jobs", read_key, json={"spec": spec}) == 403
        # The uploads are another's.
        assert call("POST", "/v1/jobs", submit_key, json={"spec": spec}) == 422
        assert call("POST", "/v1/jobs", submit_key, json={"spec": spec, "priority": 1}) == 403
        headers = {"Authorization": f"Bearer {admin_key}"}
        job = client.post("/v1/jobs", json={"spec": spec}, headers=headers).json()
        assert job["owner"] == "key:eve"
        assert call("POST", f"/v1/jobs/{job['id']}/cancel", submit_key) == 403
        assert call("GET", "/v1/audit", submit_key) == 403
        assert call("GET", "/v1/audit", admin_key) == 200
        assert parts.authenticator.keys.revoke(reader.id)
        assert call("GET", "/v1/jobs", read_key) == 401
    parts.database.close()


def test_keys_are_kept_as_hashes(parts: Parts) -> None:
    _, text = Keys(parts.database).make("ann", [Scope.READ])
    with parts.database.reading() as connection:
        rows = str(connection.exec_driver_sql("SELECT * FROM keys").all())
    assert text.split("_", 2)[2] not in rows


def test_metrics_count_jobs_and_requests(client: TestClient, spec: dict[str, Any]) -> None:
    client.post("/v1/jobs", json={"spec": spec})
    text = client.get("/metrics").text
    assert 'trimserve_jobs{state="queued"} 1.0' in text
    assert (
        'trimserve_service_requests_total{code="201",operation="submit",transport="rest"} 1.0'
        in text
    )
    assert "trimserve_service_database_up 1.0" in text


def test_the_openapi_document_names_every_operation_once(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    names = [
        operation["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
    ]
    assert len(names) == len(set(names)) >= 24
