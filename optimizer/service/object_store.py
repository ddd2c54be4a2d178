"""An object store by fsspec, or a folder that is used like one: opened so that nothing is cached,
nothing waits for long, and no error shows a credential.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from optimizer.errors import OptimizerError

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 30.0
_N_ATTEMPTS = 3
_MAX_CAUSE_CHARS = 300
_S3 = ("s3", "s3a")
# What a driver's message could repeat.
_SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "FSSPEC_S3_SECRET",
    "FSSPEC_S3_KEY", "FSSPEC_S3_TOKEN",
)  # fmt: skip
_PROBE = ".probe-"


class StoreUnavailable(OptimizerError):
    """The object store doesn't answer, refuses us, or has no such bucket."""

    def __init__(self, shown: str, problem: str) -> None:
        super().__init__(f"{shown}: {problem}")


class ObjectStore:
    """`url` is a folder or an fsspec address. `fs` is fsspec's file system, whose calls are made
    inside of `translated`; `root` is the path in it."""

    def __init__(self, url: str, environ: Mapping[str, str] | None = None) -> None:
        """Raises StoreUnavailable where the address can't be read or its driver isn't there."""
        self.shown = without_credentials(url)
        self._environ = os.environ if environ is None else environ
        self.fs: Any
        protocol = url.partition("://")[0] if "://" in url else ""
        if "::" in url or (protocol in _S3 and not urlsplit(url).netloc):
            raise StoreUnavailable(
                self.shown, "want one address, with a bucket: s3://BUCKET/PREFIX"
            )
        # fsspec caches instances with their credentials, and listings with what was there before.
        fresh = {"skip_instance_cache": True, "use_listings_cache": False}
        options = fresh | (_s3_options() if protocol in _S3 else {})
        try:
            self.fs, root = url_to_fs(url, **(options if protocol else {}))
        except ImportError as error:
            install = "; pip install 'trimserve[s3]'" if protocol in _S3 else ""
            raise StoreUnavailable(self.shown, f"{error}{install}") from error
        except (OSError, TypeError, ValueError) as error:
            raise StoreUnavailable(self.shown, self._cause(error)) from error
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """What a block raises becomes StoreUnavailable, but for objects that are missing or there
        already: drivers raise whatever their client libraries do. A folder's errors stay."""
        try:
            yield
        except (FileNotFoundError, FileExistsError) as error:
            if _lacks_bucket(error):
                raise StoreUnavailable(self.shown, self._advised(error)) from error
            raise
        except StoreUnavailable:
            raise
        except Exception as error:
            if self.is_local:
                raise
            raise StoreUnavailable(self.shown, self._advised(error)) from error

    def make_folder(self) -> None:
        """The root, where it is a folder of this machine. Raises StoreUnavailable."""
        if not self.is_local:
            return
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(
                self.shown, f"{error.strerror}, want a folder, or a place for a new one"
            ) from error

    def check(self) -> None:
        """Write, read and delete a small object. Raises StoreUnavailable, OSError."""
        path = f"{self.root}/{_PROBE}{secrets.token_hex(8)}"
        self.make_folder()
        with self.translated():
            self.fs.pipe_file(path, b"probe")
            try:
                found = self.fs.cat_file(path)
            finally:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(path)
        if found != b"probe":
            raise StoreUnavailable(self.shown, "what was written isn't what can be read")

    def _advised(self, error: Exception) -> str:
        return (
            f"{self._cause(error)}; check the bucket, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
            if set(_protocols(self.fs)) & set(_S3)
            else self._cause(error)
        )

    def _cause(self, error: BaseException) -> str:
        text = " ".join(str(error).split())
        for name in _SECRETS:
            if held := self._environ.get(name):
                text = text.replace(held, "***")
        shown = text if len(text) <= _MAX_CAUSE_CHARS else f"{text[: _MAX_CAUSE_CHARS - 3]}..."
        return f"{type(error).__name__}: {shown}"


def without_credentials(url: str) -> str:
    """The address as it may be shown: without user, password and query."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def _s3_options() -> dict[str, Any]:
    return {
        "config_kwargs": {
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "retries": {"total_max_attempts": _N_ATTEMPTS, "mode": "standard"},
        }
    }


def _lacks_bucket(error: BaseException) -> bool:
    """An object is missing like a bucket by its error's type; the service's code is below it."""
    cause = error.__cause__ or error.__context__
    response = getattr(cause, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, Mapping) else None
    return code == "NoSuchBucket"


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = getattr(fs, "protocol", ())
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
