"""Who calls, and what they may do: API keys of our own, or tokens of the company's OpenID provider.

An API key is `ts_ID_SECRET`. The database holds the SHA-256 of the secret, which has 256 random
bits, so a slow hash would protect nothing. Tokens (RFC 9068, OpenID Connect Core) are checked by
PyJWT against the provider's JWKS: signature, issuer, audience, times.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import jwt
from sqlalchemy import insert, select, update

from optimizer.service import schema
from optimizer.service.database import Database

_KEY = re.compile(r"ts_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
"""Asymmetric ones only: with HS256 whoever knows the public key could sign."""
_LEEWAY_S = 30
_JWKS_TIMEOUT_S = 5
_JWKS_KEPT_S = 300


class Scope(StrEnum):
    READ = "read"
    """See jobs, events, logs, results."""
    SUBMIT = "submit"
    """Upload, submit; cancel, retry and delete one's own jobs."""
    PUBLISH = "publish"
    """Publish to serving repositories, and load-test what is there."""
    ADMIN = "admin"
    """All of that with everybody's jobs, and the audit."""


class Unauthenticated(Exception):
    """No credentials, or none that are good; the message never shows them."""


class ProviderUnavailable(Exception):
    """The provider doesn't answer, or not as it should; the message shows no secret."""


class Forbidden(Exception):
    def __init__(self, wanted: str) -> None:
        super().__init__(f"you may not: {wanted}")


@dataclass(frozen=True)
class Caller:
    """`subject` is `key:NAME` or the token's subject with its issuer."""

    subject: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def check(self, scope: Scope) -> None:
        """Raises Forbidden."""
        if not self.may(scope):
            held = ", ".join(sorted(self.scopes)) or "none"
            raise Forbidden(f"it needs the scope {scope}, you have {held}")

    def check_own(self, owner: str) -> None:
        """Raises Forbidden where it is another's, unless the caller is an admin."""
        if owner != self.subject and Scope.ADMIN not in self.scopes:
            raise Forbidden("it belongs to somebody else")


LOCAL = Caller("local", frozenset(Scope))
"""Whoever reaches the loopback, where nothing else is configured."""


@dataclass(frozen=True)
class Oidc:
    """The provider. `scope_claim` holds a string of scopes or a list; those that begin with
    `scope_prefix` are ours, for example `trimserve:submit`."""

    issuer: str
    audience: str
    jwks_url: str
    scope_claim: str = "scope"
    scope_prefix: str = "trimserve:"


@dataclass(frozen=True)
class Key:
    """An API key as it may be shown."""

    id: str
    name: str
    scopes: frozenset[Scope]
    created_s: float
    expires_s: float | None
    revoked_s: float | None


