"""System shared memory: tensors that a client on the same machine left in a file of /dev/shm.

A client registers a part of such a file under a name, and its requests then name the region. What
is read and written is copied by descriptor and never mapped: a client that cut its file short
would end the process with SIGBUS, and one that changed it could do so while it is parsed. It
knows bytes, not the tensors they mean, nor the transports.
"""

import errno
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serve.errors import InvalidRequest, NotSupported, ShuttingDown

MAX_REGIONS = 64
MAX_REGION_BYTES = 1 << 30
MAX_NAME_LENGTH = 255
PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[A-Za-z0-9._-]{1,255}")  # 255: the longest name of a file
_WANTED_KEY = "the name of a shared memory object that the server may read and write"
# What opening a key ends with that is the client's to mend; anything else is the server's.
_CLIENT_ERRORS = frozenset(
    {errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENODEV, errno.ENOENT, errno.ENXIO, errno.EPERM}
)
_OPEN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class Region:
    """`byte_size` bytes from `offset` on of the shared memory object `key`, both at least 0."""

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class _Open:
    region: Region
    descriptor: int


class SharedMemory:
    """The registered regions. Methods may be called from any thread.

    Keys must be longer than `prefix` and begin with it, after the "/" that POSIX names may have.
    Without a prefix it is off, and all but `enabled` and `close` raises NotSupported. Raises
    ValueError for a prefix that isn't allowed, OSError where `root` can't be opened.
    """

    def __init__(
        self,
        prefix: str | None,
        max_regions: int = MAX_REGIONS,
        max_region_bytes: int = MAX_REGION_BYTES,
        root: Path = Path("/dev/shm"),  # noqa: S108  (where Linux keeps shared memory objects)
    ) -> None:
        if prefix is not None and not PREFIX.fullmatch(prefix):
            raise ValueError(
                f"shared memory prefix: got {prefix!r}, want 1 to 64 letters, digits, '.', '_' or "
                "'-', a letter or digit first"
            )
        self._prefix = prefix
        self._max_regions = max_regions
        self._max_region_bytes = max_region_bytes
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._directory: int | None = None
        if prefix is not None:
            self._directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def enabled(self) -> bool:
        return self._prefix is not None

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region. A name in use is refused, with the same region too, like in Triton."""
        prefix = self._checked_prefix()
        if not 1 <= len(name) <= MAX_NAME_LENGTH:
            raise InvalidRequest("name", name, f"1 to {MAX_NAME_LENGTH} characters")
        file_name = _file_name(key, prefix)
        _check_range("offset", offset, 0, None)
        _check_range("byte_size", byte_size, 1, self._max_region_bytes)
        region = Region(name, key, offset, byte_size)
        with self._lock:
            if self._directory is None:
                raise ShuttingDown
            if name in self._open:
                raise InvalidRequest("name", name, "a name that isn't registered already")
            if len(self._open) >= self._max_regions:
                raise InvalidRequest(
                    "name", name, f"at most {self._max_regions} regions, unregister one first"
                )
            self._open[name] = _Open(region, _opened(self._directory, file_name, region))

    def unregister(self, name: str) -> None:
        """Forget a region; requests at work with it finish. Unknown names are no error, like in
        Triton: the region is gone either way."""
        self._checked_prefix()
        with self._lock:
            found = self._open.pop(name, None)
            if found is not None:
                os.close(found.descriptor)

    def unregister_all(self) -> None:
        self._checked_prefix()
        with self._lock:
            self._close_all()

    def status(self, name: str = "") -> tuple[Region, ...]:
        """The region `name`, or all by name where it is empty."""
        self._checked_prefix()
        with self._lock:
            if name:
                return (self._found("name", name).region,)
            return tuple(self._open[one].region for one in sorted(self._open))

    def read(self, name: str, offset: int, byte_size: int) -> bytes:
        """A copy of `byte_size` bytes from `offset` on in the region. It never shows two states
        of a byte, but may be torn where the client writes meanwhile."""
        with self._part(name, offset, byte_size) as (region, descriptor):
            return _read(descriptor, region, region.offset + offset, byte_size)

    def write(self, name: str, offset: int, chunk: bytes) -> None:
        """Write `chunk` from `offset` on in the region."""
        with self._part(name, offset, len(chunk)) as (region, descriptor):
            _write(descriptor, region, region.offset + offset, chunk)

    def close(self) -> None:
        """Forget all regions and take no new ones; closing twice is fine."""
        with self._lock:
            self._close_all()
            if self._directory is not None:
                os.close(self._directory)
                self._directory = None

    @contextmanager
    def _part(self, name: str, offset: int, byte_size: int) -> Iterator[tuple[Region, int]]:
        """The region, and a descriptor of its file that stays open whoever unregisters it."""
        self._checked_prefix()
        with self._lock:
            found = self._found("shared_memory_region", name)
            size = found.region.byte_size
            _check_range("shared_memory_offset", offset, 0, size)
            _check_range("shared_memory_byte_size", byte_size, 0, size - offset)
            descriptor = os.dup(found.descriptor)
        try:  # outside the lock: copies of large tensors run side by side
            yield found.region, descriptor
        finally:
            os.close(descriptor)

    def _checked_prefix(self) -> str:
        if self._prefix is None:
            raise NotSupported(
                "system shared memory is off; start the server with --shared-memory-prefix"
            )
        return self._prefix

    def _found(self, field: str, name: str) -> _Open:
        found = self._open.get(name)
        if found is None:
            raise InvalidRequest(field, name, "the name of a registered region")
        return found

    def _close_all(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1].descriptor)


def _file_name(key: str, prefix: str) -> str:
    name = key.removeprefix("/")
    if not _KEY.fullmatch(name) or not name.startswith(prefix) or name == prefix:
        raise InvalidRequest(
            "key", key, "letters, digits, '.', '_' or '-' after the server's --shared-memory-prefix"
        )
    return name


def _check_range(field: str, value: object, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequest(field, value, f"a whole number from {least}")
    if most is not None and value > most:
        raise InvalidRequest(field, value, f"at most {most}")


def _opened(directory: int, file_name: str, region: Region) -> int:
    """A descriptor of the region's file, once it is known to be one and to hold the region."""
    try:
        descriptor = os.open(file_name, _OPEN_FLAGS, dir_fd=directory)
    except OSError as error:
        if error.errno in _CLIENT_ERRORS:
            raise InvalidRequest("key", region.key, _WANTED_KEY) from None
        raise
    try:
        _check_file(os.fstat(descriptor), region)
    except InvalidRequest:
        os.close(descriptor)
        raise
    return descriptor


