"""The server's settings: one frozen object a process, made by the command line."""

from dataclasses import dataclass
from pathlib import Path

from loadtest.slo import Slo


@dataclass(frozen=True)
class Settings:
    """Exactly one of `repository` (a folder of models) and `model` (an ONNX file) is given.

    Ports are 0 for any free one. After SIGTERM the server turns not ready, serves on for
    `drain_delay_s`, so that load balancers look away, and then has `drain_timeout_s` to finish.
    """

    repository: Path | None = None
    model: Path | None = None
    slo: Slo | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    max_request_bytes: int = 64 * 1024 * 1024
    drain_delay_s: float = 0.5
    drain_timeout_s: float = 30.0


@dataclass(frozen=True)
class Ports:
    """Where the server listens, once it does."""

    http_port: int
    grpc_port: int
    metrics_port: int
