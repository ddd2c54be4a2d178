"""`trimserve service`: the service, a worker on its own, keys, and the schema of its database.

What serves and runs is imported when a command runs, so that its help is quick and there whatever
is installed.
"""

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from optimizer.cli import RayBuildCpus, RayMeasure, RayOption, cluster_of
from optimizer.execution.cluster import MEASURE_RESOURCE

if TYPE_CHECKING:
    from optimizer.service.app import Settings
    from optimizer.service.telemetry import Telemetry
    from optimizer.service.worker import WorkerOptions

EXIT_USAGE = 2
_NEEDED = ("alembic", "authlib", "jinja2", "jwt", "psutil", "requests", "sqlalchemy", "urllib3")

HELP = """\
Run optimization jobs as a service.

`trimserve service` alone starts everything on this machine: REST on port 8020, gRPC
on 8021, one worker, and a folder (`--data`) that holds database, uploads, results and the store of
studies. What it has accepted outlives a crash: jobs of a worker that dies go back to the queue and
go on from what their study has measured.

To grow, give all processes the same `--database postgresql://...`, `--blobs s3://...`, `--store`
and `--artifacts`, start the service with `--workers 0`, and `trimserve service worker` where the
cores are.

**Who may call**: on loopback everybody who reaches it. Elsewhere `--keys` (make one by
`trimserve service key make NAME --scope submit`) or `--oidc-*`; without either it doesn't start.

**What jobs may name**: uploads, and addresses in stores that `--allow-store` names; functions that
`--allow-factory` names, `module:function` with `*`. Everything else is refused.
"""


class LogFormat(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


Data = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder of everything that has no place of its own.")
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        envvar="TRIMSERVE_SERVICE_DATABASE",
        help="Jobs: a SQLite file (DATA/jobs.sqlite), or postgresql://USER@HOST/DATABASE.",
    ),
]
BlobsOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|URL", help="Uploads and results: a folder (DATA/blobs), or s3://BUCKET/PREFIX."
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        envvar="TRIMSERVE_STORE",
        help="Store of all studies, as of `trimserve optimize` (DATA/store.sqlite).",
    ),
]
ArtifactsOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the store's artifacts.")
]
RepositoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--repository",
        metavar="NAME=DIR|URL",
        help="A serving repository that jobs can be published to, a folder or s3://BUCKET/PREFIX; "
        "again for more.",
    ),
]
AllowStore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL",
        help="What addresses in specs may begin with: s3://BUCKET/PREFIX, https://HOST/PATH, "
        "file:///DIR; again for more.",
    ),
]
AllowFactory = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Functions that specs may name, * and ? allowed; again for more.",
    ),
]
AllowAgent = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="Measuring agents that specs may name; again for more."),
]
AllowPt2 = Annotated[
    bool,
    typer.Option(help="Take .pt2 archives, which can carry code that the job's process runs."),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(min=0.1, metavar="GB", help="Of a job with all its processes; then it's ended."),
]
JobDisk = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="GB",
        help="Of a job: its files, and what it adds to the store of studies; then it's ended.",
    ),
]
StoredQuota = Annotated[
    float | None,
    typer.Option(min=0.001, metavar="GB", help="Files that all jobs of one owner keep."),
]
Format = Annotated[LogFormat, typer.Option(help="auto: text on a terminal, else JSON lines.")]