def _check_file(status: os.stat_result, region: Region) -> None:
    # A second link could be the name under the prefix of a file that isn't meant for it.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise InvalidRequest("key", region.key, _WANTED_KEY)
    end = region.offset + region.byte_size
    if end > status.st_size:
        raise InvalidRequest(
            "offset + byte_size", end, f"at most the {status.st_size} bytes of the key"
        )


def _read(descriptor: int, region: Region, position: int, byte_size: int) -> bytes:
    chunks: list[bytes] = []
    while byte_size:  # the kernel reads at most 2 GiB at a time
        chunk = os.pread(descriptor, byte_size, position)
        if not chunk:
            raise _cut_short(region)
        chunks.append(chunk)
        position += len(chunk)
        byte_size -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _write(descriptor: int, region: Region, position: int, chunk: bytes) -> None:
    # Writing past the end would give a file that was cut short a new one.
    if os.fstat(descriptor).st_size < region.offset + region.byte_size:
        raise _cut_short(region)
    rest = memoryview(chunk)
    while rest:
        try:
            n_written = os.pwrite(descriptor, rest, position)
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a sparse object, and no memory left to fill it
                raise
            want = "a region of memory that exists, not only its size"
            raise InvalidRequest("shared_memory_region", region.name, want) from None
        position += n_written
        rest = rest[n_written:]


def _cut_short(region: Region) -> InvalidRequest:
    return InvalidRequest(
        "shared_memory_region", region.name, "a region that still has its registered size"
    )
