"""Routes of the service as a whole: load tests, what it allows, who calls, the audit."""

from importlib import metadata
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field

from optimizer.service import documents as d
from optimizer.service.jobs import State
from optimizer.service.rest.parameters import IdempotencyKey, Limit, Ops, Who
from optimizer.service.rest.problems import problems

VERSION = metadata.version("trimserve")


class Me(BaseModel):
    subject: str
    scopes: list[str]


class Overview(BaseModel):
    """What this service allows: for clients, and for who wants to know why something is refused."""

    version: str
    repositories: list[str]
    stores: str
    factories: list[str]
    max_wall_clock_s: float
    chunk_bytes: int
    stored_bytes: int = Field(description="Of the files that your jobs keep.")
    max_stored_bytes: int | None = Field(description="How many they may keep together.")
    jobs: dict[State, int]


router = APIRouter(prefix="/v1", tags=["service"])


@router.post(
    "/publications/{publication_id}/load-test",
    operation_id="load_test",
    status_code=201,
    responses={200: {"model": d.JobDocument}, **problems(404, 409, 429, 507)},
)
def load_test(
    publication_id: Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")],
    response: Response,
    who: Who,
    ops: Ops,
    key: IdempotencyKey = None,
) -> d.JobDocument:
    """Put a published version under the load of its SLO: a job of its own."""
    job, is_new = ops.load_test(who, publication_id, key)
    response.status_code = 201 if is_new else 200
    return d.job_document(job)


@router.get("/service", operation_id="overview")
def overview(who: Who, ops: Ops) -> Overview:
    """What this service allows, and how many jobs it has."""
    policy = ops.policy
    return Overview(
        version=VERSION,
        repositories=sorted(ops.publisher.repositories),
        stores=policy.stores.shown,
        factories=list(policy.factories),
        max_wall_clock_s=policy.max_wall_clock_s,
        chunk_bytes=ops.uploads.limits.chunk_bytes,
        stored_bytes=ops.ledger.stored_bytes(who.subject),
        max_stored_bytes=ops.quotas.stored_bytes,
        jobs=ops.ledger.counts(),
    )


@router.get("/me", operation_id="me")
def me(who: Who) -> Me:
    return Me(subject=who.subject, scopes=sorted(who.scopes))


@router.get("/audit", operation_id="list_audit")
def audit(
    who: Who,
    ops: Ops,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    limit: Limit = 100,
) -> list[d.AuditDocument]:
    """Every change, the newest first; for admins."""
    return [d.audit_document(one) for one in ops.audit(who, before, limit)]
