"""Sizing: how many replicas and nodes a rate takes, what is left when some are lost, and what is
full first.

Arithmetic on what was measured and what is assumed; it measures and assumes nothing itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from loadtest.kubernetes.replica import Replica, peak_in_flight

Loss = Literal["nothing", "replica", "node", "zone"]
PackedBy = Literal["cores", "network", "pods", "given"]
LOSSES: tuple[Loss, ...] = ("nothing", "replica", "node", "zone")
MAX_NODES, MAX_PODS = 5_000, 150_000
"""Of a cluster: https://kubernetes.io/docs/setup/best-practices/cluster-large/"""
MAX_ADDRESSES = 4_095
"""In a headless Service's name: a DNS answer is at most 65,535 bytes (RFC 1035, 4.2.2), an address
of IPv4 in it 16 (4.1.3, its name compressed)."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Node:
    """What a machine has; a network's rate in bits per second, each way."""

    cores: float
    reserved_cores: float
    pods: int
    network_bits_per_s: float
    price_per_hour: float | None


@dataclass(frozen=True)
class Pod:
    """What a replica takes; bytes of a request and its answer, none where unknown."""

    cores: float
    max_connections: int
    request_bytes: float | None
    response_bytes: float | None
    max_per_node: int | None
    """less than its cores allow, for example as many as it has GPUs"""


@dataclass(frozen=True)
class Plan:
    """How the replicas are used, before and after the loss that has to be survived."""

    utilization: float
    degraded_utilization: float
    """of those that are left"""
    imbalance: float
    """the busiest replica's rate by the mean"""
    loss: Loss
    zones: int
    clients: int
    """each with a connection to every replica, as gRPC's round_robin has"""

    def __post_init__(self) -> None:
        for name in ("utilization", "degraded_utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name):g}, want above 0, at most 1")
        if self.loss == "zone" and self.zones < 2:
            raise ValueError(f"zones: got {self.zones}, want at least 2, of which one can be lost")


@dataclass(frozen=True)
class Use:
    """A limit, and the share of it that is used."""

    name: str
    share: float


@dataclass(frozen=True)
class Size:
    """For one rate. `uses` are those of normal operation, the fullest first."""

    rate_per_s: float
    replicas: int
    nodes: int
    replicas_per_node: int
    packed_by: PackedBy
    lost: int
    """replicas, with the loss that is survived"""
    degraded_share: float
    """of their capacity that the others then use"""
    uses: tuple[Use, ...]
    price_per_hour: float | None
    warnings: tuple[str, ...]

    @property
    def price_per_million(self) -> float | None:
        """Requests, at this very rate all the time."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour / (self.rate_per_s * 3600) * 1e6


class NoRoom(ValueError):
    """Not one replica fits on a node; `str()` says for want of what."""


def size(rate_per_s: float, replica: Replica, pod: Pod, node: Node, plan: Plan) -> Size:
    """The fewest replicas that carry `rate_per_s` at the planned utilization, and what is left of
    them after the loss at the degraded one, spread evenly over the zones.

    Raises NoRoom.
    """
    per_node, packed_by = replicas_per_node(replica, pod, node)
    usable_per_s = reachable_per_s(replica, pod, node) / plan.imbalance
    n = _n_replicas(rate_per_s, usable_per_s, per_node, plan)
    n_lost = lost(n, per_node, plan)
    nodes = n_nodes(n, per_node, plan)
    uses = _uses(rate_per_s, n, on_fullest_node(n, per_node, plan), replica, pod, node, plan)
    price = None if node.price_per_hour is None else nodes * node.price_per_hour
    return Size(
        rate_per_s=rate_per_s,
        replicas=n,
        nodes=nodes,
        replicas_per_node=per_node,
        packed_by=packed_by,
        lost=n_lost,
        degraded_share=rate_per_s / ((n - n_lost) * usable_per_s),
        uses=tuple(sorted(uses, key=lambda one: -one.share)),
        price_per_hour=price,
        warnings=tuple(_warnings(n, nodes, replica, pod, plan)),
    )


def reachable_per_s(replica: Replica, pod: Pod, node: Node) -> float:
    """The capacity of a replica that has a node's whole network."""
    largest = max(pod.request_bytes or 0.0, pod.response_bytes or 0.0)
    if largest == 0:
        return replica.capacity_per_s
    return min(replica.capacity_per_s, node.network_bits_per_s / (8 * largest))


