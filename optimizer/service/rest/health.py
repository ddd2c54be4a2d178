"""Routes of probes and of Prometheus: whether the service lives, is ready, and its metrics."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from optimizer.service.rest.parameters import Ops
from optimizer.service.rest.problems import problems


class Health(BaseModel):
    status: Literal["ok"] = "ok"


router = APIRouter(tags=["health"])


@router.get("/livez", operation_id="live")
async def live() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", operation_id="ready", responses=problems(503))
def ready(ops: Ops) -> Health:
    """The database answers, too."""
    ops.ledger.counts()
    return Health()


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    state = request.app.state
    if state.feed is not None:
        state.metrics.followers.set(state.feed.n_followers)
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
