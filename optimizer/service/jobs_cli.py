"""`trimserve jobs`: a service's jobs from the command line.

Files that a spec names are uploaded on the way, so that a spec which `trimserve optimize` takes can
be submitted as it is.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from optimizer.client import Client

EXIT_DONE, EXIT_NEGATIVE, EXIT_USAGE, EXIT_INCONCLUSIVE, EXIT_INTERNAL = 0, 1, 2, 3, 70
# How a job ended -> the exit code that the command itself would have had.
EXIT_CODES: Mapping[str, int] = {
    "met": EXIT_DONE,
    "unverified": EXIT_DONE,
    "infeasible": EXIT_NEGATIVE,
    "violated": EXIT_NEGATIVE,
    "inconclusive": EXIT_INCONCLUSIVE,
}
DEFAULT_URL = "http://127.0.0.1:8020"

HELP = f"""\
Submit jobs to a `trimserve service`, and follow them.

The service is at `--url` or `TRIMSERVE_SERVICE_URL` ({DEFAULT_URL} without), the API key in
`TRIMSERVE_SERVICE_KEY`, never on the command line.

**Examples**

`trimserve jobs submit spec.yaml --follow` uploads the files that the spec names, submits it, shows
what happens, and ends with the exit code that `trimserve optimize` would have.

`trimserve jobs list --state running`

`trimserve jobs clone ID --set budget.trials=40 --follow`

`trimserve jobs publish ID --to production`
"""

Url = Annotated[
    str, typer.Option(metavar="URL", envvar="TRIMSERVE_SERVICE_URL", help="The service.")
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's id.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Follow = Annotated[bool, typer.Option("--follow", help="Show what happens until it has ended.")]
Key = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Idempotency key: sent twice, it is one job."),
]

app = typer.Typer(
    name="jobs",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command("submit", no_args_is_help=True)
def submit(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The spec, a YAML file.")],
    url: Url = DEFAULT_URL,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Again for more.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Put the best variants to the real server.")] = True,
    key: Key = None,
    follow: Follow = False,
) -> None:
    """Submit a spec, with the files that it names."""
    from loadtest.document import read_mapping

    labels = _pairs("--label", label)
    document = _with_slo(read_mapping(spec), spec.absolute().parent)
    files = _named_files(document, spec.absolute().parent)
    with _client(url) as client:
        body = _with_uploads(document, _uploaded(client, files))
        job = client.submit(body, labels=labels, verify=verify, key=key)
        _submitted(client, job, follow)


@app.command("list")
def list_jobs(
    url: Url = DEFAULT_URL,
    state: Annotated[list[str] | None, typer.Option(help="Again for more.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Again for more.")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Whose.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Jobs, the newest first."""
    from itertools import islice

    from rich.console import Console
    from rich.table import Table

    with _client(url) as client:
        query = {"state": state, "label": label, "owner": owner, "limit": min(limit, 500)}
        found = list(islice(client.jobs(**query), limit))
    if as_json:
        _print_json(found)
        return
    table = Table("id", "model", "state", "outcome", "owner", "created", box=None)
    for job in found:
        table.add_row(
            job["id"], job["name"], job["state"], job["outcome"] or "", job["owner"],
            job["created_at"][:19].replace("T", " "),
        )  # fmt: skip
    Console().print(table)


