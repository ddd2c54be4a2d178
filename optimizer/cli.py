"""The command `trimserve optimize`: arguments in, progress, tables and an exit code out.

What searches is imported when the command runs, so that its help is quick and there whatever is
installed.
"""

import importlib
import importlib.util
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from optimizer.execution.cluster import MEASURE_RESOURCE, Cluster

if TYPE_CHECKING:
    from optimizer.result import Outcome, StudyResult

EXIT_DONE, EXIT_USAGE, EXIT_INTERNAL, EXIT_INTERRUPTED = 0, 2, 70, 130
EXIT_CODES: "Mapping[Outcome, int]" = {
    "met": 0,
    "unverified": 0,
    "infeasible": 1,
    "inconclusive": 3,
}
# What a study imports beyond the base install, all of it in the extra `optimizer`.
_NEEDED = ("optuna", "onnx", "torch", "plotly", "jinja2")
_NEEDED_TO_VERIFY = "locust"
_DEFAULT_STORE = str(Path(".trimserve", "store.sqlite"))

HELP = """\
Find the cheapest variant of a model that keeps its SLO, and publish it.

SPEC is a YAML file that names the model, the data, the SLO, the budget and the price of the
machine. Variants (engines, precisions, quantization, techniques of your own) are built, checked
against the model they come from, timed on this machine, by the agent that the spec names or on a
node of a Ray cluster, and compared in accuracy. What is out is dropped as early as can be, with its
reason. The best by prediction are then put to the real server under the SLO's load, and the first
that keeps it is published to the repository as the model's next version. Otherwise the repository
stays as it was.

What was measured and tried is kept in the store: after an interruption, kill -9 too, the same
command continues, and for another SLO it starts from what is known.

**Exit code**: 0 published, 1 nothing feasible (the table says which constraint binds, and what
giving way would buy), 2 for what to mend (spec, store, report, agent), 3 inconclusive (too few
samples, a load test that proved nothing, or a budget that ended before every baseline was tried),
70 an internal error, 130 interrupted.

**Examples**

`trimserve optimize examples/digits/spec.yaml --repository models`

`trimserve optimize spec.yaml --repository models --html report.html --json result.json`

`trimserve optimize spec.yaml --repository models --no-verify` publishes what is predicted to
keep the SLO, without a load test: quick, and marked *unverified*.

`trimserve optimize spec.yaml --repository models --from-report report.json` learns from a load
test's verdict what the server itself costs, and searches again.

`trimserve serve --repository models` serves what came out; `trimserve explain NAME` tells where it
comes from.
"""

RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        envvar="TRIMSERVE_RAY",
        help="Build and measure on the nodes of the Ray cluster with this head; this machine is "
        "one of them.",
    ),
]
RayBuildCpus = Annotated[
    int,
    typer.Option(
        min=1,
        max=4096,
        metavar="N",
        envvar="TRIMSERVE_RAY_BUILD_CPUS",
        help="With --ray: CPUs of each build.",
    ),
]
RayMeasure = Annotated[
    str,
    typer.Option(
        metavar="RESOURCE",
        envvar="TRIMSERVE_RAY_MEASURE",
        help="With --ray: the custom resource that marks nodes of the target's kind. One that "
        "measures is had whole.",
    ),
]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command("optimize", help=HELP, no_args_is_help=True)
def optimize_command(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The spec, a YAML file.")],
    repository: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Model repository to publish to; made if need be."),
    ],
    store: Annotated[
        str,
        typer.Option(
            metavar="FILE|URL",
            help="Store of variants and measurements: a file, made if need be, or "
            "postgresql://USER@HOST/DATABASE.",
        ),
    ] = _DEFAULT_STORE,
    artifacts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the store's artifacts; beside its file by default, and must with "
            "PostgreSQL.",
        ),
    ] = None,
    trials_at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            metavar="N",
            help="Trials that are proposed together and run at the same time, as far as there are "
            "cores; before the spec's budget.trials_at_once.",
        ),
    ] = None,
    ray: RayOption = None,
    ray_build_cpus: RayBuildCpus = 1,
    ray_measure: RayMeasure = MEASURE_RESOURCE,
    from_report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A load test's JSON report of a version in the repository: the search takes what "
            "it says of the server's own cost into account.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the report as one HTML page."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(help="Put the best variants to the real server under load."),
    ] = True,
) -> None:
    _check_installed(verify)
    _check_writable(json_file, html_file)
    if "://" not in store and Path(store).is_dir():
        _usage(f"--store: {store} is a directory, want a file")
    if from_report is not None and not from_report.is_file():
        _usage(f"--from-report: {from_report} is no file, want the JSON report of a load test")
    cluster = cluster_of(ray, ray_build_cpus, ray_measure)
    console = Console(stderr=True)
    with _interrupted_by_sigterm():
        result = _run(
            spec, repository, store, artifacts, trials_at_once, cluster, from_report, verify,
            console,
        )  # fmt: skip
    _write(result, json_file, html_file)
    _print(result, repository, json_file, html_file)
    raise typer.Exit(EXIT_CODES[result.outcome])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trimserve optimize` alone; returns its exit code."""
    from loadtest.document import DocumentInvalid
    from optimizer.errors import MeasurerUnavailable, SpecInvalid
    from optimizer.execution import NoExecutor
    from serve.engines import EngineUnavailable
    from serve.errors import ArtifactInvalid

    try:
        app(args=None if argv is None else list(argv), prog_name="trimserve optimize")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_DONE
    except (
        ArtifactInvalid, DocumentInvalid, EngineUnavailable, MeasurerUnavailable, NoExecutor,
        OSError, SpecInvalid,
    ) as error:  # fmt: skip
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001 - the process boundary: the trace helps, the code is ours
        traceback.print_exc()
        return EXIT_INTERNAL
    return EXIT_DONE


def _run(
    spec: Path,
    repository: Path,
    store: str,
    artifacts: Path | None,
    trials_at_once: int | None,
    cluster: Cluster | None,
    from_report: Path | None,
    verify: bool,
    console: Console,
) -> "StudyResult":
    from optimizer.evidence import EvidenceInvalid
    from optimizer.progress import Progress
    from optimizer.store import StoreInvalid, without_password
    from optimizer.study import Options, optimize

    command = ["trimserve", "optimize", str(spec), "--repository", str(repository)]
    command += ["--store", without_password(store)] if store != _DEFAULT_STORE else []
    command += ["--artifacts", str(artifacts)] if artifacts is not None else []
    command += ["--trials-at-once", str(trials_at_once)] if trials_at_once is not None else []
    command += [] if cluster is None else ray_arguments(cluster)
    command += ["--from-report", str(from_report)] if from_report is not None else []
    command += [] if verify else ["--no-verify"]
    with Progress(console) as progress:
        options = Options(
            store=store if "://" in store else Path(store),
            artifacts=artifacts,
            verify=verify,
            observer=progress,
            command=tuple(command),
            trials_at_once=trials_at_once,
            cluster=cluster,
            from_report=from_report,
        )
        try:
            return optimize(spec, repository, options)
        except StoreInvalid as error:
            raise OSError(f"--store: {error}") from error
        except EvidenceInvalid as error:
            raise OSError(f"--from-report: {error}") from error


def cluster_of(address: str | None, build_cpus: int, measure_resource: str) -> Cluster | None:
    """What the options name; exits with 2 for values that are none."""
    if address is None:
        if (build_cpus, measure_resource) != (1, MEASURE_RESOURCE):
            _usage("--ray-build-cpus and --ray-measure: want --ray with them")
        return None
    cluster = Cluster(address, build_cpus, measure_resource)
    options = {"address": "--ray", "measure_resource": "--ray-measure"}
    for problem in cluster.problems():
        name, _, rest = problem.partition(":")
        _usage(f"{options.get(name, name)}:{rest}")
    if not importlib.util.find_spec("ray"):
        _usage("--ray: ray missing: pip install 'trimserve[distributed]'")
    return cluster


def ray_arguments(cluster: Cluster) -> list[str]:
    """The options that name the cluster."""
    default = Cluster(cluster.address)
    arguments = ["--ray", cluster.address]
    if cluster.build_cpus != default.build_cpus:
        arguments += ["--ray-build-cpus", str(cluster.build_cpus)]
    if cluster.measure_resource != default.measure_resource:
        arguments += ["--ray-measure", cluster.measure_resource]
    return arguments


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does, so that its server and load test end with it."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_installed(verify: bool) -> None:
    """Say what to install rather than fail in the middle."""
    # Locust patches the process that imports it, so it is only looked for.
    wanted = dict.fromkeys(_NEEDED, "optimizer")
    wanted |= {_NEEDED_TO_VERIFY: "loadtest"} if verify else {}
    missing = {name: extra for name, extra in wanted.items() if not importlib.util.find_spec(name)}
    if missing:
        extras = ",".join(dict.fromkeys(missing.values()))
        hint = "; --no-verify needs no load test" if "loadtest" in missing.values() else ""
        _usage(f"{', '.join(missing)} missing: pip install 'trimserve[{extras}]'{hint}")
    # Torch is the worker's; importing it here would cost seconds and memory for nothing.
    for name in _NEEDED:
        if name == "torch":
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            _usage(f"{name} can't be imported ({error}): pip install 'trimserve[optimizer]'")


def _check_writable(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            _usage(f"{file}: there is no directory {file.absolute().parent}")


def _usage(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)


def _write(result: "StudyResult", json_file: Path | None, html_file: Path | None) -> None:
    from optimizer.report import render_html
    from optimizer.result import to_json

    if json_file is not None:
        json_file.write_text(to_json(result), "utf-8")
    if html_file is not None:
        html_file.write_text(render_html(result), "utf-8")


def _print(
    result: "StudyResult", repository: Path, json_file: Path | None, html_file: Path | None
) -> None:
    from optimizer.report import print_table

    console = Console()
    print_table(result, console)
    chosen = result.chosen
    if chosen is not None:
        console.print(f"published: {repository / result.model / chosen.version}", soft_wrap=True)
    for what, file in (("JSON", json_file), ("report", html_file)):
        if file is not None:
            console.print(f"{what}: {file}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
