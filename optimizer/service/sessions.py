"""Sessions of browsers that have logged in with an API key.

A browser's cookie holds 256 random bits, the database their SHA-256 and the key's id. So a
session ends when its time is over, when it is logged out, and when its key is revoked or expires.
"""

import hashlib
import secrets

from sqlalchemy import delete, insert, select

from optimizer.service import schema
from optimizer.service.auth import Caller, Keys, Unauthenticated
from optimizer.service.database import Database

COOKIE = "trimserve_session"
VALID_S = 12 * 3600
MAX_PER_KEY = 20
"""The oldest gives way."""


class Sessions:
    """Usable from several threads and processes at once."""

    def __init__(self, database: Database, keys: Keys) -> None:
        self._database = database
        self._keys = keys

    def begin(self, key_text: str) -> str:
        """The cookie's value. Raises Unauthenticated."""
        key_id = self._keys.checked_id(key_text)
        token = secrets.token_urlsafe(32)
        table = schema.sessions
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            connection.execute(delete(table).where(table.c.expires_s <= now_s))
            held = connection.execute(
                select(table.c.hash)
                .where(table.c.key_id == key_id)
                .order_by(table.c.created_s.desc())
                .offset(MAX_PER_KEY - 1)
            ).scalars()
            connection.execute(delete(table).where(table.c.hash.in_(list(held))))
            connection.execute(
                insert(table).values(
                    hash=_hash(token), key_id=key_id, created_s=now_s, expires_s=now_s + VALID_S
                )
            )
        return token

    def caller(self, token: str) -> Caller:
        """Who began it, with the scopes that the key has now. Raises Unauthenticated."""
        table = schema.sessions
        with self._database.reading() as connection:
            now_s = self._database.now_s(connection)
            key_id = connection.execute(
                select(table.c.key_id).where(
                    table.c.hash == _hash(token), table.c.expires_s > now_s
                )
            ).scalar_one_or_none()
        if key_id is None:
            raise Unauthenticated("the session is over")
        return self._keys.caller_of_id(key_id)

    def end(self, token: str) -> None:
        table = schema.sessions
        with self._database.writing() as connection:
            connection.execute(delete(table).where(table.c.hash == _hash(token)))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
