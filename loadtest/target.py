"""Where to send: the URL of one server's REST or gRPC endpoint."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

Protocol = Literal["rest", "grpc"]
PROTOCOLS: dict[str, Protocol] = {"http": "rest", "grpc": "grpc"}
SCHEMES: dict[Protocol, str] = {protocol: scheme for scheme, protocol in PROTOCOLS.items()}
METRICS_PORT = 8002


class TargetInvalid(ValueError):
    """A target URL that can't be used; `str()` says what was given and what is allowed."""


@dataclass(frozen=True)
class Target:
    protocol: Protocol
    host: str
    port: int

    @property
    def address(self) -> str:
        """host:port, an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{SCHEMES[self.protocol]}://{self.address}"

    @property
    def metrics_url(self) -> str:
        """Where trimserve exports its metrics unless told otherwise."""
        return f"http://{Target('rest', self.host, METRICS_PORT).address}/metrics"


def parse_target(url: str) -> Target:
    """Read `http://host:port` or `grpc://host:port`. Raises TargetInvalid."""
    want = "want http://HOST:PORT (REST) or grpc://HOST:PORT, for example http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise TargetInvalid(f"--target: got {url!r} ({error}), {want}") from error
    if parts.scheme not in PROTOCOLS or not parts.hostname or not port:
        raise TargetInvalid(f"--target: got {url!r}, {want}")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise TargetInvalid(f"--target: got {url!r}, {want}, without a path or credentials")
    return Target(PROTOCOLS[parts.scheme], parts.hostname, port)
