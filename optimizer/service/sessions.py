"""Sessions of browsers that have logged in, with an API key or at the OpenID provider.

A browser's cookie holds 256 random bits, the database their SHA-256 and the key's id, or who it is
by the provider. So a session ends when its time is over, when it is logged out, and when its key is
revoked or expires; what the provider takes back counts when the session's shorter time is over.
"""

import hashlib
import secrets
from collections.abc import Mapping

from sqlalchemy import delete, insert, select

from optimizer.service import schema
from optimizer.service.auth import Caller, Keys, Scope, Unauthenticated
from optimizer.service.database import Database

COOKIE = "trimserve_session"
VALID_S = 12 * 3600
VALID_BY_PROVIDER_S = 3600
MAX_PER_KEY = 20
"""Or person; the oldest gives way."""


class Sessions:
    """Usable from several threads and processes at once."""

    def __init__(self, database: Database, keys: Keys | None) -> None:
        self._database = database
        self._keys = keys

    @property
    def take_keys(self) -> bool:
        return self._keys is not None

    def begin(self, key_text: str) -> str:
        """The cookie's value. Raises Unauthenticated."""
        if self._keys is None:
            raise Unauthenticated("this service takes no API keys")
        return self._begun({"key_id": self._keys.checked_id(key_text)}, VALID_S)

    def begin_for(self, caller: Caller) -> str:
        """The cookie's value, for whom the provider has just named."""
        scopes = " ".join(sorted(caller.scopes))
        return self._begun({"subject": caller.subject, "scopes": scopes}, VALID_BY_PROVIDER_S)

    def _begun(self, of: Mapping[str, str], valid_s: float) -> str:
        token = secrets.token_urlsafe(32)
        table = schema.sessions
        name = "key_id" if "key_id" in of else "subject"
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            connection.execute(delete(table).where(table.c.expires_s <= now_s))
            held = connection.execute(
                select(table.c.hash)
                .where(table.c[name] == of[name])
                .order_by(table.c.created_s.desc())
                .offset(MAX_PER_KEY - 1)
            ).scalars()
            connection.execute(delete(table).where(table.c.hash.in_(list(held))))
            connection.execute(
                insert(table).values(
                    hash=hash_of(token), created_s=now_s, expires_s=now_s + valid_s, **of
                )
            )
        return token

    def caller(self, token: str) -> Caller:
        """Who began it, with the scopes that the key has now. Raises Unauthenticated."""
        table = schema.sessions
        with self._database.reading() as connection:
            now_s = self._database.now_s(connection)
            row = connection.execute(
                select(table).where(table.c.hash == hash_of(token), table.c.expires_s > now_s)
            ).first()
        if row is None:
            raise Unauthenticated("the session is over")
        if row.key_id is None:
            return Caller(row.subject, frozenset(Scope(one) for one in row.scopes.split()))
        if self._keys is None:
            raise Unauthenticated("this service takes no API keys any more")
        return self._keys.caller_of_id(row.key_id)

    def end(self, token: str) -> None:
        table = schema.sessions
        with self._database.writing() as connection:
            connection.execute(delete(table).where(table.c.hash == hash_of(token)))


def hash_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
