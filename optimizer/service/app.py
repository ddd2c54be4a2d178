"""Assembly of the service's process: database, operations, REST and housekeeping."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI

from optimizer.service.audit import Audit
from optimizer.service.auth import Authenticator, Keys, Oidc
from optimizer.service.blobs import Blobs
from optimizer.service.database import Database, DatabaseUnavailable
from optimizer.service.feed import Feed
from optimizer.service.ledger import Ledger
from optimizer.service.metrics import ServiceMetrics
from optimizer.service.operations import Operations, Quotas
from optimizer.service.provider_login import LoginClient, ProviderLogin
from optimizer.service.publishing import Publisher
from optimizer.service.rest.application import make_app
from optimizer.service.sessions import Sessions
from optimizer.service.submitted import Policy
from optimizer.service.telemetry import Telemetry
from optimizer.service.uploads import Limits, Uploads
from optimizer.service.watching import RECHECK_S

log = logging.getLogger(__name__)

SWEEP_S = 5.0


@dataclass(frozen=True)
class Settings:
    """Where things lie and what is allowed. `repositories`: name -> folder or address; `scratch` is
    a folder of this machine for what is under way. Without `keys` and `oidc` nobody has to say who
    they are."""

    database: str
    blobs: str
    scratch: Path
    repositories: Mapping[str, Path | str] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)
    quotas: Quotas = field(default_factory=Quotas)
    upload_limits: Limits = field(default_factory=Limits)
    keys: bool = False
    oidc: Oidc | None = None
    login: LoginClient | None = None
    """With a provider: who browsers come as that log in there."""
    recheck_s: float = RECHECK_S
    """Who follows a job is looked at again that often."""
    keep_s: float | None = None
    """Ended jobs are deleted after that."""
    hosts: frozenset[str] | None = None


@dataclass(frozen=True)
class Parts:
    """What a process of the service is made of."""

    database: Database
    ledger: Ledger
    uploads: Uploads
    blobs: Blobs
    operations: Operations
    authenticator: Authenticator
    sessions: Sessions | None
    """None where nobody can log in."""
    provider_login: ProviderLogin | None = None
    telemetry: Telemetry | None = None


def make_parts(settings: Settings) -> Parts:
    """Raises StoreInvalid, DatabaseUnavailable, StoreUnavailable. The tables are brought up to
    date."""
    database = Database(settings.database)
    database.migrate()
    blobs = Blobs(settings.blobs)
    blobs.check()
    ledger = Ledger(database)
    uploads = Uploads(database, blobs, settings.upload_limits)
    publisher = Publisher(database, blobs, settings.repositories, settings.scratch)
    publisher.check()
    operations = Operations(
        ledger, uploads, blobs, publisher, Audit(database), settings.policy, settings.quotas
    )
    keys = Keys(database) if settings.keys else None
    authenticator, oidc, client = Authenticator(keys, settings.oidc), settings.oidc, settings.login
    login = None
    if oidc is not None and client is not None:
        login = ProviderLogin(database, authenticator, oidc, client)
    can_log_in = keys is not None or login is not None
    sessions = Sessions(database, keys) if can_log_in else None
    return Parts(database, ledger, uploads, blobs, operations, authenticator, sessions, login)


def make_service(parts: Parts, settings: Settings) -> FastAPI:
    """The application; its lifespan starts the feed of events and the sweeping."""
    metrics = ServiceMetrics(parts.ledger)
    app = make_app(
        parts.operations, parts.authenticator, metrics, settings.hosts, parts.sessions,
        parts.telemetry, settings.recheck_s, parts.provider_login,
    )  # fmt: skip

    @contextlib.asynccontextmanager
    async def lifespan(started: FastAPI) -> AsyncIterator[None]:
        started.state.feed = Feed(parts.ledger)
        sweeping = asyncio.create_task(_sweep(parts.operations, settings.keep_s))
        try:
            yield
        finally:
            sweeping.cancel()
            started.state.feed.close()

    app.router.lifespan_context = lifespan
    return app


async def _sweep(operations: Operations, keep_s: float | None) -> None:
    while True:
        try:
            await asyncio.to_thread(operations.sweep, keep_s)
        except DatabaseUnavailable as error:
            log.warning("housekeeping waits: %s", error)
        except Exception:
            log.exception("housekeeping failed")
        await asyncio.sleep(SWEEP_S)
