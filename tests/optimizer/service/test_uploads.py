"""Uploads whose service dies in the middle."""

from sqlalchemy import update

from optimizer.service import schema
from optimizer.service.app import Parts
from optimizer.service.auth import LOCAL
from tests.optimizer.service.conftest import uploaded


def test_an_upload_is_completed_whose_last_chunk_was_the_last_thing_the_service_did(
    parts: Parts,
) -> None:
    upload_id = uploaded(parts.operations, "m.onnx").removeprefix("upload:")
    with parts.database.writing() as connection:
        connection.execute(update(schema.uploads).values(complete=0))
    size = parts.uploads.get(upload_id).size_bytes
    for _ in range(2):  # by two clients at once
        assert parts.operations.append_upload(LOCAL, upload_id, size, b"").complete
    assert parts.uploads.get(upload_id).complete
