"""`trimserve serve`: reads the command line into settings and starts the server."""

import asyncio
import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loadtest.slo import read_slo
from serve import logs
from serve.artifact import check_model_name
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.settings import Ports, Settings
from serve.shared_memory import PREFIX
from serve.storage.digest import parse_digest
from serve.version_policy import VersionPolicy, parse_policy

EXIT_DONE, EXIT_INCOMPLETE = 0, 1
DEFAULT_CONTROL_PORT = 8003
# Engines' threads wait for the interpreter's lock behind the front end: hand it over sooner.
SWITCH_INTERVAL_S = 0.001
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, section 5.6.2


class LogFormat(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class ControlMode(StrEnum):
    NONE = "none"
    POLL = "poll"
    EXPLICIT = "explicit"


class Oversize(StrEnum):
    REFUSE = "refuse"
    SPLIT = "split"


_MODELS = "Models"
_BATCHING = "Batching and reuse"
_NETWORK = "Network and limits"


def serve_command(
    repository: Annotated[
        str | None,
        typer.Option(
            help="Folder or address (s3://...) of models: MODEL/VERSION/manifest.json, or "
            "MODEL/VERSION/model.onnx as for Triton.",
            metavar="DIR|URL",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A plain ONNX file, served under its name.",
            metavar="FILE.onnx",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where versions from an address are kept; by default a temporary folder.",
            metavar="DIR",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Load versions whose files can carry code, too: torch programs and AOTInductor "
            "packages (.pt2). Only if you trust whoever writes to the repository.",
            rich_help_panel=_MODELS,
        ),
    ] = False,
    model_control: Annotated[
        ControlMode,
        typer.Option(
            help="none: load all at the start; poll: follow the repository; explicit: load and "
            "unload by request, on the control port.",
            rich_help_panel=_MODELS,
        ),
    ] = ControlMode.NONE,
    load_model: Annotated[
        list[str] | None,
        typer.Option(
            help="With explicit: a model to start with; again for more. @sha256:... pins the "
            "version with that content.",
            metavar="NAME[@DIGEST]",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    version_policy: Annotated[
        str,
        typer.Option(
            help="all, latest:N or specific:V,V,..., where the model's configuration has none.",
            metavar="POLICY",
            rich_help_panel=_MODELS,
        ),
    ] = "latest:1",
    poll_interval_s: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            max=86400,
            help=f"With poll: seconds between looks; {Settings.poll_interval_s:g} without it.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    slo: Annotated[
        Path | None,
        typer.Option(
            help="SLO that batching aims at, instead of the version's.",
            metavar="FILE",
            rich_help_panel=_BATCHING,
        ),
    ] = None,
    oversize: Annotated[
        Oversize | None,
        typer.Option(
            help="Requests larger than the max batch size: refused, or split over batches; by "
            "default as the version's manifest says.",
            rich_help_panel=_BATCHING,
        ),
    ] = None,
    response_cache_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Keep answers, and give them again to equal requests; 0 for not.",
            rich_help_panel=_BATCHING,
        ),
    ] = 0,
    merge_duplicates: Annotated[
        bool,
        typer.Option(
            "--merge-duplicates",
            help="Equal requests that are under way at a time run once.",
            rich_help_panel=_BATCHING,
        ),
    ] = False,
    tenant_header: Annotated[
        str,
        typer.Option(
            help="Header, set by your gateway, that names the tenant: answers are never reused "
            "across tenants.",
            metavar="NAME",
            rich_help_panel=_BATCHING,
        ),
    ] = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=_NETWORK)
    ] = "127.0.0.1",
    http_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="REST; 0 for any free port.", rich_help_panel=_NETWORK),
    ] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="gRPC.", rich_help_panel=_NETWORK)
    ] = 8001,
    metrics_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Prometheus, at /metrics.", rich_help_panel=_NETWORK),
    ] = 8002,
    control_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help=f"Model control over REST, on loopback only; {DEFAULT_CONTROL_PORT} with "
            "--model-control explicit, else none.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    control_on_data_port: Annotated[
        bool,
        typer.Option(
            "--control-on-data-port",
            help="Let clients of the data ports load, unload and change log settings, as Triton's "
            "do. Only among people you trust.",
            rich_help_panel=_NETWORK,
        ),
    ] = False,
    shared_memory_prefix: Annotated[
        str | None,
        typer.Option(
            help="Let clients of this machine pass tensors in system shared memory, in regions "
            "whose key begins like this.",
            metavar="PREFIX",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    max_request_bytes: Annotated[
        int,
        typer.Option(
            min=1024, max=2**31 - 1, help="Larger requests are refused.", rich_help_panel=_NETWORK
        ),
    ] = 64 * 1024 * 1024,
    max_in_flight_bytes: Annotated[
        int,
        typer.Option(
            min=1024,
            help="Bodies of all requests at a time; beyond it they are refused with 429.",
            rich_help_panel=_NETWORK,
        ),
    ] = 1024 * 1024 * 1024,
    max_connections: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of each port at a time, as far as the limit of open files allows; more are "
            "refused.",
            rich_help_panel=_NETWORK,
        ),
    ] = 8192,
    max_connection_age_s: Annotated[
        float,
        typer.Option(
            min=0,
            max=86400,
            help="gRPC clients connect anew after so long, so that balancers can spread them; 0 "
            "for never.",
            rich_help_panel=_NETWORK,
        ),
    ] = 0.0,
    drain_delay_s: Annotated[
        float,
        typer.Option(
            min=0,
            max=600,
            help="After SIGTERM: not ready, but answering for so long.",
            rich_help_panel=_NETWORK,
        ),
    ] = 0.5,
    drain_timeout_s: Annotated[
        float,
        typer.Option(
            min=1,
            max=3600,
            help="Then: time to finish what was admitted.",
            rich_help_panel=_NETWORK,
        ),
    ] = 30.0,
    log_format: Annotated[
        LogFormat, typer.Option(help="auto: text on a terminal, else JSON lines.")
    ] = LogFormat.AUTO,
    log_level: Annotated[LogLevel, typer.Option(help="Least severe level shown.")] = LogLevel.INFO,
) -> None:
    """Serve models over REST and gRPC (Open Inference Protocol v2).

    Requests of all clients are batched together, and the batching aims at the model's SLO.
    When the models are ready one line of JSON with the ports goes to standard output. SIGTERM
    drains: what was admitted is answered before the process ends.

    Examples:

        trimserve serve --repository models

        trimserve serve --model resnet50.onnx --http-port 9000

        trimserve serve --repository s3://bucket/models --model-control poll

        curl localhost:8000/v2/models/digits
    """
    if (repository is None) == (model is None):
        raise typer.BadParameter("give either --repository DIR|URL or --model FILE.onnx")
    if load_model and model_control is not ControlMode.EXPLICIT:
        raise typer.BadParameter("--load-model: want --model-control explicit with it")
    if poll_interval_s is not None and model_control is not ControlMode.POLL:
        raise typer.BadParameter("--poll-interval-s: want --model-control poll with it")
    if control_port is None and model_control is ControlMode.EXPLICIT:
        control_port = DEFAULT_CONTROL_PORT
    settings = Settings(
        repository=repository,
        model=model,
        cache=cache,
        slo=read_slo(slo) if slo else None,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        control_port=control_port,
        model_control=model_control.value,
        poll_interval_s=poll_interval_s or Settings.poll_interval_s,
        load_models=tuple(map(_checked_model, load_model or ())),
        version_policy=_policy(version_policy),
        control_on_data_port=control_on_data_port,
        oversize=oversize.value if oversize else None,
        trust_code=trust_code,
        response_cache_bytes=response_cache_bytes,
        merge_duplicates=merge_duplicates,
        tenant_header=_header_name(tenant_header),
        shared_memory_prefix=_memory_prefix(shared_memory_prefix),
        max_request_bytes=max_request_bytes,
        max_in_flight_bytes=max_in_flight_bytes,
        max_connections=max_connections,
        max_connection_age_s=max_connection_age_s,
        drain_delay_s=drain_delay_s,
        drain_timeout_s=drain_timeout_s,
    )
    is_text = log_format is LogFormat.TEXT or (log_format is LogFormat.AUTO and sys.stderr.isatty())
    logs.configure("text" if is_text else "json", log_level.value)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    raise typer.Exit(EXIT_DONE if _run(settings) else EXIT_INCOMPLETE)


