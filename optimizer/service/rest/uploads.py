"""Routes of uploads: a chunk is the bytes themselves, with `Upload-Offset`."""

from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from optimizer.service import documents as d
from optimizer.service.requests import read_body
from optimizer.service.rest.parameters import Ops, UploadId, Who
from optimizer.service.rest.problems import problems


class Announcement(BaseModel):
    """A file that is going to be uploaded."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=128)
    size_bytes: int = Field(ge=1, le=2**53)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


@router.post("", operation_id="begin_upload", status_code=201)
def begin(asked: Announcement, who: Who, ops: Ops) -> d.UploadDocument:
    """Announce a file. The same one again gives the upload as it stands, to go on with."""
    upload = ops.begin_upload(who, asked.name, asked.size_bytes, asked.sha256)
    return d.upload_document(upload)


@router.get("", operation_id="list_uploads")
def list_uploads(who: Who, ops: Ops) -> list[d.UploadDocument]:
    return [d.upload_document(one) for one in ops.uploads_of(who)]


@router.get("/{upload_id}", operation_id="get_upload", responses=problems(404))
def get(upload_id: UploadId, who: Who, ops: Ops) -> d.UploadDocument:
    return d.upload_document(ops.upload(who, upload_id))


@router.patch(
    "/{upload_id}",
    operation_id="append_upload",
    responses=problems(404, 409, 413),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        }
    },
)
async def append(
    upload_id: UploadId,
    request: Request,
    who: Who,
    ops: Ops,
    offset: Annotated[int, Header(alias="Upload-Offset", ge=0, le=2**53)],
) -> d.UploadDocument:
    """Add a chunk at `Upload-Offset`. The last one is answered when the digest is right; a
    file whose digest is wrong is deleted."""
    content = await read_body(request, ops.uploads.limits.chunk_bytes)
    upload = await run_in_threadpool(ops.append_upload, who, upload_id, offset, content)
    return d.upload_document(upload)


@router.delete(
    "/{upload_id}", operation_id="delete_upload", status_code=204, responses=problems(404)
)
def delete(upload_id: UploadId, who: Who, ops: Ops) -> None:
    ops.delete_upload(who, upload_id)