app = typer.Typer(
    name="service",
    help=HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
key_app = typer.Typer(name="key", help="API keys.", no_args_is_help=True)
app.add_typer(key_app)


@app.command("run", help="The service, as by `trimserve service` alone.")
def run_command(
    data: Data = Path(".trimserve", "service"),
    database: DatabaseOption = None,
    blobs: BlobsOption = None,
    store: StoreOption = None,
    artifacts: ArtifactsOption = None,
    repository: RepositoryOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="REST; 0: any.")] = 8020,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="gRPC; 0: any. One above --port without.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key, PEM.")] = None,
    workers: Annotated[
        int, typer.Option(min=0, max=64, help="Worker processes to start beside it.")
    ] = 1,
    keys: Annotated[bool, typer.Option("--keys", help="Ask callers for an API key.")] = False,
    oidc_issuer: Annotated[str | None, typer.Option(metavar="URL", help="OpenID provider.")] = None,
    oidc_audience: Annotated[
        str | None, typer.Option(help="Audience that tokens must name.")
    ] = None,
    oidc_jwks: Annotated[
        str | None, typer.Option(metavar="URL", help="The provider's keys (jwks_uri).")
    ] = None,
    oidc_client_id: Annotated[
        str | None,
        typer.Option(
            help="Log in to the page at the provider, as this client of it; its secret, if it has "
            "one, is in TRIMSERVE_OIDC_CLIENT_SECRET."
        ),
    ] = None,
    public_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where browsers reach the service; they come back to "
            "URL/login/provider, which the provider has to know.",
        ),
    ] = None,
    allow_store: AllowStore = None,
    allow_factory: AllowFactory = None,
    allow_agent: AllowAgent = None,
    allow_pt2: AllowPt2 = False,
    memory_limit_gb: MemoryLimit = None,
    job_disk_gb: JobDisk = None,
    stored_quota_gb: StoredQuota = None,
    max_job_s: Annotated[
        float, typer.Option(min=1, help="A spec's budget.wall_clock_s may be at most this.")
    ] = 86_400,
    max_open_jobs: Annotated[
        int, typer.Option(min=1, help="Jobs of one owner that are queued or running.")
    ] = 100,
    max_running_jobs: Annotated[
        int | None, typer.Option(min=1, help="Jobs of one owner that run.")
    ] = None,
    upload_quota_gb: Annotated[
        float, typer.Option(min=0.001, help="All uploads of one owner.")
    ] = 20,
    keep_days: Annotated[
        float | None, typer.Option(min=0, help="Ended jobs are deleted after that.")
    ] = None,
    log_format: Format = LogFormat.AUTO,
) -> None:
    """Everything on one machine, or the front end of many."""
    from optimizer.service.app import Settings
    from optimizer.service.auth import Oidc
    from optimizer.service.operations import Quotas
    from optimizer.service.uploads import Limits

    _prepare(log_format)
    given = [oidc_issuer, oidc_audience, oidc_jwks]
    if any(given) and not all(given):
        _usage("--oidc-issuer, --oidc-audience and --oidc-jwks: want all three or none")
    oidc = Oidc(oidc_issuer, oidc_audience, oidc_jwks) if oidc_issuer else None  # type: ignore[arg-type]
    is_open = not keys and oidc is None
    if is_open and not _is_loopback(host):
        _usage(
            f"--host {host}: whoever reaches it could run jobs; want --keys or --oidc-issuer, "
            "or a loopback address"
        )
    if (tls_cert is None) != (tls_key is None):
        _usage("--tls-cert and --tls-key: want both or none")
    settings = Settings(
        database=database or str(data / "jobs.sqlite"),
        blobs=blobs or str(data / "blobs"),
        scratch=data / "scratch",
        repositories=_repositories(repository),
        policy=_policy(allow_store, allow_factory, allow_agent, allow_pt2, max_job_s),
        quotas=Quotas(max_open_jobs, _bytes(stored_quota_gb)),
        upload_limits=Limits(owner_bytes=int(upload_quota_gb * 1e9), pt2=allow_pt2),
        keys=keys,
        oidc=oidc,
        login=_login_client(oidc_client_id, public_url, oidc is not None),
        keep_s=None if keep_days is None else keep_days * 86_400,
        hosts=frozenset({"localhost", "127.0.0.1", "::1", host}) if is_open else None,
    )
    data.mkdir(parents=True, exist_ok=True)
    arguments = ["--data", str(data), "--database", settings.database, "--blobs", settings.blobs]
    arguments += _options("--store", store) + _options("--artifacts", artifacts)
    arguments += [part for one in repository or () for part in ("--repository", one)]
    arguments += [part for one in allow_store or () for part in ("--allow-store", one)]
    arguments += _options("--memory-limit-gb", memory_limit_gb)
    arguments += _options("--job-disk-gb", job_disk_gb)
    arguments += _options("--stored-quota-gb", stored_quota_gb)
    arguments += _options("--max-running-jobs", max_running_jobs)
    arguments += ["--log-format", _chosen(log_format)]
    tls = (tls_cert, tls_key) if tls_cert is not None and tls_key is not None else None
    grpc = grpc_port if grpc_port is not None else (port + 1 if port else 0)
    with _workers(workers, arguments):
        _serve(settings, host, port, grpc, tls)


