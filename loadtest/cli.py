"""The command `trimserve loadtest`: arguments in, tables and an exit code out.

What tests and judges is imported when the command runs, so that its help is quick and there
whatever is installed.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loadtest import compare_cli
from loadtest.default_command import DefaultCommand
from loadtest.exits import EXIT_INTERNAL, EXIT_INTERRUPTED, exit_codes
from loadtest.rules_cli import HELP as RULES_HELP
from loadtest.rules_cli import write_rules
from loadtest.worker_cli import DEFAULT_BIND, MAX_WORKERS
from loadtest.worker_cli import HELP as WORKER_HELP
from loadtest.worker_cli import work as work_command

if TYPE_CHECKING:
    from loadtest.session import Settings, Watcher

HELP = """\
Send a model the load of an SLO and judge whether it keeps its promise.

SLO is the YAML file that also tells the optimizer and the server what to keep. Requests are sent
at its rate whatever the server does (an open loop), and their latency counts from the moment
they were meant to be sent, so a stalled server can't hide behind a waiting client. The server's
own counters of the same requests are compared with what was seen here.

**Verdict and exit code**: met 0 (a 95 % lower bound clears the objective), violated 1,
inconclusive 3 (too few requests, or a measurement that can't be trusted: the reasons say which).
2 is for what to mend before the first request, 70 an internal error, 130 interrupted.

**Examples**

`trimserve loadtest slo.yaml --target http://127.0.0.1:8000 --model resnet`

`trimserve loadtest slo.yaml --target http://127.0.0.1:8000 --model resnet --find-capacity
--html capacity.html`

`trimserve loadtest slo.yaml --target grpc://127.0.0.1:8001 --model resnet --html report.html`

`trimserve loadtest slo.yaml --target http://10.0.0.1:8000 --target http://10.0.0.2:8000
--model resnet --inputs images.npz --duration-s 120 --json report.json`

For a server that isn't trimserve (no such counters): `--no-server-metrics`.
"""

GROUP_HELP = """\
Judge a running server by its SLO, and make what watches it in production.

`trimserve loadtest SLO ...` is `trimserve loadtest run SLO ...`; all its options are shown by
`trimserve loadtest run --help`.

`trimserve loadtest slo.yaml --target http://127.0.0.1:8000 --model resnet --html report.html`

`trimserve loadtest rules slo.yaml --model resnet > rules.yaml`
"""

app = typer.Typer(
    cls=DefaultCommand,
    name="loadtest",
    help=GROUP_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


app.command("rules", help=RULES_HELP, no_args_is_help=True)(write_rules)


@app.callback()
def group() -> None:
    """There are no options before the command; this makes the commands a group."""


@app.command("run", help=HELP, no_args_is_help=True)
def loadtest(
    slo: Annotated[Path, typer.Argument(metavar="SLO", help="The SLO, a YAML file.")],
    target: Annotated[
        list[str],
        typer.Option(
            metavar="URL",
            help="http://HOST:PORT for REST or grpc://HOST:PORT for gRPC. Give it several times "
            "to spread the requests at random.",
        ),
    ],
    model: Annotated[str, typer.Option(help="Name of the model on the server.")],
    version: Annotated[
        str, typer.Option(help="Version of the model; by default the server chooses.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the report as one HTML page."),
    ] = None,
    junit_file: Annotated[
        Path | None,
        typer.Option(
            "--junit",
            metavar="FILE",
            help="Write the verdict as JUnit XML, a case for each objective; not with "
            "--find-capacity.",
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Real inputs: arrays [n, ...] named like the model's inputs. By default random "
            "ones.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Array [n] of --inputs with the class of each row: shows the accuracy under "
            "load, by the highest score of an output [rows, classes].",
        ),
    ] = None,
    label_output: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The output that --labels are of; by default the only one."
        ),
    ] = None,
    duration_s: Annotated[
        float | None,
        typer.Option(min=1, max=86_400, help="Measure this long; by default the SLO's window_s."),
    ] = None,
    warmup_s: Annotated[
        float,
        typer.Option(min=0, max=3_600, help="Send the same load this long before measuring."),
    ] = 2.0,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Arrivals that differ from the SLO's own: gamma bursts, Markov-modulated, a ramp, "
            "steps, spikes, a day's wave, or a recorded trace (docs/loadtest.md, Arrivals).",
        ),
    ] = None,
    chaos: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Kill, stop, pause or slow the server, or run commands, at given moments, and "
            "judge how long it takes to recover and what it loses (docs/loadtest.md, Chaos).",
        ),
    ] = None,
    closed_loop: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=60_000,
            help="N clients that each send when answered, in place of arrivals at the SLO's rate. "
            "They wait where the server stalls, so the verdict can't be met.",
        ),
    ] = None,
    find_capacity: Annotated[
        bool,
        typer.Option(
            "--find-capacity",
            help="Search for the highest rate that meets the SLO, from its rate on: some 17 "
            "measurements, each as long as --duration-s. Met if that rate is at least the SLO's.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, inputs and targets.")] = 0,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Where a server exports its metrics; by default port 8002 of each target's "
            "host. Give it once for each server.",
        ),
    ] = None,
    server_metrics: Annotated[
        bool,
        typer.Option(
            "--server-metrics/--no-server-metrics",
            help="Compare with the server's own counters.",
        ),
    ] = True,
    prometheus: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Take the server's counters from this Prometheus, which scrapes the server, "
            "at exactly the window's ends.",
        ),
    ] = None,
    drift_horizon_s: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=31_536_000,
            help="For a soak: inconclusive where latency or the server's memory grows so that it "
            "reaches its limit within this time after the window.",
        ),
    ] = None,
    max_memory_mb: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="The limit of the server's memory; by default twice what it has at the start.",
        ),
    ] = None,
    max_in_flight: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=60_000,
            help="Drop requests beyond this many unanswered ones; by default as many as can "
            "arrive within the time limit of a request, 8192 at most.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_WORKERS,
            help="Share the load among N processes of this machine.",
        ),
    ] = None,
    expect_workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_WORKERS,
            help="Share the load among N workers, started elsewhere by `trimserve loadtest "
            "worker`; waits for them for 10 minutes.",
        ),
    ] = None,
    bind: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where --expect-workers are awaited. Who connects there gets the load and is "
            "believed: let only the workers reach it.",
        ),
    ] = DEFAULT_BIND,
    web: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve Locust's web interface there while the test runs. Its figures are "
            "Locust's, rounded; the verdict's aren't.",
        ),
    ] = None,
) -> None:
    """See HELP; the function only translates arguments and outcomes."""
    with exit_codes():
        from loadtest.chaos.profile import read_chaos
        from loadtest.outputs import check_file
        from loadtest.profile import read_profile
        from loadtest.session import Settings, SettingsInvalid
        from loadtest.slo import read_slo
        from loadtest.target import parse_target
        from loadtest.worker_cli import check_address, choose_workers

        settings = Settings(
            slo=read_slo(slo),
            model=model,
            targets=tuple(parse_target(url) for url in target),
            version=version,
            inputs=inputs,
            labels=labels,
            closed_loop=closed_loop,
            label_output=label_output,
            duration_s=duration_s,
            warmup_s=warmup_s,
            seed=seed,
            metrics_urls=tuple(metrics_url or ()),
            server_metrics=server_metrics,
            prometheus=prometheus,
            drift_horizon_s=drift_horizon_s,
            max_memory_bytes=None if max_memory_mb is None else max_memory_mb * 1e6,
            max_in_flight=max_in_flight,
            profile=None if profile is None else read_profile(profile),
            workers=choose_workers(workers, expect_workers, bind),
            web=None if web is None else check_address("--web", web),
            chaos=None if chaos is None else read_chaos(chaos),
        )
        files = {"--json": json_file, "--html": html_file, "--junit": junit_file}
        for option, path in files.items():
            check_file(option, path)
        if find_capacity and junit_file is not None:
            raise SettingsInvalid("--junit: got it with --find-capacity, want --json or --html")
        if find_capacity and closed_loop is not None:
            raise SettingsInvalid("--closed-loop: got it with --find-capacity, want one of them")
        if find_capacity and chaos is not None:
            raise SettingsInvalid("--chaos: got it with --find-capacity, want one of them")
        if find_capacity:
            raise typer.Exit(search_and_report(settings, json_file, html_file))
        raise typer.Exit(test_and_report(settings, json_file, html_file, junit_file))


app.command("worker", help=WORKER_HELP, no_args_is_help=True)(work_command)
app.command("compare", help=compare_cli.HELP, no_args_is_help=True)(compare_cli.compare)


def test_and_report(
    settings: "Settings",
    json_file: Path | None,
    html_file: Path | None,
    junit_file: Path | None,
) -> int:
    """Run, write the reports, print the result; gives the exit code of the verdict."""
    from loadtest.display import print_plan, print_report
    from loadtest.report import make_report, to_json, write_atomically
    from loadtest.session import run

    console = Console(stderr=True)
    print_plan(settings, console)
    with progress(console) as watcher:
        result = run(settings, watcher)
    report = make_report(result, datetime.now(UTC))
    if json_file is not None:
        write_atomically(json_file, to_json(report))
    if html_file is not None:
        from loadtest.html import render_html

        write_atomically(html_file, render_html(report))
    if junit_file is not None:
        from loadtest.junit import to_junit

        write_atomically(junit_file, to_junit(report))
    print_report(report, Console())
    return report.exit_code


def search_and_report(settings: "Settings", json_file: Path | None, html_file: Path | None) -> int:
    """Search for the highest rate, write the reports, print the result; gives the exit code."""
    from loadtest.capacity_report import make_capacity_report
    from loadtest.capacity_run import run_capacity
    from loadtest.display import print_capacity, print_measured, print_search
    from loadtest.report import write_atomically

    console = Console(stderr=True)
    print_search(settings, console)
    with progress(console) as watcher:
        result = run_capacity(settings, watcher, lambda one: print_measured(one, console))
    report = make_capacity_report(result, datetime.now(UTC))
    if json_file is not None:
        write_atomically(json_file, report.model_dump_json(by_alias=True, indent=2) + "\n")
    if html_file is not None:
        from loadtest.capacity_html import render_capacity

        write_atomically(html_file, render_capacity(report))
    print_capacity(report, Console())
    return report.exit_code


@contextmanager
def progress(console: Console) -> "Iterator[Watcher]":
    """A progress bar, where there is a terminal to draw it on."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from loadtest.driver import Progress as Played
    from loadtest.session import Watcher

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=None, note="")

        def on_workers(n: int, n_wanted: int) -> None:
            bar.update(task, description="waiting for workers", note=f"{n} of {n_wanted}")

        def on_warmup(n: int) -> None:
            bar.update(task, description="warming up", note=f"{n} requests")

        def on_window(n: int | None) -> None:
            bar.reset(task, description="measuring", total=n, note="")

        def on_progress(played: Played) -> None:
            failed = f", [red]{played.n_bad} failed" if played.n_bad else ""
            note = f"{played.n_done} requests{failed}"
            bar.update(task, completed=played.n_done, note=note)

        yield Watcher(on_warmup, on_window, on_progress, on_workers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command alone; returns its exit code and never lets Typer choose another."""
    try:
        app(args=None if argv is None else list(argv), prog_name="trimserve loadtest")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_INTERNAL
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_INTERNAL


if __name__ == "__main__":
    sys.exit(main())
