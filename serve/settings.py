"""The server's settings: one frozen object a process, made by the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loadtest.slo import Slo
from serve.version_policy import VersionPolicy


@dataclass(frozen=True)
class Settings:
    """Exactly one of `repository` (a folder or URL of models) and `model` (an ONNX file) is given.

    Ports are 0 for any free one; without a `control_port` there is none. After SIGTERM the server
    turns not ready, serves on for `drain_delay_s`, so that load balancers look away, and then has
    `drain_timeout_s` to finish. `load_models` are names, or NAME@sha256:DIGEST, for the mode
    "explicit". `oversize` None leaves it to the versions' manifests. With `trust_code` versions are
    loaded whose files can carry code.
    """

    repository: str | None = None
    model: Path | None = None
    cache: Path | None = None
    slo: Slo | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    control_port: int | None = None
    model_control: Literal["none", "poll", "explicit"] = "none"
    poll_interval_s: float = 15.0
    load_models: tuple[str, ...] = ()
    version_policy: VersionPolicy = field(default_factory=VersionPolicy)
    control_on_data_port: bool = False
    oversize: Literal["refuse", "split"] | None = None
    trust_code: bool = False
    response_cache_bytes: int = 0
    merge_duplicates: bool = False
    tenant_header: str = ""
    shared_memory_prefix: str | None = None
    max_request_bytes: int = 64 * 1024 * 1024
    max_in_flight_bytes: int = 1024 * 1024 * 1024
    max_connections: int = 8192
    max_connection_age_s: float = 0.0
    drain_delay_s: float = 0.5
    drain_timeout_s: float = 30.0


@dataclass(frozen=True)
class Ports:
    """Where the server listens, once it does."""

    http_port: int
    grpc_port: int
    metrics_port: int
    control_port: int | None = None