@app.command("worker")
def worker_command(
    data: Data = Path(".trimserve", "service"),
    database: DatabaseOption = None,
    blobs: BlobsOption = None,
    store: StoreOption = None,
    artifacts: ArtifactsOption = None,
    repository: RepositoryOption = None,
    name: Annotated[
        str | None, typer.Option(help="Its name among the workers: host and process without.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the job under way (DATA/work)."),
    ] = None,
    allow_store: AllowStore = None,
    memory_limit_gb: MemoryLimit = None,
    job_disk_gb: JobDisk = None,
    stored_quota_gb: StoredQuota = None,
    max_running_jobs: Annotated[
        int | None, typer.Option(min=1, help="Jobs of one owner that run, over all workers.")
    ] = None,
    ray: RayOption = None,
    ray_build_cpus: RayBuildCpus = 1,
    ray_measure: RayMeasure = MEASURE_RESOURCE,
    lease_s: Annotated[
        float,
        typer.Option(min=2, max=600, help="A worker that is silent for so long has lost its job."),
    ] = 15,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Prometheus' metrics; 0: any.")
    ] = None,
    log_format: Format = LogFormat.AUTO,
) -> None:
    """Take jobs and run them, one at a time, each in a process of its own.

    SIGTERM ends it in good order: the job under way goes back to the queue, and another worker
    goes on where it was."""
    from optimizer.service.running import ChildLimits
    from optimizer.service.worker import WorkerOptions

    _prepare(log_format)
    options = WorkerOptions(
        name=name or f"{socket.gethostname()}-{os.getpid()}",
        work=(work or data / "work").absolute(),
        store=store
        if store and "://" in store
        else str(Path(store or data / "store.sqlite").absolute()),
        artifacts=artifacts.absolute() if artifacts is not None else None,
        repositories=_repositories(repository),
        lease_s=lease_s,
        max_running=max_running_jobs,
        max_stored_bytes=_bytes(stored_quota_gb),
        limits=ChildLimits(
            memory_bytes=_bytes(memory_limit_gb),
            file_bytes=64 << 30,
            disk_bytes=_bytes(job_disk_gb),
        ),
        cluster=cluster_of(ray, ray_build_cpus, ray_measure),
    )
    _work(
        options, database or str(data / "jobs.sqlite"), blobs or str(data / "blobs"),
        allow_store or [], metrics_port,
    )  # fmt: skip


@app.command("migrate")
def migrate_command(
    database: DatabaseOption = None,
    data: Data = Path(".trimserve", "service"),
    revision: Annotated[
        str, typer.Option(help="`head` for today's tables, or an older revision to go back to.")
    ] = "head",
) -> None:
    """Bring the database's tables up to date (the service does it when it starts), or back."""
    _check_installed()
    from optimizer.service.database import Database

    opened = Database(database or str(data / "jobs.sqlite"))
    opened.migrate(revision)
    typer.echo(f"{opened.shown}: {revision}")


