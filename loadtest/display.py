"""A load test's plan and result on a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from loadtest.arrivals import mean_level
from loadtest.capacity_report import CapacityReport
from loadtest.capacity_run import Measured
from loadtest.chaos.facts import summary_of
from loadtest.chaos.profile import label_of
from loadtest.report import Report
from loadtest.session import Settings
from loadtest.verdict import Outcome, requests_needed

STYLES: dict[Outcome, str] = {"met": "green", "violated": "red", "inconclusive": "yellow"}


def print_plan(settings: Settings, console: Console) -> None:
    """What is going to happen, and whether it can show anything."""
    slo = settings.slo
    rate_per_s = slo.workload.rate_per_s * mean_level(settings.load, settings.window_s)
    n = round(rate_per_s * settings.window_s)
    if settings.closed_loop is not None:
        console.print(
            "[yellow]warning:[/] clients that wait for their answers spare a server that "
            "stalls: the verdict can't be met",
            highlight=False,
        )
    targets = ", ".join(target.url for target in settings.targets)
    load = f"{rate_per_s:.4g} requests/s ({settings.load.label})"
    if settings.closed_loop is not None:
        load = f"{settings.closed_loop} clients in a closed loop"
    console.print(
        f"[bold]{escape(slo.name)}[/]: {load} for {settings.window_s:g} s "
        f"to {escape(settings.model)} at {escape(targets)}; "
        f"want {slo.latency.quantile * 100:g} % within {slo.latency.threshold_ms:g} ms",
        highlight=False,
    )
    if settings.chaos is not None:
        actions = ", ".join(label_of(one) for one in settings.chaos.actions)
        console.print(f"chaos: {actions}", highlight=False)
    needed = requests_needed(slo.latency.quantile)
    if n < needed and settings.closed_loop is None:
        console.print(
            f"[yellow]warning:[/] {n} requests can't show a quantile of "
            f"{slo.latency.quantile:g}, {needed} are needed: the verdict can't be met",
            highlight=False,
        )


def print_search(settings: Settings, console: Console) -> None:
    """What is going to be searched for, and about how long that takes."""
    slo = settings.slo
    n, each_s = 16, settings.window_s + settings.warmup_s
    console.print(
        f"[bold]{escape(slo.name)}[/]: the highest rate at which {slo.latency.quantile * 100:g} % "
        f"are within {slo.latency.threshold_ms:g} ms, from {slo.workload.rate_per_s:g} requests/s "
        f"on; some {n} measurements of {each_s:g} s",
        highlight=False,
    )


def print_measured(one: Measured, console: Console) -> None:
    """One line for each measurement of a search."""
    console.print(
        f"{one.rate_per_s:10.4g}/s  good {one.good_share * 100:.4g} %, "
        f"p99 {one.p99_s * 1e3:.4g} ms, goodput {one.goodput_per_s:.4g}/s"
        + ("" if one.usable else f"  [yellow]in doubt:[/] {escape('; '.join(one.reasons))}"),
        highlight=False,
    )


def print_capacity(report: CapacityReport, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="By rate", title_justify="left")
    for heading in ("requests/s", "good", "p50", "p95", "p99", "goodput", "rows of a batch"):
        table.add_column(heading, justify="right")
    for one in sorted(report.points, key=lambda point: point.rate_per_s):
        table.add_row(
            f"{one.rate_per_s:.4g}",
            f"{one.good_share * 100:.4g} %",
            *(
                "no answer" if value is None else f"{value * 1e3:.4g} ms"
                for value in (one.p50_s, one.p95_s, one.p99_s)
            ),
            f"{one.goodput_per_s:.4g}/s",
            "" if one.batch_rows is None else f"{one.batch_rows:.3g}",
        )
    console.print(table)
    style = STYLES[report.verdict]
    title = f"[bold {style}]{report.verdict.upper()}"
    console.print(
        Panel(escape(report.message), title=title, border_style=style, title_align="left")
    )


def print_report(report: Report, console: Console) -> None:
    console.print(_objectives(report))
    console.print(_latencies(report))
    console.print(_requests(report))
    _print_chaos(report, console)
    style = STYLES[report.verdict]
    lines = [f"• {escape(one.message)}" for one in report.reasons]
    if not lines:
        share = report.objectives[0]
        bound = share.lower_bound or 0.0
        calm = "" if report.chaos is None else " that no action disturbed"
        lines = [
            f"with {report.good_share.confidence * 100:g} % confidence at least "
            f"{bound * 100:.5g} % of the requests{calm} are good, {share.wanted * 100:g} % are "
            "wanted"
        ]
    console.print(
        Panel(
            "\n".join(lines),
            title=f"[bold {style}]{report.verdict.upper()}",
            border_style=style,
            title_align="left",
        )
    )


def _print_chaos(report: Report, console: Console) -> None:
    """A line for each action, and what the counters can't say any more."""
    for one in () if report.chaos is None else report.chaos.actions:
        mark = "[green]kept[/]" if one.kept else "[red]not kept[/]"
        console.print(f"{one.label}: {escape(summary_of(one))} ({mark})", highlight=False)
    if report.server is not None and report.server.lost:
        read = "can't be read" if report.server.error else "are the least"
        console.print(
            f"counters were lost with a process that was ended on purpose, so the server's "
            f"numbers {read}: {escape(', '.join(report.server.lost))}",
            highlight=False,
        )


