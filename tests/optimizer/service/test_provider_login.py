"""Logging in to the page at an OpenID provider, which is a small one on loopback."""

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi.testclient import TestClient
from jwt.algorithms import RSAAlgorithm

from optimizer.service.app import Parts, Settings, make_parts, make_service
from optimizer.service.auth import Caller, Oidc, Scope
from optimizer.service.provider_login import COOKIE as LOGIN_COOKIE
from optimizer.service.provider_login import LoginClient
from optimizer.service.sessions import COOKIE

CLIENT, SECRET, AUDIENCE, URL = "the-page", "cl1ent-s3cr3t", "trimserve", "https://trim.example.com"
OWN = {"Origin": URL}


@cache
def a_key() -> rsa.RSAPrivateKey:
    """Making one takes a while."""
    return rsa.generate_private_key(65537, 2048)


@dataclass
class Provider:
    """Knows one person, who always agrees. `change` changes what its tokens say: it is given the
    token's name and claims."""

    issuer: str = ""
    key: rsa.RSAPrivateKey = field(default_factory=lambda: a_key())
    site: str = URL
    change: Callable[[str, dict[str, Any]], None] = lambda _name, _claims: None
    metadata: dict[str, Any] = field(default_factory=dict)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[dict[str, str]] = field(default_factory=list)
    is_down: bool = False

    def agree(self, url: str) -> str:
        """Where it sends the browser that was sent to it."""
        asked = dict(parse_qsl(urlsplit(url).query))
        self.asked.append(asked)
        assert url.startswith(f"{self.issuer}/authorize?")
        assert asked["redirect_uri"] == f"{self.site}/login/provider"
        assert (asked["response_type"], asked["code_challenge_method"]) == ("code", "S256")
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        answer = {"code": code, "state": asked["state"], "iss": self.issuer}
        return f"{self.site}/login/provider?{urlencode(answer)}"

    def tokens(self, form: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        asked = self.codes.pop(form.get("code", ""), None)
        verifier = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(verifier).rstrip(b"=").decode()
        basic = "Basic " + base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if authorization != basic:
            return 401, {"error": "invalid_client"}
        if asked is None or asked["code_challenge"] != challenge:
            return 400, {"error": "invalid_grant"}
        return 200, {
            "token_type": "Bearer", "expires_in": 300,
            "id_token": self._token("id_token", aud=CLIENT, nonce=asked["nonce"]),
            "access_token": self._token(
                "access_token", aud=AUDIENCE, scope="trimserve:read trimserve:publish"
            ),
        }  # fmt: skip

    def _token(self, name: str, **more: str) -> str:
        now_s = int(time.time())
        claims = {"iss": self.issuer, "sub": "ann", "iat": now_s, "exp": now_s + 300, **more}
        self.change(name, claims)
        return jwt.encode(claims, self.key, "RS256", {"kid": "k"})

    def documents(self) -> dict[str, dict[str, Any]]:
        public = RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {
            "/.well-known/openid-configuration": {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
            } | self.metadata,
            "/jwks": {"keys": [{**public, "kid": "k", "use": "sig"}]},
        }  # fmt: skip


@pytest.fixture
def provider() -> Iterator[Provider]:
    with a_provider() as made:
        yield made


@contextmanager
def a_provider(host: str = "127.0.0.1") -> Iterator[Provider]:
    made = Provider()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/authorize?"):
                self.send_response(303)
                self.send_header("Location", made.agree(f"{made.issuer}{self.path}"))
                self.end_headers()
                return
            self._say(*((503, {}) if made.is_down else (200, made.documents()[self.path])))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            form = {name: values[0] for name, values in parse_qs(body).items()}
            self._say(*made.tokens(form, self.headers.get("Authorization", "")))

        def _say(self, status: int, document: dict[str, Any]) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Not to standard error."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        made.issuer = f"http://{host}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def guarded(provider: Provider, settings: Settings) -> Iterator[Parts]:
    oidc = Oidc(provider.issuer, AUDIENCE, f"{provider.issuer}/jwks")
    made = make_parts(replace(settings, oidc=oidc, login=LoginClient(CLIENT, SECRET, URL)))
    yield made
    made.database.close()


@pytest.fixture
def browser(guarded: Parts, settings: Settings) -> Iterator[TestClient]:
    with TestClient(make_service(guarded, settings), URL, follow_redirects=False) as client:
        yield client


def log_in(browser: TestClient, provider: Provider, target: str = "/") -> Any:
    sent = browser.get("/login/provider/begin", params={"next": target})
    assert sent.status_code == 303, sent.text
    return browser.get(provider.agree(sent.headers["location"]))


def test_who_logs_in_at_the_provider_may_what_its_token_says(
    browser: TestClient, provider: Provider, guarded: Parts
) -> None:
    page = browser.get("/login?next=/jobs/0123456789abcdef")
    assert 'href="/login/provider/begin?next=/jobs/0123456789abcdef"' in page.text
    assert "API key" not in page.text
    answer = log_in(browser, provider, "/jobs/0123456789abcdef")
    assert answer.status_code == 200
    # A redirect would be the provider's, to which a strict cookie isn't shown.
    assert '<meta http-equiv="refresh" content="0; url=/jobs/0123456789abcdef">' in answer.text
    cookies = "; ".join(answer.headers.get_list("set-cookie")).lower()
    for part in (f"{COOKIE}=", "httponly", "samesite=strict", "secure", "max-age=3600"):
        assert part in cookies
    assert guarded.sessions is not None
    who = guarded.sessions.caller(browser.cookies[COOKIE])
    assert who == Caller(f"ann@{provider.issuer}", frozenset({Scope.READ, Scope.PUBLISH}))
    assert browser.get("/v1/me").json()["subject"] == f"ann@{provider.issuer}"
    home = browser.get("/")
    assert "Log out" in home.text
    assert browser.post("/logout", headers=OWN).headers["location"] == "/login"
    assert browser.get("/").headers["location"].startswith("/login")
    asked = provider.asked[0]
    assert "openid trimserve:read trimserve:submit" in asked["scope"]
    assert len(asked["state"]) >= 20
    assert len(asked["nonce"]) >= 20


def test_a_login_is_good_once_and_in_the_browser_that_began_it(
    browser: TestClient, provider: Provider, guarded: Parts, settings: Settings
) -> None:
    sent = browser.get("/login/provider/begin")
    back = provider.agree(sent.headers["location"])
    with TestClient(make_service(guarded, settings), URL, follow_redirects=False) as other:
        assert "begun here" in other.get(back).text
        assert COOKIE not in other.cookies
    assert browser.get(back).status_code == 200
    browser.cookies.clear()
    browser.cookies.set(LOGIN_COOKIE, "stolen", domain="trim.example.com")
    assert browser.get(back).status_code == 401
    with guarded.database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM logins").scalar_one() == 0


def test_another_state_ends_the_login(browser: TestClient, provider: Provider) -> None:
    back = provider.agree(browser.get("/login/provider/begin").headers["location"])
    state = dict(parse_qsl(urlsplit(back).query))["state"]
    assert browser.get(back.replace(state, "x" * len(state))).status_code == 401
    assert browser.get(back).status_code == 401  # it was good once
    assert COOKIE not in browser.cookies


@pytest.mark.parametrize(
    ("token", "claims", "said"),
    [
        pytest.param("id_token", {"nonce": "another"}, "isn&#39;t of this login", id="nonce"),
        pytest.param("id_token", {"aud": "another"}, "Audience", id="another client's"),
        pytest.param("id_token", {"azp": "another"}, "of another client", id="azp"),
        pytest.param("id_token", {"iss": "https://evil.example.com"}, "issuer", id="issuer"),
        pytest.param("id_token", {"exp": 1_000_000_000}, "expired", id="expired"),
        pytest.param("access_token", {"aud": "another"}, "Audience", id="for another service"),
        pytest.param("access_token", {"sub": "bob"}, "two people", id="of somebody else"),
    ],
)
def test_tokens_that_arent_right_open_nothing(
    browser: TestClient, provider: Provider, token: str, claims: dict[str, Any], said: str
) -> None:
    def change(name: str, held: dict[str, Any]) -> None:
        if name == token:
            held |= claims

    provider.change = change
    answer = log_in(browser, provider)
    assert answer.status_code == 401
    assert said in answer.text
    assert COOKIE not in browser.cookies
    assert SECRET not in answer.text


def test_what_the_provider_refuses_is_said(browser: TestClient, provider: Provider) -> None:
    back = provider.agree(browser.get("/login/provider/begin").headers["location"])
    state = dict(parse_qsl(urlsplit(back).query))["state"]
    answer = browser.get(f"/login/provider?error=access_denied&state={state}")
    assert answer.status_code == 401
    assert "access_denied" in answer.text
    back = provider.agree(browser.get("/login/provider/begin").headers["location"])
    assert "another provider" in browser.get(back.replace("iss=", "iss=https://evil")).text
    provider.codes.clear()
    back = provider.agree(browser.get("/login/provider/begin").headers["location"])
    provider.codes.clear()
    assert "invalid_grant" in browser.get(back).text


def test_a_provider_that_doesnt_answer_is_said(browser: TestClient, provider: Provider) -> None:
    provider.is_down = True
    answer = browser.get("/login/provider/begin")
    assert answer.status_code == 502
    assert "doesn&#39;t answer as it should" in answer.text
    provider.is_down = False
    provider.metadata = {"token_endpoint": "http://evil.example.com/token"}
    assert "want an https address" in browser.get("/login/provider/begin").text
    provider.metadata = {"issuer": "https://evil.example.com"}
    assert "want a document with issuer" in browser.get("/login/provider/begin").text
    provider.metadata = {}
    assert log_in(browser, provider).status_code == 200


def test_a_login_leads_nowhere_else(browser: TestClient, provider: Provider) -> None:
    assert 'content="0; url=/"' in log_in(browser, provider, "https://evil.example.com").text


def test_without_a_client_of_the_provider_there_is_no_way_to_it(
    parts: Parts, settings: Settings
) -> None:
    with TestClient(make_service(parts, settings), URL, follow_redirects=False) as client:
        for path in ("/login/provider/begin", "/login/provider?code=x&state=y"):
            assert client.get(path).headers["location"] == "/login"
