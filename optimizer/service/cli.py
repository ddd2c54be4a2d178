"""`trimserve service`: the service, a worker on its own, keys, and the schema of its database.

What serves and runs is imported when a command runs, so that its help is quick and there whatever
is installed.
"""

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from optimizer.cli import RayBuildCpus, RayMeasure, RayOption, cluster_of
from optimizer.execution.cluster import MEASURE_RESOURCE
from optimizer.service import keys_cli
from optimizer.service.exits import check_installed, database_at, made_folder, refusals, usage
from optimizer.service.options import (
    AllowAgent,
    AllowFactory,
    AllowPt2,
    AllowStore,
    ArtifactsOption,
    BlobsOption,
    Data,
    DatabaseOption,
    Format,
    JobDisk,
    LogFormat,
    MemoryLimit,
    RepositoryOption,
    StoredQuota,
    StoreOption,
)

_FUNCTIONS = re.compile(r"[\w.*?]+:[\w.*?]+")

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


app = typer.Typer(
    name="service",
    help=HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(keys_cli.app)


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
    check_installed()
    from optimizer.service.app import Settings
    from optimizer.service.auth import Oidc
    from optimizer.service.operations import Quotas
    from optimizer.service.processes import Listening, run_service
    from optimizer.service.uploads import Limits

    _log_as(log_format)
    given = [oidc_issuer, oidc_audience, oidc_jwks]
    if any(given) and not all(given):
        usage("--oidc-issuer, --oidc-audience and --oidc-jwks: want all three or none")
    oidc = Oidc(oidc_issuer, oidc_audience, oidc_jwks) if oidc_issuer else None  # type: ignore[arg-type]
    is_open = not keys and oidc is None
    if is_open and not _is_loopback(host):
        usage(
            f"--host {host}: whoever reaches it could run jobs; want --keys or --oidc-issuer, "
            "or a loopback address"
        )
    if (tls_cert is None) != (tls_key is None):
        usage("--tls-cert and --tls-key: want both or none")
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
    made_folder("--data", data)
    with refusals(stores="--blobs or --repository"):
        run_service(settings, Listening(host, port, grpc, tls), workers, arguments)


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
    check_installed()
    from optimizer.service.processes import Workplace, run_worker
    from optimizer.service.running import ChildLimits
    from optimizer.service.worker import WorkerOptions

    _log_as(log_format)
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
    place = Workplace(
        database_at(database, data), blobs or str(data / "blobs"), _stores(allow_store or []),
        metrics_port,
    )  # fmt: skip
    with refusals():
        run_worker(options, place)


@app.command("migrate")
def migrate_command(
    database: DatabaseOption = None,
    data: Data = Path(".trimserve", "service"),
    revision: Annotated[
        str, typer.Option(help="`head` for today's tables, or an older revision to go back to.")
    ] = "head",
) -> None:
    """Bring the database's tables up to date (the service does it when it starts), or back."""
    check_installed()
    with refusals():
        from optimizer.service.database import Database

        opened = Database(database_at(database, data))
        opened.migrate(revision)
    typer.echo(f"{opened.shown}: {revision}")


def _log_as(log_format: LogFormat) -> None:
    from serve import logs

    logs.configure(_chosen(log_format), "info")


def _chosen(log_format: LogFormat) -> str:
    if log_format is LogFormat.AUTO:
        return "text" if sys.stderr.isatty() else "json"
    return log_format.value


def _login_client(client_id: str | None, public_url: str | None, has_provider: bool) -> Any:
    from optimizer.service.provider_login import LoginClient, is_safe

    secret = os.environ.pop("TRIMSERVE_OIDC_CLIENT_SECRET", None) or None
    if client_id is None and public_url is None:
        return None
    if client_id is None or public_url is None or not has_provider:
        usage("--oidc-client-id and --public-url: want both, with --oidc-issuer")
    if not is_safe(public_url) or "?" in public_url or "#" in public_url:
        usage(f"--public-url: got {public_url!r}, want an https address, or one of this machine")
    return LoginClient(client_id, secret, public_url)


def _policy(
    stores: Sequence[str] | None,
    factories: Sequence[str] | None,
    agents: Sequence[str] | None,
    pt2: bool,
    max_job_s: float,
) -> Any:
    from optimizer.service.submitted import Policy

    for pattern in factories or ():
        if not _FUNCTIONS.fullmatch(pattern):
            usage(f"--allow-factory: got {pattern!r}, want MODULE:FUNCTION, * and ? allowed")
    return Policy(
        _stores(stores or []), tuple(factories or ()), tuple(agents or ()), pt2, max_job_s
    )


def _stores(allowed: Sequence[str]) -> Any:
    from optimizer.service.addresses import AddressRefused, Stores

    try:
        return Stores(allowed)
    except AddressRefused as error:
        usage(f"--allow-store: {error}")


def _repositories(given: Sequence[str] | None) -> dict[str, Path | str]:
    from optimizer.service.object_store import without_credentials

    found: dict[str, Path | str] = {}
    for text in given or ():
        name, _, where = text.partition("=")
        if not name or not where:
            shown = without_credentials(text)
            usage(f"--repository: got {shown!r}, want NAME=DIR or NAME=s3://BUCKET/PREFIX")
        found[name] = where if "://" in where else Path(where).absolute()
    return found


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