@key_app.command("make")
def make_key(
    name: Annotated[str, typer.Argument(help="Whose it is, as the audit names it.")],
    scope: Annotated[
        list[str], typer.Option(help="read, submit, publish or admin; again for more.")
    ],
    database: DatabaseOption = None,
    data: Data = Path(".trimserve", "service"),
    days: Annotated[float | None, typer.Option(min=0.01, help="How long it is good.")] = None,
) -> None:
    """Make an API key. Its text goes to standard output, this once."""
    from optimizer.service.auth import Keys, Scope

    allowed = [one.value for one in Scope]
    wrong = [one for one in scope if one not in allowed]
    if wrong:
        _usage(f"--scope: got {wrong[0]!r}, want {', '.join(allowed)}")
    keys = Keys(_migrated(database, data))
    scopes = {Scope(one) for one in scope}
    if Scope.SUBMIT in scopes or Scope.PUBLISH in scopes:
        scopes.add(Scope.READ)
    key, text = keys.make(name, scopes, None if days is None else days * 86_400)
    typer.echo(f"key {key.id} of {name}: {', '.join(sorted(scopes))}", err=True)
    typer.echo(text)


@key_app.command("list")
def list_keys(database: DatabaseOption = None, data: Data = Path(".trimserve", "service")) -> None:
    """The keys, without their texts, which nobody knows."""
    from optimizer.service.auth import Keys

    for key in Keys(_migrated(database, data)).all():
        state = "revoked" if key.revoked_s is not None else "good"
        if state == "good" and key.expires_s is not None:
            state = f"until {time.strftime('%Y-%m-%d', time.gmtime(key.expires_s))}"
        typer.echo(f"{key.id}  {key.name}  {','.join(sorted(key.scopes))}  {state}")


@key_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `list`.")],
    database: DatabaseOption = None,
    data: Data = Path(".trimserve", "service"),
) -> None:
    """A key that is good no more, at once."""
    from optimizer.service.auth import Keys

    if not Keys(_migrated(database, data)).revoke(key_id):
        _usage(f"there is no good key {key_id}")


# --- what the commands do


def _serve(
    settings: "Settings", host: str, port: int, grpc_port: int, tls: tuple[Path, Path] | None
) -> None:
    import asyncio

    from optimizer.service.app import make_parts
    from optimizer.service.object_store import StoreUnavailable
    from optimizer.service.server import serve

    with _telemetry("trimserve-service") as telemetry:
        try:
            parts = replace(make_parts(settings), telemetry=telemetry)
        except StoreUnavailable as error:
            _usage(f"--blobs or --repository: {error}")
        try:
            asyncio.run(serve(parts, settings, host, port, grpc_port, tls, _announce))
        finally:
            parts.database.close()


def _announce(ports: dict[str, int]) -> None:
    typer.echo(json.dumps(ports))
    sys.stdout.flush()


def _work(
    options: "WorkerOptions",
    database: str,
    blobs: str,
    allow_store: Sequence[str],
    metrics_port: int | None,
) -> None:
    from prometheus_client import start_http_server

    from optimizer.service.blobs import Blobs
    from optimizer.service.database import Database, DatabaseUnavailable
    from optimizer.service.ledger import Ledger
    from optimizer.service.metrics import PrometheusWorkerMetrics
    from optimizer.service.object_store import StoreUnavailable
    from optimizer.service.uploads import Limits, Uploads
    from optimizer.service.worker import Worker

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _end_with_parent(stop)
    opened = Database(database)
    while not stop.is_set():
        try:
            opened.migrate()
            break
        except DatabaseUnavailable as error:
            sys.stderr.write(f"waiting for the database: {error}\n")
            stop.wait(2.0)
    try:
        held = Blobs(blobs)
    except StoreUnavailable as error:
        _usage(f"--blobs: {error}")
    metrics = PrometheusWorkerMetrics()
    if metrics_port is not None:
        start_http_server(metrics_port, registry=metrics.registry)
    worker = Worker(
        Ledger(opened), Uploads(opened, held, Limits()), held, _stores(allow_store), options,
        os.environ, metrics,
    )  # fmt: skip
    with _telemetry("trimserve-worker"):
        worker.run(stop)
    opened.close()


