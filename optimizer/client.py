"""A Python client of the optimizer's service (docs/service.md), over REST.

    from optimizer.client import Client

    with Client("http://127.0.0.1:8020") as client:
        model = client.upload("model.onnx")
        job = client.submit({**spec, "model": {"onnx": model}, "slo": slo})
        for event in client.follow(job["id"]):
            print(event["kind"], event["payload"])
        client.publish(job["id"], "production")

Documents are plain dictionaries, as the service's OpenAPI document describes them.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import urllib3

_CHUNK_BYTES = 8 << 20
_TIMEOUT = urllib3.Timeout(connect=10.0, read=60.0)
# Calls that change nothing, or do the same when they come twice, are sent again.
_RETRIES = urllib3.Retry(
    total=4,
    backoff_factor=0.3,
    status_forcelist=(502, 503, 504),
    allowed_methods=frozenset({"GET", "DELETE", "PATCH"}),
    raise_on_status=False,
)
_AWAY = (502, 503, 504)
"""Answers of a service whose database, or whose proxy, is away."""
PATIENCE_S = 900.0
"""A database that is restarted, or moved to another machine, is back by then."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 15.0
Document = dict[str, Any]


class ServiceError(Exception):
    """The service refused a request. `problems` has a sentence for each thing that is wrong."""

    def __init__(self, status: int, detail: str, problems: list[str]) -> None:
        super().__init__("\n".join(problems) if problems else detail)
        self.status = status
        self.detail = detail
        self.problems = problems


class Unreachable(Exception):
    """Nothing answers at the service's address."""


@dataclass
class Outage:
    """How long a service that doesn't answer is waited for: `patience_s` seconds, with pauses that
    double up to MAX_PAUSE_S."""

    patience_s: float
    _began_s: float | None = None
    _n_failures: int = 0

    def failed(self, now_s: float) -> float | None:
        """Seconds until it is tried again, None for no more."""
        self._began_s = now_s if self._began_s is None else self._began_s
        left_s = self._began_s + self.patience_s - now_s
        pause_s = min(FIRST_PAUSE_S * 2**self._n_failures, MAX_PAUSE_S, max(0.0, left_s))
        self._n_failures = min(self._n_failures + 1, 16)
        return pause_s if left_s > 0 else None

    def over(self) -> None:
        """It has answered."""
        self._began_s, self._n_failures = None, 0