def _checked_model(text: str) -> str:
    """NAME or NAME@sha256:DIGEST, as it was given."""
    name, _, digest = text.partition("@")
    try:
        check_model_name(name)
        if "@" in text:
            parse_digest(digest)
    except (ArtifactInvalid, InvalidRequest) as error:
        raise typer.BadParameter(f"--load-model: {error}") from error
    return text


def _memory_prefix(text: str | None) -> str | None:
    """The prefix without the slash that keys of shared memory may begin with."""
    prefix = text.removeprefix("/") if text is not None else None
    if prefix is not None and not PREFIX.fullmatch(prefix):
        raise typer.BadParameter(
            f"--shared-memory-prefix: got {text!r}, want 1 to 64 letters, digits, '.', '_' or '-', "
            "a letter or digit first"
        )
    return prefix


def _header_name(text: str) -> str:
    if text and not _TOKEN.fullmatch(text):
        raise typer.BadParameter(
            f"--tenant-header: got {text!r}, want the name of a header: letters, digits and any of "
            "!#$%&'*+-.^_`|~"
        )
    return text


def _policy(text: str) -> VersionPolicy:
    try:
        return parse_policy(text)
    except ValueError as error:
        raise typer.BadParameter(f"--version-policy: {error}") from error


def _run(settings: Settings) -> bool:
    from serve.server import serve

    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):  # not on Windows
        loop_factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(serve(settings, _announce))


def _announce(ports: Ports, is_ready: bool) -> None:
    event = "ready" if is_ready else "not_ready"
    sys.stdout.write(json.dumps({"event": event, **asdict(ports)}) + "\n")
    sys.stdout.flush()


app = typer.Typer()
app.command("serve")(serve_command)
