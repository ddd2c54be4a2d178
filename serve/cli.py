"""`trimserve serve`: reads the command line into settings and starts the server."""

import asyncio
import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loadtest.slo import read_slo
from serve import logs
from serve.settings import Ports, Settings

EXIT_DONE, EXIT_INCOMPLETE = 0, 1
# Engines' threads wait for the interpreter's lock behind the front end: hand it over sooner.
SWITCH_INTERVAL_S = 0.001


class LogFormat(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve_command(
    repository: Annotated[
        Path | None,
        typer.Option(help="Folder of models: MODEL/VERSION/manifest.json.", metavar="DIR"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A plain ONNX file, served under its name.", metavar="FILE.onnx"),
    ] = None,
    slo: Annotated[
        Path | None,
        typer.Option(help="SLO that batching aims at, instead of the version's.", metavar="FILE"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="REST; 0 for any free port.")
    ] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC.")] = 8001,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Prometheus, at /metrics.")
    ] = 8002,
    max_request_bytes: Annotated[
        int, typer.Option(min=1024, max=2**31 - 1, help="Larger requests are refused.")
    ] = 64 * 1024 * 1024,
    drain_delay_s: Annotated[
        float,
        typer.Option(min=0, max=600, help="After SIGTERM: not ready, but answering for so long."),
    ] = 0.5,
    drain_timeout_s: Annotated[
        float, typer.Option(min=1, max=3600, help="Then: time to finish what was admitted.")
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

        curl localhost:8000/v2/models/digits
    """
    if (repository is None) == (model is None):
        raise typer.BadParameter("give either --repository DIR or --model FILE.onnx")
    settings = Settings(
        repository=repository,
        model=model,
        slo=read_slo(slo) if slo else None,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        max_request_bytes=max_request_bytes,
        drain_delay_s=drain_delay_s,
        drain_timeout_s=drain_timeout_s,
    )
    is_text = log_format is LogFormat.TEXT or (log_format is LogFormat.AUTO and sys.stderr.isatty())
    logs.configure("text" if is_text else "json", log_level.value)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    raise typer.Exit(EXIT_DONE if _run(settings) else EXIT_INCOMPLETE)


def _run(settings: Settings) -> bool:
    from serve.server import serve

    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):  # not on Windows
        loop_factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(serve(settings, _announce))


def _announce(ports: Ports) -> None:
    sys.stdout.write(json.dumps({"event": "ready", **asdict(ports)}) + "\n")
    sys.stdout.flush()


app = typer.Typer()
app.command("serve")(serve_command)
