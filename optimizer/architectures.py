"""Architectures: what a study's searches for another network looked at, as its result keeps it.

It reads what the technique left beside the weights that it found. It searches nothing, draws
nothing, and imports no torch.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from optimizer.store import Store
    from optimizer.techniques import Technique

TECHNIQUE = "architecture"
RECORD = "architecture.json"
"""The technique's file, beside the weights."""
_PRECISION = "precision"


@dataclass(frozen=True)
class Network:
    """One that was looked at: `accuracy` is 0 to 1 on a part of train, more is better; `latency_s`
    that of a batch by the table of layers."""

    accuracy: float
    latency_s: float
    precision: str


@dataclass(frozen=True)
class ProposerRecord:
    """What one proposer looked at, in its order. `regret` [network] is what its best reward up to
    there falls short of the best that any of them found."""

    name: str
    networks: tuple[Network, ...]
    regret: tuple[float, ...]


@dataclass(frozen=True)
class ArchitectureRecord:
    """One search. `id` is that of the variant that its step made; `front` has the networks than
    which none was both faster and more accurate, by rising latency."""

    id: str
    label: str
    target_s: float
    proposers: tuple[ProposerRecord, ...]
    front: tuple[Network, ...]


class Built(Protocol):
    """What builds a study's variants."""

    @property
    def store(self) -> "Store": ...

    @property
    def techniques(self) -> "Mapping[str, Technique]": ...


def architectures(variant_ids: Iterable[str], builder: Built) -> tuple[ArchitectureRecord, ...]:
    """The searches that the variants come of, each once, in the order of the variants; those of
    variants that were never built aren't there."""
    found: dict[str, ArchitectureRecord] = {}
    for variant_id in variant_ids:
        record = _searched(variant_id, builder, found)
        if record is not None:
            found[record.id] = record
    return tuple(found.values())


def _searched(
    variant_id: str, builder: Built, known: Mapping[str, ArchitectureRecord]
) -> ArchitectureRecord | None:
    """Of the step among those that made the variant, None where none of them is a search."""
    stored = builder.store.find(variant_id)
    while stored is not None and stored.step.technique != TECHNIQUE:
        stored = builder.store.find(stored.parent_id)
    if stored is None:
        return None
    if stored.id in known:
        return known[stored.id]
    path = stored.model.directory / RECORD
    if not path.exists():  # of another technique by that name
        return None
    label = builder.techniques[TECHNIQUE].describe(stored.step.parameters)
    return _record(stored.id, label, json.loads(path.read_text()))


def _record(variant_id: str, label: str, stored: Mapping[str, Any]) -> ArchitectureRecord:
    decisions = [one["name"] for one in stored["decisions"]]
    index = decisions.index(_PRECISION)
    precisions = stored["decisions"][index]["options"]

    def network(one: Mapping[str, Any]) -> Network:
        return Network(one["accuracy"], one["latency_s"], precisions[one["choices"][index]])

    proposers = tuple(
        ProposerRecord(name, tuple(map(network, looked)), tuple(stored["regret"][name]))
        for name, looked in stored["trails"].items()
    )
    front = tuple(map(network, stored["front"]))
    return ArchitectureRecord(variant_id, label, stored["target_s"], proposers, front)