@contextlib.contextmanager
def _telemetry(service: str) -> Iterator["Telemetry | None"]:
    from optimizer.service.telemetry import TelemetryUnusable, telemetry

    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(telemetry(os.environ, service))
        except TelemetryUnusable as error:
            _usage(str(error))
        yield made


@contextlib.contextmanager
def _workers(n: int, arguments: Sequence[str]) -> Iterator[None]:
    """Worker processes beside the service, started again where one dies, ended with it."""
    done = threading.Event()
    lifeline_out, lifeline_in = os.pipe()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-P", "-m", "trimserve", "service", "worker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(lifeline_out,),
            env={**os.environ, "TRIMSERVE_LIFELINE": str(lifeline_out)},
        )

    children = [start() for _ in range(n)]

    def watch() -> None:
        while not done.wait(1.0):
            for index, child in enumerate(children):
                if child.poll() is not None:
                    sys.stderr.write(f"a worker ended with {child.returncode}: starting another\n")
                    done.wait(1.0)
                    children[index] = start()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        for child in children:
            child.terminate()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(15.0)
            child.kill()
        os.close(lifeline_in)
        os.close(lifeline_out)


def _end_with_parent(stop: threading.Event) -> None:
    """A worker that the service has started ends with it, however that ends."""
    held = os.environ.pop("TRIMSERVE_LIFELINE", "")
    if not held.isdigit():
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(int(held), 1)
        stop.set()

    threading.Thread(target=wait, daemon=True).start()


def _prepare(log_format: LogFormat) -> None:
    _check_installed()
    from serve import logs

    logs.configure(_chosen(log_format), "info")


def _chosen(log_format: LogFormat) -> str:
    if log_format is LogFormat.AUTO:
        return "text" if sys.stderr.isatty() else "json"
    return log_format.value


def _check_installed() -> None:
    import importlib.util

    missing = [name for name in _NEEDED if not importlib.util.find_spec(name)]
    if missing:
        _usage(f"{', '.join(missing)} missing: pip install 'trimserve[service]'")


def _login_client(client_id: str | None, public_url: str | None, has_provider: bool) -> Any:
    from optimizer.service.provider_login import LoginClient, is_safe

    secret = os.environ.pop("TRIMSERVE_OIDC_CLIENT_SECRET", None) or None
    if client_id is None and public_url is None:
        return None
    if client_id is None or public_url is None or not has_provider:
        _usage("--oidc-client-id and --public-url: want both, with --oidc-issuer")
    if not is_safe(public_url) or "?" in public_url or "#" in public_url:
        _usage(f"--public-url: got {public_url!r}, want an https address, or one of this machine")
    return LoginClient(client_id, secret, public_url)


def _policy(
    stores: Sequence[str] | None,
    factories: Sequence[str] | None,
    agents: Sequence[str] | None,
    pt2: bool,
    max_job_s: float,
) -> Any:
    from optimizer.service.submitted import Policy

    return Policy(
        _stores(stores or []), tuple(factories or ()), tuple(agents or ()), pt2, max_job_s
    )


def _stores(allowed: Sequence[str]) -> Any:
    from optimizer.service.addresses import AddressRefused, Stores

    try:
        return Stores(allowed)
    except AddressRefused as error:
        _usage(f"--allow-store: {error}")


def _repositories(given: Sequence[str] | None) -> dict[str, Path | str]:
    from optimizer.service.object_store import without_credentials

    found: dict[str, Path | str] = {}
    for text in given or ():
        name, _, where = text.partition("=")
        if not name or not where:
            shown = without_credentials(text)
            _usage(f"--repository: got {shown!r}, want NAME=DIR or NAME=s3://BUCKET/PREFIX")
        found[name] = where if "://" in where else Path(where).absolute()
    return found


def _migrated(database: str | None, data: Path) -> Any:
    _check_installed()
    from optimizer.service.database import Database

    opened = Database(database or str(data / "jobs.sqlite"))
    opened.migrate()
    return opened


def _options(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _usage(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)
