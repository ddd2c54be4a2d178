"""Fleet: one measured capacity at every rate, with all that was assumed beside it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from loadtest.kubernetes.replica import Replica, read_replica
from loadtest.kubernetes.sizing import Node, NoRoom, Plan, Pod, Size, size
from loadtest.slo import Slo

Source = Literal["measured", "given", "default", "unknown"]


@dataclass(frozen=True)
class Settings:
    """What the user asks for; tuples have one value for each capacity."""

    capacities: tuple[Path, ...]
    rates_per_s: tuple[float, ...]
    replicas: int | None
    """behind the targets of a measurement; none: one behind each"""
    plan: Plan
    prices_per_hour: tuple[float | None, ...]
    replica_cores: tuple[float, ...]
    node_cores: tuple[float, ...]
    max_per_node: tuple[int | None, ...]
    reserved_cores: float
    pods_per_node: int
    node_gbit_per_s: float
    network_share: float
    request_bytes: float | None
    response_bytes: float | None
    max_connections: int
    given: frozenset[str]
    """names of the options that were on the command line"""

    def __post_init__(self) -> None:
        if not 0 < self.network_share <= 1:
            raise ValueError(
                f"network_share: got {self.network_share:g}, want above 0 and at most 1"
            )


@dataclass(frozen=True)
class Fleet:
    replica: Replica
    pod: Pod
    node: Node
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Assumption:
    """A figure that wasn't derived, one value for each fleet where they differ."""

    name: str
    option: str
    values: tuple[float | int | str | None, ...]
    source: Source


def fleets(slo: Slo, settings: Settings) -> tuple[Fleet, ...]:
    """Raises DocumentInvalid for a capacity's file, and ValueError where no replica fits a node."""
    made = []
    for index, path in enumerate(settings.capacities):
        replica = read_replica(path, slo, settings.replicas)
        known = settings.request_bytes
        pod = Pod(
            cores=settings.replica_cores[index],
            max_connections=settings.max_connections,
            request_bytes=replica.request_bytes if known is None else known,
            response_bytes=settings.response_bytes,
            max_per_node=settings.max_per_node[index],
        )
        node = Node(
            cores=settings.node_cores[index],
            reserved_cores=settings.reserved_cores,
            pods=settings.pods_per_node,
            network_bits_per_s=settings.node_gbit_per_s * 1e9 * settings.network_share,
            price_per_hour=settings.prices_per_hour[index],
        )
        try:
            sizes = [size(rate, replica, pod, node, settings.plan) for rate in settings.rates_per_s]
        except NoRoom as error:
            raise NoRoom(f"{path}: {error}") from error
        made.append(Fleet(replica, pod, node, tuple(sizes)))
    return tuple(made)


def cheapest(made: Sequence[Fleet], index: int) -> int | None:
    """Which fleet costs least at a rate, the first of equals; none where a price is missing."""
    prices = [one.sizes[index].price_per_hour for one in made]
    known = [price for price in prices if price is not None]
    return prices.index(min(known)) if len(known) == len(prices) else None


def assumptions(settings: Settings, made: Sequence[Fleet]) -> tuple[Assumption, ...]:
    return tuple(_assumptions(settings, made))


def _assumptions(settings: Settings, made: Sequence[Fleet]) -> Iterator[Assumption]:
    def one(name: str, option: str, *values: float | int | str | None) -> Assumption:
        key = option.removeprefix("--").replace("-", "_")
        same = values[:1] if len(set(values)) == 1 else values
        source: Source = "unknown" if set(values) == {None} else "default"
        return Assumption(name, option, same, "given" if key in settings.given else source)

    plan = settings.plan
    capacities = tuple(float(f"{fleet.replica.capacity_per_s:.4g}") for fleet in made)
    yield Assumption("requests/s of a replica within the SLO", "--capacity", capacities, "measured")
    behind = tuple(fleet.replica.n_measured for fleet in made)
    yield one("replicas that were measured together", "--replicas", *behind)
    yield one("share of its capacity that a replica has", "--utilization", plan.utilization)
    yield one("what may be lost", "--survive", plan.loss)
    yield one("zones", "--zones", plan.zones)
    yield one(
        "share that those left have then", "--degraded-utilization", plan.degraded_utilization
    )
    yield one("busiest replica's rate by the mean", "--imbalance", plan.imbalance)
    yield one("clients with a connection to each replica", "--clients", plan.clients)
    yield one("connections that a replica takes", "--max-connections", settings.max_connections)
    yield one("cores of a replica", "--replica-cores", *settings.replica_cores)
    yield one("cores of a node", "--node-cores", *settings.node_cores)
    yield one("of them reserved", "--reserved-cores", settings.reserved_cores)
    yield one("replicas on a node at most", "--max-per-node", *settings.max_per_node)
    yield one("pods of ours on a node at most", "--pods-per-node", settings.pods_per_node)
    yield one("Gbit/s of a node, each way", "--node-gbit-per-s", settings.node_gbit_per_s)
    yield one("share of it for bodies", "--network-share", settings.network_share)
    bodies = tuple(fleet.pod.request_bytes for fleet in made)
    if settings.request_bytes is None and None not in bodies:
        yield Assumption("bytes of a request's body", "--request-bytes", bodies, "measured")
    else:
        yield one("bytes of a request's body", "--request-bytes", *bodies)
    yield one("bytes of an answer's body", "--response-bytes", settings.response_bytes)
    yield one("price of a node by the hour", "--price-per-hour", *settings.prices_per_hour)


def document(made: Sequence[Fleet], assumed: Sequence[Assumption]) -> dict[str, object]:
    """A versioned record of it."""
    return {
        "apiVersion": "trimserve/v1",
        "kind": "FleetSizes",
        "assumptions": [asdict(one) for one in assumed],
        "fleets": [
            {
                "capacity": fleet.replica.source,
                "sizes": [
                    {**asdict(one), "price_per_million": one.price_per_million}
                    for one in fleet.sizes
                ],
            }
            for fleet in made
        ],
    }