def replicas_per_node(replica: Replica, pod: Pod, node: Node) -> tuple[int, PackedBy]:
    """How many fit, each at its full capacity, and what there is no more room for."""
    fits: list[tuple[float, PackedBy]] = [
        ((node.cores - node.reserved_cores) / pod.cores, "cores"),
        (node.pods, "pods"),
    ]
    largest = max(pod.request_bytes or 0.0, pod.response_bytes or 0.0)
    if largest > 0:
        each = reachable_per_s(replica, pod, node) * largest * 8
        fits.append((node.network_bits_per_s / each, "network"))
    if pod.max_per_node is not None:
        fits.append((pod.max_per_node, "given"))
    most, by = min((math.floor(room + _ROUNDING), by) for room, by in fits)
    if most < 1:
        raise NoRoom(f"no replica fits on a node, which has too few or too little: {by}")
    return most, by


@dataclass(frozen=True)
class Zone:
    """Zones that hold equally many replicas each, as evenly over their nodes as it goes."""

    count: int
    replicas: int
    nodes: int

    @property
    def on_fullest(self) -> int:
        return _ceil(self.replicas / self.nodes) if self.nodes else 0


def spread(n: int, per_node: int, plan: Plan) -> tuple[Zone, Zone]:
    """`n` replicas, no zone with more than one more than another: the larger and the smaller."""
    each, n_larger = divmod(n, plan.zones)
    # What is to survive the loss of a node lies on two, at least.
    least = 2 if plan.loss == "node" and plan.zones == 1 else 1

    def zones(count: int, held: int) -> Zone:
        return Zone(count, held, max(_ceil(held / per_node), min(held, least)))

    return zones(n_larger, each + 1), zones(plan.zones - n_larger, each)


def n_nodes(n: int, per_node: int, plan: Plan) -> int:
    return sum(zone.count * zone.nodes for zone in spread(n, per_node, plan))


def on_fullest_node(n: int, per_node: int, plan: Plan) -> int:
    return max(zone.on_fullest for zone in spread(n, per_node, plan) if zone.count)


def lost(n: int, per_node: int, plan: Plan) -> int:
    """How many of `n` replicas are gone at once."""
    if plan.loss == "zone":
        return _ceil(n / plan.zones)
    if plan.loss == "node":
        return on_fullest_node(n, per_node, plan)
    return 1 if plan.loss == "replica" else 0


def _n_replicas(rate_per_s: float, usable_per_s: float, per_node: int, plan: Plan) -> int:
    n = max(1, _ceil(rate_per_s / (usable_per_s * plan.utilization)))
    needed = rate_per_s / (usable_per_s * plan.degraded_utilization)
    if plan.loss == "zone":
        # Near the answer; a zone's share is rounded up, so that the rest is found by trying.
        n = max(n, math.floor(needed * plan.zones / (plan.zones - 1)))
    while n - lost(n, per_node, plan) < max(1, needed - _ROUNDING):
        n += 1
    return n


def _uses(
    rate_per_s: float, n: int, on_node: int, replica: Replica, pod: Pod, node: Node, plan: Plan
) -> Iterator[Use]:
    busiest_per_s = rate_per_s / n * plan.imbalance
    yield Use("capacity of a replica", busiest_per_s / replica.capacity_per_s)
    bits_per_byte = on_node * busiest_per_s * 8
    for name, n_bytes in (("in", pod.request_bytes), ("out", pod.response_bytes)):
        if n_bytes:
            share = bits_per_byte * n_bytes / node.network_bits_per_s
            yield Use(f"network {name} of a node", share)
    in_flight = peak_in_flight(replica) or 0.0
    yield Use("connections of a replica", max(plan.clients, in_flight) / pod.max_connections)


def _warnings(n: int, nodes: int, replica: Replica, pod: Pod, plan: Plan) -> Iterator[str]:
    if replica.confirmation != "met":
        said = replica.confirmation or "missing"
        yield f"the run that confirms the capacity is {said}: measure with a longer --duration-s"
    if plan.clients > pod.max_connections:
        yield f"{plan.clients} clients, and a replica holds {pod.max_connections} connections"
    if nodes > MAX_NODES:
        yield f"{nodes} nodes, and Kubernetes is made for {MAX_NODES} in a cluster"
    if n > MAX_PODS:
        yield f"{n} pods, and Kubernetes is made for {MAX_PODS} in a cluster"
    if n > MAX_ADDRESSES:
        yield (
            f"{n} addresses, and a DNS answer holds {MAX_ADDRESSES}: gRPC clients can't find all "
            "by the headless Service; split the fleet, or put a gateway before it"
        )


def _ceil(value: float) -> int:
    return math.ceil(value - _ROUNDING)
