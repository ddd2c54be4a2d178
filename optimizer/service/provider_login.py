"""Logging in to the page at the company's OpenID provider: the authorization code flow with PKCE.

(OpenID Connect Core, section 3.1; RFC 7636; RFC 9700.) State, nonce and verifier of a login that
has begun are in the database, under the hash of what the browser's own cookie holds, and are good
once. What the session may do, the provider's access token says, as it does for programs: it must be
one that the service takes. It knows no HTTP server; the flow is Authlib's, tokens are checked by
`optimizer.service.auth`.
"""

import hmac
import ipaddress
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from requests import RequestException
from sqlalchemy import delete, func, insert, select

from optimizer.service import schema
from optimizer.service.auth import (
    Authenticator,
    Caller,
    Oidc,
    ProviderUnavailable,
    Scope,
    Unauthenticated,
)
from optimizer.service.database import Database
from optimizer.service.sessions import hash_of

PATH = "/login/provider"
COOKIE = "trimserve_login"
VALID_S = 600
"""From the way to the provider to the way back."""
MAX_UNDER_WAY = 10_000
_TIMEOUT_S = 10
_MAX_METADATA_BYTES = 1_000_000
_ENDPOINTS = ("authorization_endpoint", "token_endpoint")


@dataclass(frozen=True)
class LoginClient:
    """How the provider knows this service: `secret` None is a public client. `public_url` is where
    browsers reach the service; the address that they come back to is PATH below it."""

    client_id: str
    secret: str | None
    public_url: str

    @property
    def redirect_uri(self) -> str:
        return self.public_url.rstrip("/") + PATH


class ProviderLogin:
    """Its calls block: they belong in worker threads."""

    def __init__(
        self, database: Database, authenticator: Authenticator, oidc: Oidc, client: LoginClient
    ) -> None:
        self._database = database
        self._authenticator = authenticator
        self._oidc = oidc
        self._client = client
        self._metadata: Mapping[str, Any] | None = None

    def begin(self, target: str) -> tuple[str, str]:
        """Where to send the browser, and the value of its cookie; afterwards it goes to `target`.
        Raises ProviderUnavailable."""
        endpoint = self._provider()["authorization_endpoint"]
        cookie, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        with self._session() as session:
            url, state = session.create_authorization_url(
                endpoint, code_verifier=verifier, nonce=nonce
            )
        table = schema.logins
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            connection.execute(delete(table).where(table.c.expires_s <= now_s))
            n_under_way = connection.execute(select(func.count()).select_from(table)).scalar_one()
            if n_under_way >= MAX_UNDER_WAY:
                raise ProviderUnavailable(f"{n_under_way} logins are under way: try again later")
            connection.execute(
                insert(table).values(
                    hash=hash_of(cookie), state=state, nonce=nonce, verifier=verifier,
                    target=target, expires_s=now_s + VALID_S,
                )
            )  # fmt: skip
        return url, cookie

    def finish(self, cookie: str, answer: Mapping[str, str]) -> tuple[Caller, str]:
        """Who has logged in by what the provider sent the browser back with, and where it wanted
        to go. Raises Unauthenticated, ProviderUnavailable."""
        begun = self._taken(cookie)
        if begun is None or not hmac.compare_digest(begun.state, answer.get("state", "")):
            raise Unauthenticated("this login wasn't begun here, or took too long: begin again")
        if answer.get("iss", self._oidc.issuer) != self._oidc.issuer:  # RFC 9207
            raise Unauthenticated("the answer is of another provider")
        if "error" in answer:
            raise Unauthenticated(f"the provider refused: {answer['error'][:100]!r}")
        tokens = self._tokens(answer.get("code", ""), begun.verifier)
        return self._caller(tokens, begun.nonce), begun.target

    def _taken(self, cookie: str) -> Any:
        """What was kept of the login, which is good once."""
        table = schema.logins
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            mine = table.c.hash == hash_of(cookie)
            row = connection.execute(select(table).where(mine, table.c.expires_s > now_s)).first()
            connection.execute(delete(table).where(mine))
        return row

    def _tokens(self, code: str, verifier: str) -> Mapping[str, Any]:
        endpoint = self._provider()["token_endpoint"]
        try:
            with self._session() as session:
                tokens: Mapping[str, Any] = session.fetch_token(
                    endpoint, grant_type="authorization_code", code=code, code_verifier=verifier,
                    timeout=_TIMEOUT_S, allow_redirects=False,
                )  # fmt: skip
        except OAuthError as error:
            raise Unauthenticated(f"the provider refused the code: {error.error!r}") from error
        except (RequestException, ValueError) as error:
            raise ProviderUnavailable(_said(error, "token_endpoint")) from error
        return tokens

    def _caller(self, tokens: Mapping[str, Any], nonce: str) -> Caller:
        said = self._authenticator.claims(str(tokens.get("id_token", "")), self._client.client_id)
        if not hmac.compare_digest(str(said.get("nonce", "")), nonce):
            raise Unauthenticated("the provider's token isn't of this login")
        if said.get("azp", self._client.client_id) != self._client.client_id:
            raise Unauthenticated("the provider's token is of another client")
        caller = self._authenticator.of_token(str(tokens.get("access_token", "")))
        if caller.subject != f"{said['sub']}@{self._oidc.issuer}":
            raise Unauthenticated("the provider's two tokens are of two people")
        return caller

    def _session(self) -> Any:
        client = self._client
        wanted = [f"{self._oidc.scope_prefix}{scope}" for scope in Scope]
        return OAuth2Session(
            client.client_id,
            client.secret,
            token_endpoint_auth_method="none" if client.secret is None else "client_secret_basic",
            redirect_uri=client.redirect_uri,
            scope=" ".join(["openid", *wanted]),
            code_challenge_method="S256",
        )

    def _provider(self) -> Mapping[str, Any]:
        """Its metadata (OpenID Connect Discovery), asked for once."""
        if self._metadata is None:
            self._metadata = self._discovered()
        return self._metadata

    def _discovered(self) -> Mapping[str, Any]:
        url = f"{self._oidc.issuer.rstrip('/')}/.well-known/openid-configuration"
        try:
            with (
                self._session() as session,
                session.request(
                    "GET", url, withhold_token=True, timeout=_TIMEOUT_S, stream=True,
                    allow_redirects=False,
                ) as answer,
            ):  # fmt: skip
                answer.raise_for_status()
                raw = answer.raw.read(_MAX_METADATA_BYTES + 1, decode_content=True)
            found = json.loads(raw) if len(raw) <= _MAX_METADATA_BYTES else None
        except (RequestException, ValueError) as error:
            raise ProviderUnavailable(_said(error, url)) from error
        if not isinstance(found, dict) or found.get("issuer") != self._oidc.issuer:
            raise ProviderUnavailable(f"{url}: want a document with issuer {self._oidc.issuer!r}")
        for name in _ENDPOINTS:
            if not is_safe(found.get(name)):
                raise ProviderUnavailable(f"{url}: {name}: want an https address")
        return found


def is_safe(url: object) -> bool:
    """Whether it is an address by https, or of this machine."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        host = parts.hostname or ""
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    return (parts.scheme == "https" and bool(host)) or (parts.scheme == "http" and is_here)


def _said(error: Exception, where: str) -> str:
    """Without the address that a library puts in its message: it may hold a code."""
    return f"the OpenID provider doesn't answer as it should ({where}): {type(error).__name__}"