class Client:
    """`url` is the service's, `key` an API key or a token where it asks for one."""

    def __init__(self, url: str, key: str | None = None, ca_file: str | None = None) -> None:
        """Raises ValueError for what isn't an address of HTTP."""
        _check_url(url)
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._pool = urllib3.PoolManager(
            retries=_RETRIES, timeout=_TIMEOUT, maxsize=8, ca_certs=ca_file
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._pool.clear()

    # --- jobs

    def submit(
        self,
        spec: Mapping[str, Any] | str,
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        verify: bool = True,
        key: str | None = None,
    ) -> Document:
        """Submit a spec, a mapping or YAML text, whose `slo` holds the SLO; returns the job.

        With an idempotency `key` it can be sent again without a second job. Raises ServiceError.
        """
        body = {
            "spec": spec if isinstance(spec, str) else dict(spec),
            "labels": dict(labels or {}),
            "priority": priority,
            "verify": verify,
        }
        return self._call("POST", "/v1/jobs", body, key)

    def jobs(self, **query: Any) -> Iterator[Document]:
        """All jobs, the newest first; `state`, `kind`, `owner`, `label` ("NAME=VALUE") choose."""
        after = None
        while True:
            page = self._call("GET", "/v1/jobs", query={**query, "after": after})
            yield from page["jobs"]
            after = page["next"]
            if after is None:
                return

    def job(self, job_id: str) -> Document:
        """A job with its spec, progress and publications."""
        return self._call("GET", f"/v1/jobs/{job_id}")

    def follow(
        self, job_id: str, after: int = 0, patience_s: float = PATIENCE_S
    ) -> Iterator[Document]:
        """The job's events, those that are there and those that come, until it has ended.

        A connection that breaks is taken up where it was, and an outage of the service or of its
        database is waited out, for `patience_s` seconds since it last answered. Raises Unreachable
        after that, and ServiceError for other refusals, as of a key that was revoked meanwhile."""
        outage = Outage(patience_s)
        while True:
            try:
                for event in self._stream(job_id, after, outage.over):
                    if event is None:
                        return
                    after = event["number"]
                    yield event
                problem: Exception = ConnectionError("the stream broke off")
            except ServiceError as error:
                if error.status not in _AWAY:
                    raise
                problem = error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                problem = error
            delay_s = outage.failed(time.monotonic())
            if delay_s is None:
                raise Unreachable(f"{self._url}: {_reason(problem)}") from problem
            time.sleep(delay_s)

    def wait(self, job_id: str, patience_s: float = PATIENCE_S) -> Document:
        """Wait until it has ended, patiently as `follow`; returns the job."""
        for _ in self.follow(job_id, patience_s=patience_s):
            pass
        found: Document = self.job(job_id)["job"]
        return found

    def logs(self, job_id: str) -> str:
        """What its process has printed."""
        pieces: list[str] = []
        after = 0
        while True:
            path = _with_query(f"/v1/jobs/{job_id}/logs", {"after": after})
            found = json.loads(self._answered("GET", path))
            if not found:
                break
            pieces += [one["text"] for one in found]
            after = found[-1]["number"]
        return "".join(pieces)

    def cancel(self, job_id: str) -> Document:
        return self._call("POST", f"/v1/jobs/{job_id}/cancel")

    def retry(self, job_id: str) -> Document:
        return self._call("POST", f"/v1/jobs/{job_id}/retry")

    def clone(
        self, job_id: str, changes: Mapping[str, Any] | None = None, key: str | None = None
    ) -> Document:
        """A new job with the spec of another, `changes` merged into it; None deletes a key."""
        return self._call("POST", f"/v1/jobs/{job_id}/clone", {"changes": dict(changes or {})}, key)

    def delete(self, job_id: str) -> None:
        self._call("DELETE", f"/v1/jobs/{job_id}")

    def result(self, job_id: str) -> bytes:
        """JSON, as `trimserve optimize --json` writes it."""
        return self._answered("GET", f"/v1/jobs/{job_id}/result")

    def report(self, job_id: str) -> bytes:
        """The report as an HTML page."""
        return self._answered("GET", f"/v1/jobs/{job_id}/report")

    def publish(
        self, job_id: str, repository: str, model: str | None = None, key: str | None = None
    ) -> Document:
        """Make what the job found the next version of `model`, its own name without.

        With an idempotency `key` it can be sent again without a second version; what that gives
        may be `writing` still: see `publications`."""
        body = {"repository": repository, "model": model}
        return self._call("POST", f"/v1/jobs/{job_id}/publications", body, key)

    def publications(self, job_id: str) -> list[Document]:
        """What was published of it, the oldest first."""
        found: list[Document] = json.loads(self._answered("GET", f"/v1/jobs/{job_id}/publications"))
        return found

    def load_test(self, publication_id: str, key: str | None = None) -> Document:
        """Put a published version under the load of its SLO; returns the job."""
        return self._call("POST", f"/v1/publications/{publication_id}/load-test", None, key)

    def overview(self) -> Document:
        """What the service allows."""
        return self._call("GET", "/v1/service")

    # --- files

    def upload(self, path: Path | str, told: Callable[[int, int], None] | None = None) -> str:
        """Upload a file, or what is missing of it; returns what a spec names it by.

        `told` is called with the bytes that are there and those that there are."""
        path = Path(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
            body = {"name": path.name, "size_bytes": size, "sha256": digest}
            upload = self._call("POST", "/v1/uploads", body)
            while not upload["complete"]:
                file.seek(upload["received_bytes"])
                chunk = file.read(_CHUNK_BYTES)
                headers = {
                    "Content-Type": "application/octet-stream",
                    "Upload-Offset": str(upload["received_bytes"]),
                }
                answer = self._answered(
                    "PATCH", f"/v1/uploads/{upload['id']}", content=chunk, headers=headers
                )
                upload = json.loads(answer)
                if told is not None:
                    told(upload["received_bytes"], size)
        reference: str = upload["reference"]
        return reference

    # --- the wire

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        key: str | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> Document:
        headers = {"Idempotency-Key": key} if key is not None else {}
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        answer = self._answered(method, _with_query(path, query), content, headers, key is not None)
        found: Document = json.loads(answer or b"{}")
        return found

    def _answered(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool = False,
    ) -> bytes:
        retries = _RETRIES.new(allowed_methods=None) if repeatable else _RETRIES
        try:
            answer = self._pool.request(
                method,
                self._url + path,
                body=content,
                headers={**self._headers, **(headers or {})},
                retries=retries,
            )
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"{self._url}: {_reason(error)}") from error
        if answer.status >= 400:
            raise _error(answer.status, answer.data)
        return answer.data

    def _stream(
        self, job_id: str, after: int, answered: Callable[[], None]
    ) -> Iterator[Document | None]:
        """Server-sent events (HTML Living Standard, 9.2): None for the stream's proper end.
        `answered` is called for each piece of the stream that comes."""
        answer = self._pool.request(
            "GET",
            f"{self._url}/v1/jobs/{job_id}/events/stream",
            headers={**self._headers, "Last-Event-ID": str(after)},
            preload_content=False,
            retries=False,  # `follow` has more patience
        )
        try:
            if answer.status >= 400:
                raise _error(answer.status, answer.read())
            yield from _events(answer, answered)
        finally:
            answer.close()


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError(f"got {url!r}, want http://HOST:PORT or https://HOST:PORT")


def _reason(error: Exception) -> str:
    """Why there was no answer, in the words of what is below urllib3, whose own name objects."""
    failed = getattr(error, "reason", None) or error
    inner = next((one for one in failed.args if isinstance(one, Exception)), failed)
    found = failed.__cause__ or inner
    if isinstance(found, OSError):
        return found.strerror or str(found)
    return "what answers doesn't speak HTTP" if isinstance(found, HTTPException) else str(found)


def _events(answer: Any, answered: Callable[[], None]) -> Iterator[Document | None]:
    name, data, held = "", [], b""
    for chunk in answer.stream(65_536):
        answered()
        *lines, held = (held + chunk).split(b"\n")
        for raw in lines:
            line = raw.decode().rstrip("\r")
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            elif not line and data:
                if name == "end":
                    yield None
                    return
                if name == "refused":
                    problem = json.loads("\n".join(data))
                    raise ServiceError(int(problem["status"]), str(problem["detail"]), [])
                yield json.loads("\n".join(data))
                name, data = "", []


def _error(status: int, body: bytes) -> ServiceError:
    try:
        problem = json.loads(body)
        return ServiceError(status, str(problem["detail"]), list(problem.get("problems", [])))
    except (ValueError, KeyError, TypeError):
        return ServiceError(status, f"HTTP {status}: {body[:200]!r}", [])


def _with_query(path: str, query: Mapping[str, Any] | None) -> str:
    pairs = [
        (name, one)
        for name, value in (query or {}).items()
        if value is not None
        for one in (value if isinstance(value, list | tuple) else [value])
    ]
    text = "&".join(f"{name}={quote(str(one), safe='')}" for name, one in pairs)
    return f"{path}?{text}" if text else path
