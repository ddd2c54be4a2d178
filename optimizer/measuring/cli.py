"""The command `trimserve measure`: arguments in, an agent that measures, an exit code out.

What serves and measures is imported when the command runs, so that its help is quick.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from optimizer.measuring.agent import Limits
    from optimizer.measuring.agent_server import Address

DEFAULT_LISTEN = "127.0.0.1:8010"
EXIT_USAGE = 2

HELP = f"""\
Measure engines on this machine for studies that run on another one.

A study whose spec names this agent (`target.agent: http://HOST:PORT`) builds and trains where it
runs, and has each variant checked, timed and profiled here: the agent takes the files once, runs
one call at a time with the machine's cores to itself, and needs neither torch nor the data set.
Only ONNX Runtime and OpenVINO models are taken, as files that hold data; nothing that could carry
code.

Who has the **token** may use the machine's time and memory. It comes from the environment
(`TRIMSERVE_AGENT_TOKEN`, or the file that `TRIMSERVE_AGENT_TOKEN_FILE` names) or from
`--token-file`, has at least 32 characters, and is the same on both sides. Beyond loopback, protect
it by TLS (`--tls-cert`, `--tls-key`) or a tunnel.

When it is ready one line of JSON with its address goes to standard output. SIGTERM ends it; the
call under way fails.

**Exit code**: 0 ended by SIGTERM, 2 for what to mend on the command line, 70 an internal error,
130 interrupted.

**Examples**

`export TRIMSERVE_AGENT_TOKEN=$(openssl rand -hex 32)`

`trimserve measure --listen {DEFAULT_LISTEN}` and, where the study runs,
`ssh -N -L 8010:localhost:8010 target`

`trimserve measure --listen 0.0.0.0:8010 --tls-cert cert.pem --tls-key key.pem --token-file token`

`curl localhost:8010/health`
"""


class LogFormat(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command("measure", help=HELP)
def measure_command(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address to listen on; port 0 for any.")
    ] = DEFAULT_LISTEN,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The token, instead of the environment's.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key, PEM.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where artifacts are kept; by default a temporary folder."
        ),
    ] = None,
    max_cache_bytes: Annotated[
        int, typer.Option(min=1, help="Of all artifacts; the least recently used go.")
    ] = 16 * 1024**3,
    max_artifact_bytes: Annotated[int, typer.Option(min=1, help="Of one artifact.")] = 2 * 1024**3,
    max_call_s: Annotated[
        float, typer.Option(min=1, max=86400, help="Until an engine is taken to hang.")
    ] = 900.0,
    max_waiting: Annotated[
        int, typer.Option(min=0, max=1024, help="Requests in the queue; more are refused, 429.")
    ] = 16,
    log_format: Annotated[
        LogFormat, typer.Option(help="auto: text on a terminal, else JSON lines.")
    ] = LogFormat.AUTO,
) -> None:
    from optimizer.measuring.agent import Limits
    from optimizer.measuring.agent_server import Address
    from optimizer.measuring.bearer import TokenInvalid, read_token
    from serve import logs

    host, port = _address(listen)
    if (tls_cert is None) != (tls_key is None):
        _usage("want --tls-cert and --tls-key together")
    try:
        token = read_token(os.environ, token_file)
    except TokenInvalid as error:
        _usage(str(error))
    is_text = log_format is LogFormat.TEXT or (log_format is LogFormat.AUTO and sys.stderr.isatty())
    logs.configure("text" if is_text else "json", "info")
    if tls_cert is None and not _is_loopback(host):
        logging.getLogger(__name__).warning(
            "listening beyond loopback without TLS: who can listen on the way learns the token"
        )
    limits = Limits(
        max_artifact_bytes=max_artifact_bytes,
        max_cache_bytes=max_cache_bytes,
        max_call_s=max_call_s,
        max_waiting=max_waiting,
    )
    with _directory(cache) as directory:
        asyncio.run(_serve(Address(host, port, tls_cert, tls_key), token, directory, limits))


async def _serve(address: "Address", token: str, directory: Path, limits: "Limits") -> None:
    """Until SIGTERM; raises KeyboardInterrupt after SIGINT."""
    from optimizer.measuring.agent import Agent
    from optimizer.measuring.agent_server import serve

    with contextlib.closing(Agent(directory, token, limits)) as agent:
        number = await serve(agent, address, _announce)
    if number is signal.SIGINT:
        raise KeyboardInterrupt


def _announce(url: str) -> None:
    sys.stdout.write(json.dumps({"event": "ready", "url": url}) + "\n")
    sys.stdout.flush()


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        _usage(f"--listen: got {listen!r}, want HOST:PORT with a port of 0 to 65535")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _directory(cache: Path | None) -> Iterator[Path]:
    if cache is not None:
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="trimserve-agent-") as directory:
        yield Path(directory)


def _usage(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)
