"""Fleets for people: a table of sizes, what to mind, and every assumption."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.kubernetes.fleet import Assumption, Fleet, cheapest
from loadtest.kubernetes.sizing import Size


def print_fleets(made: Sequence[Fleet], assumed: Sequence[Assumption], console: Console) -> None:
    for number in range(len(made)):
        console.print(_sizes(made, number), "")
    if len(made) > 1:
        console.print("* costs least at this rate", highlight=False)
    warnings = dict.fromkeys(
        f"{one.rate_per_s:,.10g}/s, {fleet.replica.source}: {text}"
        for fleet in made
        for one in fleet.sizes
        for text in one.warnings
    )
    for text in warnings:
        console.print(f"[yellow]•[/] {escape(text)}", highlight=False)
    console.print(_assumptions(assumed))


def _sizes(made: Sequence[Fleet], number: int) -> Table:
    """Of one fleet, with prices where they're known and a mark where it is the cheapest."""
    fleet = made[number]
    first, priced = fleet.sizes[0], fleet.node.price_per_hour is not None
    title = (
        f"{Path(fleet.replica.source).name}: {fleet.replica.capacity_per_s:,.4g} requests/s a "
        f"replica, {first.replicas_per_node} replicas a node (full: {first.packed_by})"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), title=escape(title), title_justify="left")
    for heading in ("requests/s", "replicas", "nodes", "lost", "used", "full first"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("price/h", "/million") if priced else ():
        table.add_column(heading, justify="right", no_wrap=True)
    for index, one in enumerate(fleet.sizes):
        is_best = len(made) > 1 and cheapest(made, index) == number
        table.add_row(
            f"{one.rate_per_s:,.10g}{'*' if is_best else ''}",
            *_cells(one),
            *(_prices(one) if priced else ()),
        )
    return table


def _cells(one: Size) -> tuple[str, ...]:
    fullest = one.uses[0]
    return (
        f"{one.replicas:,}",
        f"{one.nodes:,}",
        f"{one.lost:,}",
        f"{one.degraded_share * 100:.3g} %",
        f"{fullest.name.partition(' of ')[0]} {fullest.share * 100:.0f} %",
    )


def _prices(one: Size) -> tuple[str, str]:
    million = one.price_per_million
    return (
        "" if one.price_per_hour is None else f"{one.price_per_hour:,.2f}",
        "" if million is None else f"{million:.4g}",
    )


def _assumptions(assumed: Sequence[Assumption]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Assumptions", title_justify="left")
    for heading in ("what", "value", "from", "option"):
        table.add_column(heading)
    for one in assumed:
        values = "; ".join("" if value is None else f"{value}" for value in one.values)
        table.add_row(one.name, values, one.source, one.option)
    return table