class Keys:
    """The API keys in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def make(
        self, name: str, scopes: Iterable[Scope], valid_s: float | None = None
    ) -> tuple[Key, str]:
        """A new key and its text, which is shown this once."""
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            expires_s = None if valid_s is None else now_s + valid_s
            connection.execute(
                insert(schema.keys).values(
                    id=key_id,
                    name=name,
                    hash=_hash(secret),
                    scopes=" ".join(sorted(scopes)),
                    created_s=now_s,
                    expires_s=expires_s,
                )
            )
        key = Key(key_id, name, frozenset(scopes), now_s, expires_s, None)
        return key, f"ts_{key_id}_{secret}"

    def caller(self, text: str) -> Caller:
        """Whose key it is. Raises Unauthenticated."""
        return self.caller_of_id(self._known_id(text))

    def caller_of_id(self, key_id: str) -> Caller:
        """Whose key it is, for who has shown the key before. Raises Unauthenticated."""
        with self._database.reading() as connection:
            now_s = self._database.now_s(connection)
            row = connection.execute(select(schema.keys).where(schema.keys.c.id == key_id)).first()
        if row is None:
            raise Unauthenticated("this API key isn't known")
        if row.revoked_s is not None:
            raise Unauthenticated("this API key was revoked")
        if row.expires_s is not None and row.expires_s <= now_s:
            raise Unauthenticated("this API key has expired")
        return Caller(f"key:{row.name}", frozenset(Scope(one) for one in row.scopes.split()))

    def checked_id(self, text: str) -> str:
        """The id of a key that is good. Raises Unauthenticated."""
        key_id = self._known_id(text)
        self.caller_of_id(key_id)
        return key_id

    def _known_id(self, text: str) -> str:
        match = _KEY.fullmatch(text)
        if match is None:
            raise Unauthenticated("this is no API key")
        with self._database.reading() as connection:
            held = connection.execute(
                select(schema.keys.c.hash).where(schema.keys.c.id == match[1])
            ).scalar_one_or_none()
        known = held if held is not None else _hash("")
        if not hmac.compare_digest(known, _hash(match[2])) or held is None:
            raise Unauthenticated("this API key isn't known")
        return match[1]

    def all(self) -> list[Key]:
        with self._database.reading() as connection:
            rows = connection.execute(select(schema.keys).order_by(schema.keys.c.created_s)).all()
        return [
            Key(
                row.id, row.name, frozenset(Scope(one) for one in row.scopes.split()),
                row.created_s, row.expires_s, row.revoked_s,
            )
            for row in rows
        ]  # fmt: skip

    def revoke(self, key_id: str) -> bool:
        """Whether there was one to revoke."""
        with self._database.writing() as connection:
            done = connection.execute(
                update(schema.keys)
                .where(schema.keys.c.id == key_id, schema.keys.c.revoked_s.is_(None))
                .values(revoked_s=self._database.now_s(connection))
            )
        return done.rowcount == 1


@dataclass
class Authenticator:
    """Tells from a request's bearer token who calls. With neither keys nor a provider everybody is
    LOCAL, which the command allows on loopback only."""

    keys: Keys | None = None
    oidc: Oidc | None = None
    _jwks: Any = field(default=None, repr=False)

    @property
    def is_open(self) -> bool:
        return self.keys is None and self.oidc is None

    def caller(self, authorization: str | None) -> Caller:
        """`authorization` is the header's value. Raises Unauthenticated. May ask the provider for
        its keys, so it blocks."""
        if self.is_open:
            return LOCAL
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("want the header 'Authorization: Bearer KEY'")
        return self.of_token(token.strip())

    def of_token(self, token: str) -> Caller:
        """Raises Unauthenticated."""
        if token.startswith("ts_") and self.keys is not None:
            return self.keys.caller(token)
        if self.oidc is None:
            raise Unauthenticated("this is no API key")
        return self._of_provider(token, self.oidc)

    def _of_provider(self, token: str, oidc: Oidc) -> Caller:
        claims = self.claims(token, oidc.audience)
        return Caller(f"{claims['sub']}@{oidc.issuer}", _scopes(claims, oidc))

    def claims(self, token: str, audience: str) -> Mapping[str, Any]:
        """What a token of the provider for `audience` says. Raises Unauthenticated."""
        oidc = self.oidc
        if oidc is None:
            raise Unauthenticated("this service has no OpenID provider")
        if self._jwks is None:
            self._jwks = jwt.PyJWKClient(
                oidc.jwks_url, cache_keys=True, lifespan=_JWKS_KEPT_S, timeout=_JWKS_TIMEOUT_S
            )
        try:
            signing = self._jwks.get_signing_key_from_jwt(token)
            claims: Mapping[str, Any] = jwt.decode(
                token,
                signing.key,
                algorithms=list(_ALGORITHMS),
                audience=audience,
                issuer=oidc.issuer,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "iat", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token isn't good: {error}") from error
        return claims


def _scopes(claims: Mapping[str, Any], oidc: Oidc) -> frozenset[Scope]:
    held = claims.get(oidc.scope_claim, ())
    names = held.split() if isinstance(held, str) else [one for one in held if isinstance(one, str)]
    plain = {name.removeprefix(oidc.scope_prefix) for name in names
             if name.startswith(oidc.scope_prefix)}  # fmt: skip
    return frozenset(scope for scope in Scope if scope in plain)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
