"""Uploads: files that come in chunks, can be resumed, and count once their digest is right."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update

from optimizer.service import schema
from optimizer.service.blobs import Blobs
from optimizer.service.database import Database
from optimizer.service.submitted import file_name

SUFFIXES = (".onnx", ".safetensors", ".parquet", ".npz", ".json")
PT2 = ".pt2"
PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")


class UploadRefused(Exception):
    """An upload that can't be begun or gone on with; the message says what is wanted."""


class UploadNotFound(Exception):
    def __init__(self, upload_id: str) -> None:
        super().__init__(f"there is no upload {upload_id}")


class OffsetWrong(Exception):
    """A chunk that doesn't follow on what is there: go on at `received_bytes`."""

    def __init__(self, got: int, received_bytes: int) -> None:
        super().__init__(f"got a chunk for {got}, want one for {received_bytes}")
        self.received_bytes = received_bytes


@dataclass(frozen=True)
class Limits:
    """`file_bytes` of one upload, `owner_bytes` of all that one owner has, `chunk_bytes` of one
    request. `keep_s`: uploads that no job has used for so long are deleted."""

    file_bytes: int = 4 << 30
    owner_bytes: int = 20 << 30
    chunk_bytes: int = 32 << 20
    keep_s: float = 7 * 86_400.0
    pt2: bool = False


@dataclass(frozen=True)
class Upload:
    id: str
    owner: str
    name: str
    size_bytes: int
    sha256: str
    received_bytes: int
    complete: bool
    created_s: float


