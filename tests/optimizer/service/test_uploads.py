"""Uploads whose service dies in the middle, or that two clients send at once."""

import hashlib
from collections.abc import Callable

from sqlalchemy import update

from optimizer.service import schema
from optimizer.service.app import Parts, Settings
from optimizer.service.auth import LOCAL
from optimizer.service.blobs import Blobs
from optimizer.service.uploads import Uploads
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


class Overtaken(Blobs):
    """Lets something happen after a part is written."""

    def __init__(self, url: str, then: Callable[[], object]) -> None:
        super().__init__(url)
        self._then = then

    def write_part(self, upload_id: str, offset: int, content: bytes) -> None:
        super().write_part(upload_id, offset, content)
        self._then()


def test_a_chunk_that_another_client_sends_meanwhile_is_taken_as_it_was(
    parts: Parts, settings: Settings
) -> None:
    digest = hashlib.sha256(b"content").hexdigest()
    upload = parts.uploads.begin("me", "m.onnx", 7, digest)
    blobs = Overtaken(settings.blobs, lambda: parts.uploads.append(upload.id, "me", 0, b"content"))
    slow = Uploads(parts.database, blobs, settings.upload_limits)
    assert slow.append(upload.id, "me", 0, b"content").complete