@app.command("show", no_args_is_help=True)
def show(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """A job with its spec and progress, as JSON."""
    with _client(url) as client:
        _print_json(client.job(job_id))


@app.command("follow", no_args_is_help=True)
def follow_job(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Show what happens to a job until it has ended; the exit code is that of its outcome."""
    with _client(url) as client:
        raise typer.Exit(_followed(client, job_id))


@app.command("logs", no_args_is_help=True)
def logs(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """What a job's process has printed."""
    with _client(url) as client:
        sys.stdout.write(client.logs(job_id))


@app.command("cancel", no_args_is_help=True)
def cancel(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Stop a job."""
    with _client(url) as client:
        typer.echo(client.cancel(job_id)["state"])


@app.command("retry", no_args_is_help=True)
def retry(job_id: JobId, url: Url = DEFAULT_URL, follow: Follow = False) -> None:
    """Run an ended job again."""
    with _client(url) as client:
        _submitted(client, client.retry(job_id), follow)


@app.command("clone", no_args_is_help=True)
def clone(
    job_id: JobId,
    url: Url = DEFAULT_URL,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.KEY=VALUE", help="VALUE is JSON; again for more."),
    ] = None,
    key: Key = None,
    follow: Follow = False,
) -> None:
    """A new job with the spec of another, changed."""
    with _client(url) as client:
        _submitted(client, client.clone(job_id, _changes(changes or []), key), follow)


@app.command("delete", no_args_is_help=True)
def delete(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Delete an ended job and what it made; what was published stays."""
    with _client(url) as client:
        client.delete(job_id)


@app.command("result", no_args_is_help=True)
def result(
    job_id: JobId,
    url: Url = DEFAULT_URL,
    html: Annotated[bool, typer.Option("--html", help="The report instead of JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Instead of printing it.")
    ] = None,
) -> None:
    """What a job found."""
    with _client(url) as client:
        content = client.report(job_id) if html else client.result(job_id)
    if output is None:
        sys.stdout.buffer.write(content)
    else:
        output.write_bytes(content)


@app.command("publish", no_args_is_help=True)
def publish(
    job_id: JobId,
    to: Annotated[str, typer.Option(metavar="NAME", help="A repository of the service's.")],
    model: Annotated[str | None, typer.Option(help="Its name there; its own without.")] = None,
    load_test: Annotated[
        bool, typer.Option("--load-test", help="Then put it under the load of its SLO.")
    ] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Publish what a job found to a serving repository."""
    with _client(url) as client:
        done = client.publish(job_id, to, model)
        typer.echo(f"{done['repository']}/{done['model']}/{done['version']}")
        if load_test:
            raise typer.Exit(_followed(client, client.load_test(done["id"])["id"]))


# --- specs and their files


_FILE_KEYS = frozenset({"onnx", "weights", "exported", "path", "tokenizer"})
Place = tuple[str | int, ...]
"""Where a value is in a spec."""


def _with_slo(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The spec with its SLO inside."""
    from loadtest.document import read_mapping

    slo = document.get("slo")
    if isinstance(slo, str):
        slo = read_mapping(folder / os.path.expandvars(slo))
    return {**document, "slo": slo}


def _named_files(document: Mapping[str, Any], folder: Path) -> dict[Place, Path]:
    """The files that the spec names to be uploaded, all of which are there."""
    return {
        place: _existing(place, folder / os.path.expandvars(value))
        for place, key, value in _values(document)
        if place[0] != "slo" and key in _FILE_KEYS and not _is_elsewhere(value)
    }


def _values(value: Any, place: Place = (), key: str = "") -> Iterator[tuple[Place, str, Any]]:
    """Every value that isn't made of others, with its place and the key that it belongs to."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _values(one, (*place, name), name)
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _values(one, (*place, index), key)
    else:
        yield place, key, value


def _is_elsewhere(value: Any) -> bool:
    return not isinstance(value, str) or "://" in value or value.startswith("upload:")


def _existing(place: Place, path: Path) -> Path:
    if not path.is_file():
        what = "a folder, which can't be uploaded: name it as file:///..." if path.is_dir() else (
            "no file"
        )  # fmt: skip
        _usage(f"{'.'.join(map(str, place))}: {path} is {what}")
    return path.resolve()


def _uploaded(client: "Client", files: Mapping[Place, Path]) -> dict[Place, str]:
    """What the spec names each file by once it is uploaded."""
    held: dict[Path, str] = {}
    for path in files.values():
        if path not in held:
            typer.echo(f"uploading {path.name} ({path.stat().st_size:,} bytes)", err=True)
            held[path] = client.upload(path)
    return {place: held[path] for place, path in files.items()}


def _with_uploads(value: Any, uploads: Mapping[Place, str], place: Place = ()) -> Any:
    if isinstance(value, dict):
        return {name: _with_uploads(one, uploads, (*place, name)) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_uploads(one, uploads, (*place, i)) for i, one in enumerate(value)]
    return uploads.get(place, value)


# --- the rest


def _submitted(client: "Client", job: Mapping[str, Any], follow: bool) -> None:
    typer.echo(job["id"])
    if follow:
        raise typer.Exit(_followed(client, job["id"]))


def _followed(client: "Client", job_id: str) -> int:
    from rich.console import Console

    console = Console(stderr=True)
    for event in client.follow(job_id):
        line = _line(event["kind"], event["payload"])
        if line:
            console.print(f"{event['at'][11:19]}  {line}", markup=False, soft_wrap=True)
    job = client.job(job_id)["job"]
    if job["state"] == "succeeded":
        return EXIT_CODES.get(job["outcome"], EXIT_INTERNAL)
    return EXIT_USAGE if job["state"] == "failed" else 130


def _line(kind: str, payload: Mapping[str, Any]) -> str:
    """An event as a line for people, empty for those that would only be noise."""
    if kind == "state":
        extra = payload.get("outcome") or payload.get("error") or payload.get("worker") or ""
        return f"{payload['state']}  {extra}".rstrip()
    if kind == "phase":
        return f"{payload['name']} …"
    if kind == "trial_ended":
        variant = payload["variant"]
        reasons = "; ".join(variant["reasons"])
        sign = "✗" if reasons else "✓"
        return f"{sign} {variant['label']}" + (f": {reasons}" if reasons else "")
    if kind == "verification":
        return f"load test of {payload['label']}, {payload['window_s']:g} s"
    if kind == "note":
        return f"note: {payload['message']}"
    return ""


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    found = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator or not name:
            _usage(f"{option}: got {text!r}, want NAME=VALUE")
        found[name] = value
    return found


def _changes(texts: list[str]) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}; what isn't JSON is a text."""
    changes: dict[str, Any] = {}
    for path, text in _pairs("--set", texts).items():
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *parents, last = path.split(".")
        inner = changes
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                _usage(f"--set: got {path} and a value of {parent}, want one of them")
        inner[last] = value
    return changes


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


@contextmanager
def _client(url: str) -> "Iterator[Client]":
    from optimizer.client import Client, ServiceError, Unreachable

    try:
        made = Client(url, os.environ.get("TRIMSERVE_SERVICE_KEY"))
    except ValueError as error:
        _usage(f"--url: {error}")
    with made as client:
        try:
            yield client
        except ServiceError as error:
            _usage(str(error))
        except Unreachable as error:
            _usage(f"no service answers at {error}")


def _usage(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)
