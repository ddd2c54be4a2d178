"""What routes have in common: who calls, the operations, and parameters of the same kind."""

from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from optimizer.service.auth import Caller
from optimizer.service.operations import Operations
from optimizer.service.records import MAX_PAGE
from optimizer.service.requests import caller_of

JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="A job's id.")]
UploadId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="An upload's id.")]
After = Annotated[int, Query(ge=0, le=2**31 - 1, description="Numbers above this.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=128,
        description="The same key with the same request gives the job of before.",
    ),
]


def _operations(request: Request) -> Operations:
    operations: Operations = request.app.state.operations
    return operations


Who = Annotated[Caller, Depends(caller_of)]
Ops = Annotated[Operations, Depends(_operations)]