class Uploads:
    def __init__(self, database: Database, blobs: Blobs, limits: Limits) -> None:
        self._database = database
        self._blobs = blobs
        self.limits = limits

    def begin(self, owner: str, name: str, size_bytes: int, sha256: str) -> Upload:
        """Announce a file. One with the same owner, name, size and digest is gone on with.

        Raises UploadRefused for names, kinds and sizes that aren't taken."""
        self._check(name, size_bytes)
        table = schema.uploads
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            same = connection.execute(
                select(table).where(
                    table.c.owner == owner,
                    table.c.name == name,
                    table.c.size_bytes == size_bytes,
                    table.c.sha256 == sha256,
                )
            ).first()
            if same is not None:
                return _upload(same)
            held = connection.execute(
                select(func.coalesce(func.sum(table.c.size_bytes), 0)).where(table.c.owner == owner)
            ).scalar_one()
            if int(held) + size_bytes > self.limits.owner_bytes:
                raise UploadRefused(
                    f"size_bytes: got {size_bytes} beside {held} that you have uploaded, want at "
                    f"most {self.limits.owner_bytes} together: delete some"
                )
            upload = Upload(secrets.token_hex(8), owner, name, size_bytes, sha256, 0, False, now_s)
            connection.execute(
                insert(table).values(
                    id=upload.id, owner=owner, name=name, size_bytes=size_bytes, sha256=sha256,
                    received_bytes=0, complete=0, created_s=now_s, used_s=now_s,
                )
            )  # fmt: skip
            return upload

    def get(self, upload_id: str, owner: str | None = None) -> Upload:
        """Raises UploadNotFound, also for another owner's."""
        with self._database.reading() as connection:
            row = connection.execute(
                select(schema.uploads).where(schema.uploads.c.id == upload_id)
            ).first()
        if row is None or (owner is not None and row.owner != owner):
            raise UploadNotFound(upload_id)
        return _upload(row)

    def of(self, owner: str | None) -> list[Upload]:
        statement = select(schema.uploads).order_by(schema.uploads.c.created_s.desc()).limit(500)
        if owner is not None:
            statement = statement.where(schema.uploads.c.owner == owner)
        with self._database.reading() as connection:
            return [_upload(row) for row in connection.execute(statement)]

    def append(self, upload_id: str, owner: str, offset: int, content: bytes) -> Upload:
        """Add a chunk. The last one completes the upload, if its digest is right; if not, it is
        deleted. A chunk that came before is taken as it was; an empty one at the end completes
        what is all there, where whoever received the last one has died.

        Raises UploadNotFound, OffsetWrong, UploadRefused."""
        upload = self.get(upload_id, owner)
        end = offset + len(content)
        if end <= upload.received_bytes and content:
            return upload
        if not content and offset == upload.received_bytes == upload.size_bytes:
            return upload if upload.complete else self._completed(upload_id)
        if offset != upload.received_bytes or upload.complete:
            raise OffsetWrong(offset, upload.received_bytes)
        if not content or len(content) > self.limits.chunk_bytes:
            raise UploadRefused(
                f"got a chunk of {len(content)} bytes, want 1 to {self.limits.chunk_bytes}"
            )
        if end > upload.size_bytes:
            raise UploadRefused(
                f"got {end} bytes, want the {upload.size_bytes} that were announced"
            )
        self._blobs.write_part(upload_id, offset, content)
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            moved = connection.execute(
                update(schema.uploads)
                .where(schema.uploads.c.id == upload_id, schema.uploads.c.received_bytes == offset)
                .values(received_bytes=end, used_s=now_s)
            )
        if moved.rowcount != 1:  # by another client of the owner's, which sends the same file
            now = self.get(upload_id, owner)
            if now.received_bytes >= end:
                return now
            raise OffsetWrong(offset, now.received_bytes)
        return self._completed(upload_id) if end == upload.size_bytes else self.get(upload_id)

    def delete(self, upload_id: str, owner: str | None) -> None:
        """Raises UploadNotFound. What jobs have fetched from it stays theirs."""
        self.get(upload_id, owner)
        with self._database.writing() as connection:
            connection.execute(delete(schema.uploads).where(schema.uploads.c.id == upload_id))
        self._blobs.delete_upload(upload_id)

    def touch(self, upload_ids: Iterable[str]) -> None:
        """They are used by a job now: count their keeping from here."""
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            connection.execute(
                update(schema.uploads)
                .where(schema.uploads.c.id.in_(list(upload_ids)))
                .values(used_s=now_s)
            )

    def fetch(self, upload_id: str, folder: Path) -> Path:
        """Copy the file into a folder of its own in `folder`. Raises UploadNotFound, OSError."""
        upload = self.get(upload_id)
        target = folder / upload_id / file_name(upload.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_size != upload.size_bytes:
            self._blobs.fetch_upload(upload.id, upload.size_bytes, upload.sha256, target)
        return target

    def forget_unused(self, in_use: frozenset[str]) -> int:
        """Delete those that nothing has used for `keep_s`, but for `in_use`."""
        with self._database.reading() as connection:
            before_s = self._database.now_s(connection) - self.limits.keep_s
            found = connection.execute(
                select(schema.uploads.c.id).where(schema.uploads.c.used_s < before_s)
            ).scalars()
            old = [one for one in found if one not in in_use]
        for upload_id in old:
            self.delete(upload_id, None)
        return len(old)

    def _completed(self, upload_id: str) -> Upload:
        upload = self.get(upload_id)
        found = self._blobs.digest(upload_id, upload.size_bytes)
        if found != upload.sha256:
            self.delete(upload_id, None)
            raise UploadRefused(
                f"sha256: got content with {found}, want {upload.sha256}; the upload is deleted"
            )
        with self._database.writing() as connection:
            connection.execute(
                update(schema.uploads).where(schema.uploads.c.id == upload_id).values(complete=1)
            )
        return self.get(upload_id)

    def _check(self, name: str, size_bytes: int) -> None:
        try:
            file_name(name)
        except ValueError as error:
            raise UploadRefused(f"name: got {name[:80]!r}, {error}") from error
        suffix = Path(name).suffix.lower()
        if suffix in PICKLED:
            raise UploadRefused(
                f"name: got {name!r}: pickled files can run code; convert weights by "
                "safetensors.torch.save_file(model.state_dict(), path)"
            )
        allowed = (*SUFFIXES, PT2) if self.limits.pt2 else SUFFIXES
        if suffix not in allowed:
            raise UploadRefused(f"name: got {name!r}, want one of {', '.join(allowed)}")
        if not 1 <= size_bytes <= self.limits.file_bytes:
            raise UploadRefused(f"size_bytes: got {size_bytes}, want 1 to {self.limits.file_bytes}")


def _upload(row: Row[Any]) -> Upload:
    held = dict(row._mapping)
    held.pop("used_s")
    return Upload(**{**held, "complete": bool(held["complete"])})
