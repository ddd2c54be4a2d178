"""The command `trimserve k8s size`: measured capacities in, a table of fleets out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from loadtest.exits import exit_codes

if TYPE_CHECKING:
    from loadtest.kubernetes.sizing import Loss

HELP = """\
How many replicas and nodes a rate takes, what they cost, and what is full first.

From what `trimserve loadtest --find-capacity --json` measured on one replica, or on several
(`--replicas`). All else is an assumption: it is an option, and it is printed with its value and
whether it was given. What isn't known (a price, the bytes of an answer) is left out, not guessed.

Give `--capacity` several times to compare, for example machines or variants; `--price-per-hour`,
`--node-cores`, `--replica-cores` and `--max-per-node` are then for all, or one for each in turn.

A fleet has the fewest replicas that carry the rate at `--utilization`, and that, after the loss of
a zone (`--survive`), still carry it at `--degraded-utilization` of what the rest can: 0.95 is
where the search confirms what it found.

**Example**

`trimserve k8s size slo.yaml --capacity cpu.json --capacity gpu.json --rate 1000 --rate 1000000
--price-per-hour 0.68 --price-per-hour 1.01 --max-per-node 3 --max-per-node 1`
"""
MAX_CORES, MAX_BYTES = 100_000, 1e12
RATES = (100.0, 1_000.0, 10_000.0, 100_000.0, 1_000_000.0)
Value = TypeVar("Value")


def size(
    context: typer.Context,
    slo: Annotated[Path, typer.Argument(metavar="SLO", help="The SLO, a YAML file.")],
    capacity: Annotated[
        list[Path], typer.Option(metavar="FILE", help="The capacity that was measured.")
    ],
    rate: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001,
            max=1e9,
            help="Requests per second; again for more. By default 100 to 1,000,000 by tens.",
        ),
    ] = None,
    price_per_hour: Annotated[
        list[float] | None, typer.Option(min=0, max=1e9, help="Of a node, in any currency.")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1, help="Behind the targets of --capacity; by default one behind each target."
        ),
    ] = None,
    utilization: Annotated[
        float, typer.Option(help="The share of its capacity that a replica has.")
    ] = 0.8,
    degraded_utilization: Annotated[
        float, typer.Option(help="The share that those left have after the loss.")
    ] = 0.95,
    survive: Annotated[
        str, typer.Option(help="What may be lost at once: nothing, replica, node or zone.")
    ] = "zone",
    zones: Annotated[int, typer.Option(min=1, max=100, help="Over which replicas are spread.")] = 3,
    imbalance: Annotated[
        float, typer.Option(min=1, max=1000, help="The busiest replica's rate by the mean of all.")
    ] = 1.0,
    clients: Annotated[
        int, typer.Option(min=0, help="Each keeps a connection to every replica, as gRPC's do.")
    ] = 100,
    replica_cores: Annotated[
        list[float] | None,
        typer.Option(min=0.001, max=MAX_CORES, help="Of a pod. By default 4, k8s/base's."),
    ] = None,
    node_cores: Annotated[
        list[float] | None,
        typer.Option(min=0.001, max=MAX_CORES, help="Of a node. By default 16."),
    ] = None,
    reserved_cores: Annotated[
        float, typer.Option(min=0, max=MAX_CORES, help="Of a node, for the system and daemons.")
    ] = 1.0,
    max_per_node: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Replicas on a node at most, such as its GPUs."),
    ] = None,
    pods_per_node: Annotated[
        int, typer.Option(min=1, help="Replicas on a node: kubelet's 110 less the system's.")
    ] = 100,
    node_gbit_per_s: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="A node's network each way, lasting.")
    ] = 10.0,
    network_share: Annotated[
        float, typer.Option(help="The share of it that bodies of requests may have.")
    ] = 0.7,
    request_bytes: Annotated[
        float | None,
        typer.Option(min=0, max=MAX_BYTES, help="By default as the capacity's file says."),
    ] = None,
    response_bytes: Annotated[
        float | None,
        typer.Option(min=0, max=MAX_BYTES, help="By default unknown: the way out isn't counted."),
    ] = None,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Of a replica; trimserve serve refuses more than 8192.")
    ] = 8192,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of the table.")] = False,
) -> None:
    """See HELP; the function only translates arguments and outcomes."""
    with exit_codes():
        from loadtest.kubernetes.fleet import Settings, assumptions, document, fleets
        from loadtest.kubernetes.sizing import Plan
        from loadtest.session import SettingsInvalid
        from loadtest.slo import read_slo

        names = {"slo", "capacity", "rate", "as_json"}
        given = frozenset(
            name for name in context.params if name not in names and _is_given(context, name)
        )
        try:
            settings = Settings(
                capacities=tuple(capacity),
                rates_per_s=tuple(rate or RATES),
                replicas=replicas,
                plan=Plan(
                    utilization,
                    degraded_utilization,
                    imbalance,
                    _loss(survive),
                    zones,
                    clients,
                ),
                prices_per_hour=_each("--price-per-hour", price_per_hour, capacity, None),
                replica_cores=_each("--replica-cores", replica_cores, capacity, 4.0),
                node_cores=_each("--node-cores", node_cores, capacity, 16.0),
                max_per_node=_each("--max-per-node", max_per_node, capacity, None),
                reserved_cores=reserved_cores,
                pods_per_node=pods_per_node,
                node_gbit_per_s=node_gbit_per_s,
                network_share=network_share,
                request_bytes=request_bytes,
                response_bytes=response_bytes,
                max_connections=max_connections,
                given=given,
            )
            made = fleets(read_slo(slo), settings)
        except ValueError as error:
            raise SettingsInvalid(str(error)) from error
        assumed = assumptions(settings, made)
        if as_json:
            typer.echo(json.dumps(document(made, assumed), indent=2))
        else:
            from rich.console import Console

            from loadtest.kubernetes.fleet_table import print_fleets

            print_fleets(made, assumed, Console())


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _loss(name: str) -> "Loss":
    from loadtest.kubernetes.sizing import LOSSES

    for one in LOSSES:
        if one == name:
            return one
    raise ValueError(f"--survive: got {name!r}, want one of {', '.join(LOSSES)}")


def _each(
    option: str, values: Sequence[Value] | None, capacities: Sequence[Path], default: Value
) -> tuple[Value, ...]:
    """One value for each capacity, of one for all or one for each."""
    n = len(capacities)
    given = list(values) if values else [default]
    if len(given) not in (1, n):
        raise ValueError(f"{option}: got {len(given)}, want one, or one for each of {n} capacities")
    return tuple(given * n if len(given) == 1 else given)
