"""Addresses that a spec may name: which stores are allowed, and how what lies there is fetched.

Whoever submits a job makes the service open an address in its own network, so nothing is opened
but what its operator has allowed, and no host that turns out to be this machine, its neighbours
or the cloud's metadata (SSRF), unless the operator has named that very host.
"""

import hashlib
import ipaddress
import os
import posixpath
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import urllib3

SCHEMES = ("file", "s3", "gs", "https", "http")
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_PORTS = {"https": 443, "http": 80}


class AddressRefused(ValueError):
    """An address that may not be opened, or doesn't give what it should; says what is wanted."""


@dataclass(frozen=True)
class Store:
    """An allowed prefix: scheme, host (or bucket) and leading path segments."""

    scheme: str
    host: str
    segments: tuple[str, ...]
    shown: str

    @classmethod
    def parse(cls, text: str) -> "Store":
        """Raises AddressRefused."""
        scheme, host, segments = _taken_apart(text)
        if scheme == "file" and not segments:
            raise AddressRefused(f"{text}: want a folder, not the whole file system")
        return cls(scheme, host, segments, text)

    def holds(self, scheme: str, host: str, segments: tuple[str, ...]) -> bool:
        return (scheme, host) == (self.scheme, self.host) and (
            segments[: len(self.segments)] == self.segments
        )


class Stores:
    """The allowed ones. `file:///DIR` allows what lies in a folder of the service's machines."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._stores = tuple(Store.parse(text) for text in allowed)

    @property
    def shown(self) -> str:
        return ", ".join(store.shown for store in self._stores) or "none is allowed"

    def check(self, address: str) -> str:
        """The address' file name. Raises AddressRefused. Nothing is opened."""
        scheme, host, segments = _taken_apart(address)
        if not any(store.holds(scheme, host, segments) for store in self._stores):
            raise AddressRefused(f"want an address in an allowed store ({self.shown})")
        if not segments:
            raise AddressRefused("want an address of a file")
        if scheme == "file":
            self.local(address)
        return segments[-1]

    def local(self, address: str) -> Path:
        """The path of a file:// address, links followed: it must still be in an allowed folder."""
        _, _, segments = _taken_apart(address)
        real = Path(os.path.realpath("/" + "/".join(segments)))
        roots = [Path("/", *store.segments) for store in self._stores if store.scheme == "file"]
        if not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
            raise AddressRefused(f"it leads out of the allowed stores ({self.shown})")
        if not real.exists():
            raise AddressRefused("want an existing file or folder")
        return real

    def fetch(self, address: str, target: Path, max_bytes: int) -> str:
        """Copy what lies at the address to the file `target`; returns its SHA-256.

        Raises AddressRefused for more than `max_bytes`, and OSError."""
        self.check(address)
        scheme, host, segments = _taken_apart(address)
        if scheme in _PORTS:
            chunks = self._over_http(address)
        else:
            chunks = _over_fsspec(f"{scheme}://{host}/{'/'.join(segments)}")
        digest, n_bytes = hashlib.sha256(), 0
        with target.open("wb") as file:
            for chunk in chunks:
                n_bytes += len(chunk)
                if n_bytes > max_bytes:
                    raise AddressRefused(f"{address}: over {max_bytes} bytes")
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest()

    def _over_http(self, address: str) -> Iterator[bytes]:
        """From an IP address that was looked at: the name isn't resolved again, and redirects
        aren't followed."""
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        peer = self._checked_peer(host, port)
        pool: urllib3.HTTPConnectionPool
        if parts.scheme == "https":
            pool = urllib3.HTTPSConnectionPool(
                peer, port, server_hostname=host, assert_hostname=host, timeout=_TIMEOUT_S
            )
        else:
            pool = urllib3.HTTPConnectionPool(peer, port, timeout=_TIMEOUT_S)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        with pool:
            try:
                answer = pool.request(
                    "GET", path, headers={"Host": parts.netloc}, redirect=False, retries=False,
                    preload_content=False,
                )  # fmt: skip
                if answer.status != 200:
                    raise AddressRefused(f"{address}: HTTP {answer.status}")
                yield from answer.stream(_CHUNK_BYTES)
            except urllib3.exceptions.HTTPError as error:
                raise OSError(f"{address}: {error}") from error

    def _checked_peer(self, host: str, port: int) -> str:
        """An IP address of the host. Where one of them isn't public, the operator must have
        allowed a store at that very IP address or at `localhost`."""
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        for peer in sorted(str(one) for one in found):
            if not ipaddress.ip_address(peer).is_global and not _is_literal(host):
                raise AddressRefused(
                    f"{host} is at {peer}, which isn't public; an operator can allow it by its "
                    "number"
                )
        return sorted(str(one) for one in found)[0]


def _is_literal(host: str) -> bool:
    """What the operator has allowed by number, or as localhost, is meant."""
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _over_fsspec(address: str) -> Iterator[bytes]:
    with fsspec.open(address, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _taken_apart(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Scheme, host with port, path segments. Raises AddressRefused, also for what a path could
    be misread by."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise AddressRefused(f"can't be read as an address: {error}") from error
    if parts.scheme not in SCHEMES:
        raise AddressRefused(f"want an address that begins with {_listed(SCHEMES)}")
    if parts.username is not None or parts.password is not None:
        raise AddressRefused("want an address without a user or password")
    if parts.fragment or (parts.query and parts.scheme not in _PORTS):
        raise AddressRefused("want an address without ? and #")
    host = (parts.hostname or "") + (f":{port}" if port is not None else "")
    if (parts.scheme == "file") == bool(host):
        raise AddressRefused("want file:///PATH, and a host or bucket in any other address")
    path = unquote(parts.path)
    if set(path) & set("\\\0$") or any(part in (".", "..") for part in path.split("/")):
        raise AddressRefused("want a path without '.', '..', '$' and backslashes")
    normal = posixpath.normpath(path).strip("/")
    return parts.scheme, host, tuple(part for part in normal.split("/") if part not in ("", "."))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{name}://" for name in names)
