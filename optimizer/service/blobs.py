"""Files of the service: uploads in parts, and what jobs made, in a folder or an object store.

Names are made here, from ids; nothing that a client says becomes part of a path.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from optimizer.service.object_store import ObjectStore

_CHUNK_BYTES = 1 << 20


class Blobs:
    """`url` is a folder or an fsspec address such as s3://bucket/prefix. Usable from several
    threads. Where an object store doesn't answer, or not as it should, StoreUnavailable is raised
    by all of it."""

    def __init__(self, url: str) -> None:
        """Raises StoreUnavailable where the address can't be used at all."""
        self._store = ObjectStore(url)
        self._fs, self._root = self._store.fs, self._store.root
        self.is_local = self._store.is_local
        self.shown = self._store.shown
        self._store.make_folder()

    def check(self) -> None:
        """Raises StoreUnavailable where an object can't be written, read and deleted."""
        self._store.check()

    # --- uploads

    def write_part(self, upload_id: str, offset: int, content: bytes) -> None:
        """Parts are objects of their own, since object stores can't append; the same part again
        replaces itself. In a folder a part appears whole or not at all."""
        path = self._part(upload_id, offset)
        if self.is_local:
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as file:
                file.write(content)
            Path(file.name).replace(target)
        else:
            with self._store.translated():
                self._fs.pipe_file(path, content)

    def parts(self, upload_id: str, size_bytes: int) -> Iterator[bytes]:
        """The upload's content from its beginning. Raises OSError where a part is missing."""
        offset = 0
        while offset < size_bytes:
            start = offset
            with (
                self._store.translated(),
                self._fs.open(self._part(upload_id, offset), "rb") as file,
            ):
                while chunk := file.read(_CHUNK_BYTES):
                    offset += len(chunk)
                    yield chunk
            if offset == start:
                raise OSError(f"upload {upload_id}: the part at {start} is empty")

    def digest(self, upload_id: str, size_bytes: int) -> str:
        digest = hashlib.sha256()
        for chunk in self.parts(upload_id, size_bytes):
            digest.update(chunk)
        return digest.hexdigest()

    def fetch_upload(self, upload_id: str, size_bytes: int, sha256: str, target: Path) -> None:
        """Copy the upload to a file, which is there only once it is whole. Raises OSError, also
        where its content has changed."""
        digest, partial = hashlib.sha256(), target.with_name(f".{target.name}.part")
        try:
            with partial.open("wb") as file:
                for chunk in self.parts(upload_id, size_bytes):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise OSError(f"upload {upload_id}: what is stored isn't what was uploaded")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def delete_upload(self, upload_id: str) -> None:
        self._delete(f"{self._root}/uploads/{upload_id}")

    # --- what jobs made

    def store(self, job_id: str, claim: str, source: Path) -> None:
        """Copy the folder `source` to the job's, under the name of the claim that made it: what
        an outlived worker still writes lies beside what counts."""
        for file in sorted(source.rglob("*")):
            if file.is_file() and not file.is_symlink():
                name = file.relative_to(source).as_posix()
                path = f"{self._root}/jobs/{job_id}/{claim}/{name}"
                if self.is_local:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, path)
                else:
                    with self._store.translated():
                        self._fs.put_file(str(file), path)

    def read(self, job_id: str, claim: str, name: str, max_bytes: int) -> bytes | None:
        """The content of a file, None where there is none. Raises OSError where it is larger."""
        path = f"{self._root}/jobs/{job_id}/{claim}/{_inner(name)}"
        try:
            with self._store.translated():
                size_bytes = self._fs.size(path)
                content: bytes = self._fs.cat_file(path) if size_bytes <= max_bytes else b""
        except FileNotFoundError:
            return None
        if size_bytes > max_bytes:
            raise OSError(f"{name}: over {max_bytes} bytes")
        return content

    def files(self, job_id: str, claim: str, folder: str) -> dict[str, str]:
        """The files of a folder: name in it -> name for `fetch`."""
        root = f"{self._root}/jobs/{job_id}/{claim}/{_inner(folder)}"
        try:
            with self._store.translated():
                found = self._fs.find(root)
        except FileNotFoundError:
            return {}
        return {str(path).removeprefix(f"{root}/"): str(path) for path in found}

    def fetch(self, path: str, target: Path) -> None:
        """Copy one of `files` to a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._store.translated():
            self._fs.get_file(path, str(target))

    def keep_only(self, job_id: str, claim: str) -> None:
        """Delete what other claims of the job have stored. It may be there: what counts is."""
        root = f"{self._root}/jobs/{job_id}"
        with self._store.translated():
            found = self._fs.ls(root, detail=False)
        for path in found:
            if str(path).rstrip("/").rpartition("/")[2] != claim:
                self._delete(str(path))

    def delete_job(self, job_id: str) -> None:
        self._delete(f"{self._root}/jobs/{job_id}")

    def _part(self, upload_id: str, offset: int) -> str:
        return f"{self._root}/uploads/{upload_id}/{offset:016d}"

    def _delete(self, path: str) -> None:
        with self._store.translated():
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)


def _inner(name: str) -> str:
    """A name in a job's folder, which can't leave it. Raises ValueError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r}: want a name inside of the job's folder")
    return str(path)
