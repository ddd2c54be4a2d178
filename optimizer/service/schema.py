"""The tables of the service, as today's code reads them.

`migrations/` brings a database here from any older version; a test compares the two. Documents
are JSON in text columns, so that SQLite and PostgreSQL hold the same.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("owner", String(256), nullable=False),
    Column("name", String(128), nullable=False),
    Column("state", String(16), nullable=False),
    Column("labels", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("parent_id", String(32)),
    Column("run", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("reached", Integer, nullable=False),
    Column("lost", Integer, nullable=False),
    Column("told", Integer, nullable=False),
    Column("created_s", Float, nullable=False),
    Column("updated_s", Float, nullable=False),
    Column("started_s", Float),
    Column("ended_s", Float),
    Column("worker", String(256)),
    Column("token", String(64)),
    Column("lease_until_s", Float),
    Column("outcome", String(32)),
    Column("error", Text),
    Column("n_events", Integer, nullable=False),
    Column("n_logs", Integer, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("traceparent", String(64)),
    Column("stored_bytes", BigInteger, nullable=False),
    # What was asked for, and how far it is: read for one job at a time.
    Column("spec", Text, nullable=False),
    Column("progress", Text, nullable=False),
    Index(None, "state", "priority", "created_s"),
    Index(None, "owner", "state"),
    Index(None, "created_s", "id"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("at_s", Float, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("payload", Text, nullable=False),
)

logs = Table(
    "logs",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("at_s", Float, nullable=False),
    Column("text", Text, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(256), nullable=False),
    Column("name", String(128), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("received_bytes", BigInteger, nullable=False),
    Column("complete", Integer, nullable=False),
    Column("created_s", Float, nullable=False),
    Column("used_s", Float, nullable=False),
    Index(None, "owner"),
)

requests = Table(
    "requests",
    metadata,
    Column("owner", String(256), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("job_id", String(32), nullable=False),
    Column("created_s", Float, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("scopes", String(128), nullable=False),
    Column("created_s", Float, nullable=False),
    Column("expires_s", Float),
    Column("revoked_s", Float),
)

# Of browsers; the hash is of what their cookie holds.
sessions = Table(
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),
    # Of one that an API key began; the others have who it is, and what they may do.
    Column("key_id", ForeignKey("keys.id")),
    Column("subject", String(256)),
    Column("scopes", String(128)),
    Column("created_s", Float, nullable=False),
    Column("expires_s", Float, nullable=False),
    Index(None, "expires_s"),
)

# At the provider; the hash is of what the browser's cookie holds.
logins = Table(
    "logins",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("state", String(128), nullable=False),
    Column("nonce", String(128), nullable=False),
    Column("verifier", String(128), nullable=False),
    Column("target", Text, nullable=False),
    Column("expires_s", Float, nullable=False),
    Index(None, "expires_s"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at_s", Float, nullable=False),
    Column("subject", String(256), nullable=False),
    Column("action", String(32), nullable=False),
    Column("target", String(256), nullable=False),
    Column("detail", Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("name", String(256), primary_key=True),
    Column("seen_s", Float, nullable=False),
    Column("job_id", String(32)),
)

publications = Table(
    "publications",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("repository", String(128), nullable=False),
    Column("model", String(128), nullable=False),
    Column("version", String(20), nullable=False),
    Column("state", String(16), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("error", Text),
    Column("created_s", Float, nullable=False),
    Column("updated_s", Float, nullable=False),
    Column("digest", String(64)),
    UniqueConstraint("repository", "model", "version"),
    Index(None, "job_id"),
)
