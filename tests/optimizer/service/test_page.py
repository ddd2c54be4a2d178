"""The page without a browser: what it shows, to whom, and what it takes."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi.testclient import TestClient

from optimizer.service.app import Parts, Settings, make_parts, make_service
from optimizer.service.auth import LOCAL, Caller, Keys, Scope
from optimizer.service.sessions import COOKIE, MAX_PER_KEY, VALID_S
from tests.optimizer.service import told
from tests.optimizer.service.conftest import a_spec, uploaded
from tests.optimizer.study_result import large, met

URL = "http://localhost"
OWN = {"Origin": URL}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture
def client(parts: Parts, settings: Settings) -> Iterator[TestClient]:
    app = make_service(parts, settings)
    with TestClient(app, base_url=URL, follow_redirects=False) as client:
        yield client


@pytest.fixture
def study_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """With the SLO of the results that jobs here end with."""
    return {**spec, "slo": met().slo.to_dict(), "budget": {"wall_clock_s": 600, "trials": 60}}


@pytest.fixture
def ended(parts: Parts, study_spec: dict[str, Any]) -> str:
    """The id of a job that has found, verified and stored a version."""
    job, _ = parts.operations.submit(LOCAL, study_spec)
    told.succeed(parts, told.taken(parts, job.id), met())
    return job.id


@dataclass(frozen=True)
class Shown:
    """A service with a job that has ended, of tests that change nothing."""

    client: TestClient
    job_id: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("service")
    settings = Settings(str(folder / "jobs.sqlite"), str(folder / "blobs"), folder / "scratch")
    parts = make_parts(settings)
    ops = parts.operations
    slo = met().slo.to_dict()
    spec = a_spec(uploaded(ops, "m.onnx"), uploaded(ops, "d.npz"), slo=slo)
    job, _ = ops.submit(LOCAL, spec)
    told.succeed(parts, told.taken(parts, job.id), met())
    app = make_service(parts, settings)
    with TestClient(app, base_url=URL, follow_redirects=False) as client:
        yield Shown(client, job.id)
    parts.database.close()


@pytest.fixture
def guarded(settings: Settings) -> Iterator[Parts]:
    made = make_parts(replace(settings, keys=True))
    yield made
    made.database.close()


@pytest.fixture
def stranger(guarded: Parts, settings: Settings) -> Iterator[TestClient]:
    """Of a service that asks for keys."""
    app = make_service(guarded, replace(settings, keys=True))
    with TestClient(app, base_url=URL, follow_redirects=False) as client:
        yield client


def a_key(parts: Parts, name: str, *scopes: Scope) -> str:
    assert parts.authenticator.keys is not None
    return parts.authenticator.keys.make(name, scopes)[1]


def log_in(client: TestClient, key: str) -> Any:
    return client.post("/login", data={"key": key, "next": "/"}, headers=OWN)


def text_of(page: str) -> str:
    """What a reader sees of it, in one line."""
    text = re.sub(r"</?(b|a|span|code)\b[^>]*>", "", page)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def once(page: str) -> str:
    """What makes a form for a load test one request, however often it is sent."""
    (found,) = re.findall(r'name="once" value="([^"]+)"', page)
    return str(found)


def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """As a browser reads them: tag and attributes."""
    found: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attrs)))

    reader = Reader()
    reader.feed(page)
    return found


# --- what is shown


def test_jobs_are_listed_with_state_and_budget_when_there_are_some(
    client: TestClient, parts: Parts, study_spec: dict[str, Any]
) -> None:
    job, _ = parts.operations.submit(LOCAL, study_spec, labels={"team": "vision"})
    told.tell(parts, told.taken(parts, job.id), told.trials(met(), met().variants[:2]))
    parts.operations.submit(LOCAL, {**study_spec, "name": "second"})
    page = text_of(client.get("/").text)
    assert "all 2 queued 1 running 1" in page
    assert "25 s of 60 min 2 of 60 trials local" in page
    assert "team=vision" in page
    only = client.get("/", params={"state": "queued"}).text
    assert "second" in only
    assert job.id not in only
    assert "No job is failed." in client.get("/", params={"state": "failed"}).text


def test_jobs_go_on_on_the_next_page_when_there_are_many(
    client: TestClient, parts: Parts, study_spec: dict[str, Any]
) -> None:
    ids = []
    for n in range(26):
        job, _ = parts.operations.submit(LOCAL, {**study_spec, "name": f"job{n}"})
        parts.operations.cancel(LOCAL, job.id)
        ids.append(job.id)
    first = client.get("/").text
    assert ids[0] not in first
    link = re.search(r'href="(/\?after=[0-9a-f]+)"', first)
    assert link is not None
    assert ids[0] in client.get(link[1]).text


def test_a_running_job_shows_what_its_events_say(
    client: TestClient, parts: Parts, study_spec: dict[str, Any]
) -> None:
    job, _ = parts.operations.submit(LOCAL, study_spec)
    claim = told.taken(parts, job.id)
    told.tell(parts, claim, told.trials(met(), met().variants[:5]), "epoch 1\n")
    page = client.get(f"/jobs/{job.id}").text
    said = text_of(page)
    assert "62 s of 60 min 5 of 60 trials" in said
    assert "p99 within 50 ms: openvino int8 (percentile) wins." in said
    assert page.count('class="mark ') == 5
    assert "epoch 1" in said
    assert f'action="/jobs/{job.id}/cancel"' in page
    assert f'action="/jobs/{job.id}/publish"' not in page


def test_an_ended_job_shows_answer_front_ablation_layers_and_lineage(
    client: TestClient, ended: str
) -> None:
    page = client.get(f"/jobs/{ended}").text
    said = text_of(page)
    for expected in (
        "keeps p99 within 50 ms at 100 requests/s (measured 13.4 ms)",
        "Latencies are both predicted. without cost per million p99 drop, points size quantization",
        "blocks.0.conv",
        "export opset 20 quantization calibration percentile",
        "TypeError: unsupported operator <aten::foo>",
    ):
        assert expected in said or html.escape(expected) in page, expected
    # Two have no latency to be drawn at.
    assert page.count('class="mark ') == 6
    assert "2 variants aren't drawn" in said
    assert f'action="/jobs/{ended}/publish"' in page


def test_a_study_of_many_variants_folds_them(
    client: TestClient, parts: Parts, study_spec: dict[str, Any]
) -> None:
    job, _ = parts.operations.submit(LOCAL, study_spec)
    told.succeed(parts, told.taken(parts, job.id), large(90))
    page = client.get(f"/jobs/{job.id}").text
    assert "73 more" in text_of(page)
    assert page.count('name="variant"') == 98


def test_variants_are_compared_when_two_or_more_are_chosen(shown: Shown) -> None:
    chosen, other = met().variants[4], met().variants[1]
    url = f"/jobs/{shown.job_id}/compare"
    page = shown.client.get(url, params={"variant": [chosen.id, other.id]}).text
    rows = {
        re.sub(r"\s*\(differs\)", "", text_of(row[0])): [text_of(cell) for cell in row[1:]]
        for row in (
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL)
            for line in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
        )
    }
    assert rows["cost per million"] == ["0.0546 (the best)", "0.138"]
    assert rows["accuracy"] == ["93.86%", "94.25% (the best)"]
    assert rows["quantization"] == ["calibration percentile, per_channel True", "–"]
    assert rows["export"] == ["opset 20", "opset 20"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        pytest.param([], "2 to 6 variants", id="none"),
        pytest.param([met().variants[0].id], "2 to 6 variants", id="one"),
        pytest.param([f"{n:064x}" for n in range(7)], "2 to 6 variants", id="too many"),
        pytest.param(["0" * 64, "1" * 64], "variants of this job", id="unknown"),
        pytest.param(["<b>", "../x"], "query.variant", id="no ids"),
    ],
)
def test_a_comparison_is_refused_with_a_reason_when_the_choice_is_wrong(
    ids: list[str], message: str, shown: Shown
) -> None:
    answer = shown.client.get(f"/jobs/{shown.job_id}/compare", params={"variant": ids})
    assert answer.status_code == 422
    assert message in text_of(answer.text)


# --- what others have said stays text


def test_hostile_words_stay_words_wherever_they_are_shown(
    client: TestClient, parts: Parts, study_spec: dict[str, Any]
) -> None:
    result = met()
    rows = tuple(
        replace(
            one,
            label=one.label + HOSTILE,
            engine=HOSTILE,
            recipe=tuple(
                replace(step, technique=HOSTILE, parameters={HOSTILE: HOSTILE})
                for step in one.recipe
            ),
        )
        for one in result.variants
    )
    layers = tuple(replace(one, name=HOSTILE) for one in result.layers)
    result = replace(result, model=HOSTILE, variants=rows, layers=layers, notes=(HOSTILE,))
    job, _ = parts.operations.submit(LOCAL, study_spec)
    claim = told.taken(parts, job.id)
    events = told.trials(result, result.variants)
    told.tell(parts, claim, [*events, ("phase", {"name": HOSTILE}), ("note", {"message": HOSTILE})],
              HOSTILE)  # fmt: skip
    running = client.get(f"/jobs/{job.id}").text
    told.succeed(parts, claim, result)
    pages = [running, client.get(f"/jobs/{job.id}").text]
    ids = [one.id for one in rows[:3]]
    pages.append(client.get(f"/jobs/{job.id}/compare", params={"variant": ids}).text)
    failed, _ = parts.operations.submit(LOCAL, study_spec)
    parts.ledger.fail(failed.id, told.taken(parts, failed.id).lease.token, HOSTILE)
    pages += [client.get(f"/jobs/{failed.id}").text, client.get("/").text]
    for page in pages:
        assert "alert(1)" in page
        found = elements(page)
        assert [one for one in found if one[0] == "script"] == [
            ("script", {"type": "module", "src": "/static/page.js"})
        ]
        assert not [tag for tag, _ in found if tag in ("img", "iframe", "object", "style")]
        names = {name for _, attributes in found for name in attributes}
        assert not [name for name in names if name == "style" or name.startswith("on")]


@pytest.mark.parametrize(
    "path", ["/", "/login", "/jobs/0123456789abcdef", "/jobs/x", "/static/page.js", "/static/none"]
)
def test_every_answer_keeps_foreign_content_out(path: str, shown: Shown) -> None:
    headers = shown.client.get(path).headers
    policy = dict(
        part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/jobs/0123456789abcdef", 404),
        ("/jobs/0123456789abcdef/compare?variant=0&variant=1", 404),
        ("/jobs/../etc", 404),
        ("/jobs/ABC", 404),
        ("/static/../routes.py", 404),
        ("/static/none.js", 404),
        ("/?state=odd", 422),
        ("/?after=0123456789abcdef", 404),
    ],
)
def test_what_isn_t_there_is_a_page_that_says_so(path: str, status: int, shown: Shown) -> None:
    answer = shown.client.get(path)
    assert answer.status_code == status
    if not path.startswith(("/jobs/..", "/static/..")):
        assert answer.headers["content-type"].startswith("text/html")
        assert 'href="/"' in answer.text


def test_a_script_isn_t_sent_again_when_the_browser_has_it(shown: Shown) -> None:
    first = shown.client.get("/static/page.js")
    assert first.headers["content-type"].startswith("text/javascript")
    again = shown.client.get("/static/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


# --- what is done


def test_buttons_cancel_retry_publish_and_load_test(
    client: TestClient, parts: Parts, ended: str, study_spec: dict[str, Any]
) -> None:
    job, _ = parts.operations.submit(LOCAL, study_spec)
    for action, state in (("cancel", "cancelled"), ("retry", "queued")):
        answer = client.post(f"/jobs/{job.id}/{action}", headers=OWN)
        assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job.id}")
        assert parts.ledger.job(job.id).state == state
    parts.operations.cancel(LOCAL, job.id)

    data = {"repository": "prod", "model": ""}
    answer = client.post(f"/jobs/{ended}/publish", data=data, headers=OWN)
    assert answer.headers["location"] == f"/jobs/{ended}#published"
    (published,) = parts.operations.publications(LOCAL, ended)
    assert (published.repository, published.version, published.state) == ("prod", "1", "done")

    url = f"/publications/{published.id}/load-test"
    key = once(client.get(f"/jobs/{ended}").text)
    sent = {"once": key}
    places = {client.post(url, data=sent, headers=OWN).headers["location"] for _ in range(2)}
    (place,) = places
    assert once(client.get(f"/jobs/{ended}").text) != key
    test_id = place.removeprefix("/jobs/")
    claim = told.taken(parts, test_id)
    told.tell(parts, claim, [("load_test", told.LOAD_TEST)])
    parts.ledger.succeed(test_id, claim.lease.token, "met")
    assert "Verdict: met p50 4 ms p99 13.4 ms" in text_of(client.get(place).text)
    assert f'load test <span class="pill met">met</span> <a href="/jobs/{test_id}">' in (
        client.get(f"/jobs/{ended}").text
    )
    actions = [one.action for one in parts.operations.audit(LOCAL, None, 10)]
    assert actions[:6] == ["load_test", "publish", "cancel", "retry", "cancel", "submit"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"repository": "other"}, "want one of: prod"),
        ({}, "repository: got ''"),
        ({"repository": "prod", "model": "../x"}, "model"),
    ],
)
def test_publishing_is_refused_with_a_reason_when_the_form_is_wrong(
    data: dict[str, str], message: str, client: TestClient, ended: str
) -> None:
    answer = client.post(f"/jobs/{ended}/publish", data=data, headers=OWN)
    assert answer.status_code == 409
    assert message in text_of(answer.text)


def test_an_action_that_the_state_forbids_is_a_page_that_says_why(
    client: TestClient, ended: str
) -> None:
    answer = client.post(f"/jobs/{ended}/cancel", headers=OWN)
    assert answer.status_code == 409
    assert "can't cancel a job that is succeeded" in text_of(answer.text)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param(OWN, 303, id="its own"),
        pytest.param({"Sec-Fetch-Site": "same-origin"}, 303, id="its own, by the browser's word"),
        pytest.param({"Origin": "https://localhost"}, 303, id="its own behind TLS"),
        pytest.param({}, 403, id="nobody's"),
        pytest.param({"Origin": "null"}, 403, id="a sandbox's"),
        pytest.param({"Origin": "http://evil.example.com"}, 403, id="another site's"),
        pytest.param({"Origin": "http://localhost:81"}, 403, id="another port's"),
        pytest.param({"Sec-Fetch-Site": "cross-site"}, 403, id="another site's, without a name"),
    ],
)
def test_a_form_is_taken_only_when_it_is_the_page_s_own(
    headers: dict[str, str],
    status: int,
    client: TestClient,
    parts: Parts,
    study_spec: dict[str, Any],
) -> None:
    job, _ = parts.operations.submit(LOCAL, study_spec)
    assert client.post(f"/jobs/{job.id}/cancel", headers=headers).status_code == status
    state = "cancelled" if status == 303 else "queued"
    assert parts.ledger.job(job.id).state == state


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"repository=" + b"x" * 20_000, 413), (b"a&" * 30, 422), (b"repository=\xff", 422)],
    ids=["too long", "too many fields", "not UTF-8"],
)
def test_a_form_is_refused_when_it_can_t_be_read(
    content: bytes, status: int, client: TestClient, ended: str
) -> None:
    assert client.post(f"/jobs/{ended}/publish", content=content, headers=OWN).status_code == status


# --- who may


def test_no_login_is_asked_for_when_the_service_has_no_keys(client: TestClient) -> None:
    assert client.get("/").status_code == 200
    assert client.get("/login").headers["location"] == "/"
    assert "Log out" not in client.get("/").text


def test_a_stranger_is_sent_to_the_login_and_back(stranger: TestClient, guarded: Parts) -> None:
    answer = stranger.get("/jobs/0123456789abcdef")
    assert (answer.status_code, answer.headers["location"]) == (
        303, "/login?next=/jobs/0123456789abcdef"
    )  # fmt: skip
    form = stranger.get(answer.headers["location"]).text
    assert 'name="next" value="/jobs/0123456789abcdef"' in form
    key = a_key(guarded, "ann", Scope.READ)
    data = {"key": key, "next": "/jobs/0123456789abcdef"}
    answer = stranger.post("/login", data=data, headers=OWN)
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs/0123456789abcdef")
    assert stranger.get("/jobs/0123456789abcdef").status_code == 404
    page = stranger.get("/").text
    assert "key:ann" in page
    assert "Log out" in page


def test_a_session_s_cookie_is_for_the_browser_alone(stranger: TestClient, guarded: Parts) -> None:
    key = a_key(guarded, "ann", Scope.READ)
    cookie = log_in(stranger, key).headers["set-cookie"].lower()
    assert f"max-age={VALID_S}" in cookie
    assert {"httponly", "samesite=strict", "path=/"} <= {p.strip() for p in cookie.split(";")}
    assert "secure" not in cookie
    assert key.lower() not in cookie
    assert key.split("_", 2)[2].lower() not in cookie
    forwarded = {"Origin": "https://localhost", "X-Forwarded-Proto": "https"}
    answer = stranger.post("/login", data={"key": key}, headers=forwarded)
    assert "secure" in answer.headers["set-cookie"].lower()


def test_a_session_is_kept_as_a_hash(stranger: TestClient, guarded: Parts) -> None:
    log_in(stranger, a_key(guarded, "ann", Scope.READ))
    with guarded.database.reading() as connection:
        rows = str(connection.exec_driver_sql("SELECT * FROM sessions").all())
    assert stranger.cookies[COOKIE] not in rows


@pytest.mark.parametrize("key", ["", "x", "ts_000000000000_" + "x" * 43, "ts_" + "é" * 9], ids=str)
def test_a_wrong_key_is_told_so_and_gets_no_cookie(key: str, stranger: TestClient) -> None:
    answer = log_in(stranger, key)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert "API key" in text_of(answer.text)


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example.com/", "//evil.example.com", "/\\evil.example.com",
        "javascript:alert(1)", "/\r\nSet-Cookie: a=b", "jobs",
    ],
)  # fmt: skip
def test_a_login_leads_nowhere_else(target: str, stranger: TestClient, guarded: Parts) -> None:
    key = a_key(guarded, "ann", Scope.READ)
    answer = stranger.post("/login", data={"key": key, "next": target}, headers=OWN)
    assert answer.headers["location"] == "/"
    assert 'name="next" value="/"' in stranger.get("/login", params={"next": target}).text


def test_a_login_from_another_site_is_refused(stranger: TestClient, guarded: Parts) -> None:
    key = a_key(guarded, "ann", Scope.READ)
    evil = {"Origin": "http://evil.example.com"}
    assert stranger.post("/login", data={"key": key}, headers=evil).status_code == 403
    assert stranger.post("/login", data={"key": key}).status_code == 403


def test_a_session_ends_when_it_is_logged_out(stranger: TestClient, guarded: Parts) -> None:
    log_in(stranger, a_key(guarded, "ann", Scope.READ))
    held = stranger.cookies[COOKIE]
    assert stranger.post("/logout", headers=OWN).headers["location"] == "/login"
    stranger.cookies.set(COOKIE, held)
    assert stranger.get("/").headers["location"].startswith("/login")


def test_a_session_ends_when_its_key_is_revoked(stranger: TestClient, guarded: Parts) -> None:
    log_in(stranger, a_key(guarded, "ann", Scope.READ))
    keys = guarded.authenticator.keys
    assert keys is not None
    assert stranger.get("/").status_code == 200
    keys.revoke(keys.all()[0].id)
    assert stranger.get("/").headers["location"].startswith("/login")


def test_the_oldest_session_gives_way_when_a_key_has_too_many(guarded: Parts) -> None:
    assert guarded.sessions is not None
    key = a_key(guarded, "ann", Scope.READ)
    tokens = [guarded.sessions.begin(key) for _ in range(MAX_PER_KEY + 1)]
    assert guarded.sessions.caller(tokens[-1]) == Caller("key:ann", frozenset({Scope.READ}))
    assert guarded.sessions.caller(tokens[1]).subject == "key:ann"
    with pytest.raises(Exception, match="the session is over"):
        guarded.sessions.caller(tokens[0])


def test_a_session_reads_the_interface_but_changes_nothing_by_it(
    stranger: TestClient, guarded: Parts
) -> None:
    job = a_foreign_job(guarded)
    log_in(stranger, a_key(guarded, "eve", Scope.ADMIN))
    assert stranger.get(f"/v1/jobs/{job}").status_code == 200
    assert stranger.get("/v1/me").json()["subject"] == "key:eve"
    assert stranger.post(f"/v1/jobs/{job}/cancel", headers=OWN).status_code == 401
    assert stranger.delete(f"/v1/jobs/{job}", headers=OWN).status_code == 401


@pytest.mark.parametrize(
    ("scopes", "pressed"),
    [
        pytest.param((Scope.READ,), set(), id="read"),
        pytest.param((Scope.READ, Scope.SUBMIT), set(), id="submit, another's job"),
        pytest.param((Scope.READ, Scope.PUBLISH), {"publish", "load-test"}, id="publish"),
        pytest.param((Scope.ADMIN,), {"publish", "load-test", "retry"}, id="admin"),
    ],
)
def test_buttons_are_there_only_when_one_may_press_them(
    scopes: tuple[Scope, ...], pressed: set[str], stranger: TestClient, guarded: Parts
) -> None:
    job = a_foreign_job(guarded)
    told.succeed(guarded, told.taken(guarded, job), met())
    guarded.operations.publish(LOCAL, job, "prod")
    log_in(stranger, a_key(guarded, "ann", *scopes))
    page = stranger.get(f"/jobs/{job}").text
    actions = set(re.findall(r'<form method="post" action="/[^"]*/([a-z-]+)"', page))
    assert actions - {"logout"} == pressed
    forms = {"publish": f"/jobs/{job}/publish", "retry": f"/jobs/{job}/retry"}
    for name, url in forms.items():
        answer = stranger.post(url, data={"repository": "prod"}, headers=OWN)
        assert answer.status_code == (303 if name in pressed else 403), name


def test_nothing_is_shown_to_a_key_that_may_not_read(stranger: TestClient, guarded: Parts) -> None:
    log_in(stranger, a_key(guarded, "bob", Scope.PUBLISH))
    assert stranger.get("/").status_code == 403


def test_keys_still_open_the_page_for_programs(stranger: TestClient, guarded: Parts) -> None:
    key = a_key(guarded, "ann", Scope.READ)
    assert stranger.get("/", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_the_page_says_what_to_do_when_only_a_provider_s_tokens_are_taken(
    guarded: Parts, settings: Settings
) -> None:
    from optimizer.service.auth import Authenticator, Oidc

    oidc = Oidc("https://id.example.com", "trimserve", "https://id.example.com/jwks")
    parts = replace(guarded, authenticator=Authenticator(None, oidc), sessions=None)
    with TestClient(make_service(parts, settings), base_url=URL) as client:
        page = client.get("/")
    assert page.url.path == "/login"
    assert "--keys" in page.text
    assert "<form" not in page.text


def a_foreign_job(parts: Parts) -> str:
    """Of the caller LOCAL, which no key is."""
    ops = parts.operations
    spec = a_spec(uploaded(ops, "m.onnx"), uploaded(ops, "d.npz"), slo=met().slo.to_dict())
    return ops.submit(LOCAL, spec)[0].id


def test_keys_of_the_database_are_what_sessions_name(guarded: Parts) -> None:
    """A session of a key that was never made can't be."""
    keys = guarded.authenticator.keys
    assert isinstance(keys, Keys)
    with pytest.raises(Exception, match="isn't known"):
        keys.caller_of_id("000000000000")