def _objectives(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Objectives", title_justify="left")
    for heading in ("objective", "wanted", "observed", "at least", "kept in this window"):
        table.add_column(heading)
    labels = {
        "latency": f"good within {report.slo.latency.threshold_ms:g} ms",
        "success_ratio": "answered without an error",
    }
    for one in report.objectives:
        of_calm = "" if report.chaos is None else " of those undisturbed"
        bound = "" if one.lower_bound is None else f"{one.lower_bound * 100:.5g} %{of_calm}"
        table.add_row(
            labels[one.name],
            f"{one.wanted * 100:g} %",
            f"{one.observed * 100:.5g} %",
            bound,
            "[green]yes" if one.kept else "[red]no",
        )
    return table


def _latencies(report: Report) -> Table:
    closed = report.run.closed_loop
    title = "Latency from the intended send"
    if closed is not None:
        title = f"Latency in a closed loop of {closed} clients"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    cells = []
    for one in report.latency:
        table.add_column(f"p{one.quantile * 100:g}", justify="right")
        cells.append("no answer" if one.latency_s is None else f"{one.latency_s * 1e3:.2f} ms")
    table.add_row(*cells)
    return table


def _requests(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Requests", title_justify="left")
    for heading in ("what", "figure"):
        table.add_column(heading)
    requests, generator = report.requests, report.generator
    table.add_row("sent", f"{requests.n_sent} of {requests.n}, {requests.achieved_per_s:.1f}/s")
    table.add_row("goodput", f"{requests.goodput_per_s:.1f}/s")
    if report.accuracy is not None:
        one = report.accuracy
        table.add_row(
            "accuracy",
            f"{one.accuracy * 100:.5g} %, {one.n_right} of {one.n_rows} rows of "
            f"{one.n_payloads} different requests (shown, not judged)",
        )
    for status in requests.statuses:
        example = f": {status.example}" if status.example else ""
        table.add_row(escape(status.label), escape(f"{status.n}{example}"))
    if generator.lag_p99_s is not None:
        table.add_row(
            "generator",
            f"lag p99 {generator.lag_p99_s * 1e3:.2f} ms, CPU {generator.cpu_share * 100:.0f} %",
        )
    if report.server is not None:
        for count in report.server.transports:
            table.add_row(
                f"server, {count.transport}",
                f"{count.server_n} counted, {count.server_over} over the threshold "
                f"(seen here: {count.client_n} and {count.client_over})",
            )
    return table
