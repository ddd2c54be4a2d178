"""Bearer tokens of an OpenID provider, against a JWKS that a server on loopback has."""

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi.testclient import TestClient
from jwt.algorithms import RSAAlgorithm

from optimizer.service.app import Parts, Settings, make_service
from optimizer.service.auth import Authenticator, Oidc, Scope, Unauthenticated

ISSUER, AUDIENCE = "https://id.example.com", "trimserve"


@dataclass
class Provider:
    """Keys by their ids, and where they are published."""

    url: str
    keys: dict[str, rsa.RSAPrivateKey]
    n_asked: int = 0

    def document(self) -> bytes:
        published = [
            {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": name, "use": "sig"}
            for name, key in self.keys.items()
        ]
        return json.dumps({"keys": published}).encode()

    def token(self, kid: str = "first", key: Any = None, **claims: Any) -> str:
        """A good one, but for the claims that are given."""
        now_s = int(time.time())
        good = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "iat": now_s, "exp": now_s + 300,
            "scope": "openid trimserve:read trimserve:submit",
        }  # fmt: skip
        content = {name: value for name, value in (good | claims).items() if value is not None}
        signing = self.keys[kid] if key is None else key
        return jwt.encode(content, signing, algorithm="RS256", headers={"kid": kid})

    @property
    def authenticator(self) -> Authenticator:
        return Authenticator(None, Oidc(ISSUER, AUDIENCE, self.url))


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider("", {"first": new_key()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.n_asked += 1
            content = made.document()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Not to standard error."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}/jwks"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def test_token_of_the_provider_tells_who_calls_and_what_is_allowed(provider: Provider) -> None:
    caller = provider.authenticator.of_token(provider.token())
    assert caller.subject == f"ann@{ISSUER}"
    assert caller.scopes == {Scope.READ, Scope.SUBMIT}
    listed = provider.token(scope=["trimserve:admin", "read", 7])
    assert provider.authenticator.of_token(listed).scopes == {Scope.ADMIN}
    assert provider.authenticator.of_token(provider.token(scope=None)).scopes == frozenset()


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        pytest.param({"aud": "another"}, "Audience", id="another audience"),
        pytest.param({"iss": "https://evil.example.com"}, "issuer", id="another issuer"),
        pytest.param({"exp": 1_000_000_000}, "expired", id="expired"),
        pytest.param({"exp": None}, "exp", id="never expires"),
        pytest.param({"sub": None}, "sub", id="of nobody"),
        pytest.param({"iat": 4_000_000_000}, "not yet valid", id="of the future"),
    ],
)
def test_token_is_refused_with_the_reason_when_a_claim_is_wrong(
    provider: Provider, claims: dict[str, Any], said: str
) -> None:
    with pytest.raises(Unauthenticated, match=said):
        provider.authenticator.of_token(provider.token(**claims))


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param(lambda p: p.token(key=new_key()), id="signed by somebody else"),
        pytest.param(lambda p: p.token(kid="first")[:-8] + "AAAAAAAA", id="changed"),
        pytest.param(lambda p: unsigned(p), id="not signed"),
        pytest.param(lambda p: by_secret(p), id="signed with the public key as a secret"),
        pytest.param(lambda _: "no.token.atall", id="no token"),
    ],
)
def test_token_is_refused_when_it_is_forged(
    provider: Provider, forged: Callable[[Provider], str]
) -> None:
    with pytest.raises(Unauthenticated, match="isn't good"):
        provider.authenticator.of_token(forged(provider))


def unsigned(provider: Provider) -> str:
    claims = jwt.decode(provider.token(), options={"verify_signature": False})
    return jwt.encode(claims, None, algorithm="none", headers={"kid": "first"})


def by_secret(provider: Provider) -> str:
    """Whoever takes any algorithm verifies an HMAC whose secret is the public key."""
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"first","typ":"JWT"}').rstrip(b"=")
    signed = header + b"." + provider.token().split(".")[1].encode()
    secret = (
        provider.keys["first"]
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    digest = hmac.new(secret, signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(digest).rstrip(b"=")).decode()


def test_provider_is_asked_once_when_tokens_name_keys_that_it_does_not_have(
    provider: Provider,
) -> None:
    authenticator = provider.authenticator
    authenticator.of_token(provider.token())
    for number in range(5):
        with pytest.raises(Unauthenticated, match="signing key"):
            authenticator.of_token(provider.token(f"unknown-{number}", key=new_key()))
    authenticator.of_token(provider.token())
    assert provider.n_asked == 1


def test_caller_is_refused_when_the_provider_does_not_answer(provider: Provider) -> None:
    token = provider.token()
    gone = Authenticator(None, Oidc(ISSUER, AUDIENCE, "http://127.0.0.1:1/jwks"))
    with pytest.raises(Unauthenticated, match="isn't good"):
        gone.of_token(token)


def test_rest_asks_for_a_token_and_keeps_to_its_scopes(
    provider: Provider, parts: Parts, settings: Settings, spec: dict[str, Any]
) -> None:
    guarded = replace(parts, authenticator=provider.authenticator)
    with TestClient(make_service(guarded, settings), base_url="http://localhost") as client:
        assert client.get("/v1/jobs").status_code == 401
        reader = {"Authorization": f"Bearer {provider.token(scope='trimserve:read')}"}
        assert client.get("/v1/jobs", headers=reader).status_code == 200
        assert client.post("/v1/jobs", json={"spec": spec}, headers=reader).status_code == 403
        writer = {"Authorization": f"Bearer {provider.token()}"}
        assert client.get("/v1/me", headers=writer).json()["scopes"] == ["read", "submit"]
