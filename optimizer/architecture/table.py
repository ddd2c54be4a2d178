"""Table: what the layers of a space's networks take on the target, and which network is fastest.

Many networks are made of few different layers, so their times tell the latency of each network
before any is trained.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from optimizer.architecture.latency import LatencyModel, Unmeasured
from optimizer.architecture.space import ArchitectureSpace, Choices
from optimizer.blocks import Block
from optimizer.search.block_table import Correction, Pair, Trust, correction, trust

MAX_ENUMERATED = 500
"""Networks of a space that are all looked at for their layers."""
_MAX_DRAWN, _ENOUGH = 1000, 60
"""Of a larger one so many are drawn at most, until as many in a row have brought no new layer."""
_N_STARTS = 60
_N_DRAWN = 64
_DIGITS = 16
Seconds = Callable[[Block], float | None]
LayersOf = Callable[[Choices], Counter[Block]]


@dataclass(frozen=True)
class Fastest:
    """A network, the seconds of its batch, and how many were looked at for it."""

    choices: Choices
    seconds: float
    n_looked: int


@dataclass(frozen=True, eq=False)
class SpaceTable:
    """Latencies of a space's networks by their layers' seconds on the target."""

    space: ArchitectureSpace
    layers_of: LayersOf
    latency: LatencyModel
    digest: str
    """SHA-256 (hex, 16 digits) of what was measured."""
    trusts: Mapping[str, Trust] = field(default_factory=dict)
    """By precision, how well corrected sums told what networks take that were timed whole; empty
    without a correction."""
    base_s: float | None = None
    """The model's own seconds, timed whole; None where nothing is corrected."""

    def corrected(self, pairs: Mapping[str, Sequence[Pair]], base_s: float) -> "SpaceTable":
        """By networks that were timed whole, in each precision: all latencies, or none where they
        are too few in one, or say nothing."""
        corrections: dict[str, Correction] = {}
        trusts: dict[str, Trust] = {}
        for precision, ones in pairs.items():
            found, trusted = correction(ones), trust(ones)
            if found is None or trusted is None or not found.factor > 0:
                return self
            corrections[precision], trusts[precision] = found, trusted
        content = f"{self.digest} {sorted(pairs.items())!r} {base_s!r}"
        return replace(
            self,
            latency=replace(self.latency, corrections=corrections),
            digest=hashlib.sha256(content.encode()).hexdigest()[:_DIGITS],
            trusts=trusts,
            base_s=base_s,
        )

    def seconds(self, choices: Choices) -> float | None:
        """Of a batch; None where a layer of the network wasn't measured."""
        try:
            return self.latency(self.layers_of(choices))
        except Unmeasured:
            return None

    def fastest(self) -> Fastest:
        """The network that takes least among those drawn, and from there by changing one decision
        at a time until none makes it faster. Raises Unmeasured where no network is known."""
        rng = np.random.default_rng(0)
        looked: dict[Choices, float | None] = {}

        def least(networks: Iterable[Choices]) -> tuple[float, Choices] | None:
            for one in networks:
                if one not in looked:
                    looked[one] = self.seconds(one)
            known = [(found, one) for one in networks if (found := looked[one]) is not None]
            return min(known, default=None)

        drawn = [self.space.sample(rng) for _ in range(_N_STARTS)]
        best = least([self.space.extreme(is_largest=False), *drawn])
        if best is None:
            raise Unmeasured("no network of the space is made of layers that were measured")
        while True:
            near = least(list(_neighbours(self.space, best[1])))
            if near is None or near[0] >= best[0]:
                return Fastest(best[1], best[0], len(looked))
            best = near


def spread(table: SpaceTable, n: int) -> list[Choices]:
    """About `n` networks whose latencies are far apart: the smallest and the largest, and of some
    drawn those at even steps of the order. Each once, those that aren't known left out."""
    rng = np.random.default_rng(0)
    drawn = [table.space.sample(rng) for _ in range(_N_DRAWN)]
    ends = [table.space.extreme(is_largest=one) for one in (False, True)]
    known = {one: found for one in [*ends, *drawn] if (found := table.seconds(one)) is not None}
    order = sorted(known, key=lambda one: (known[one], one))
    steps = np.linspace(0, len(order) - 1, min(n, len(order))).round().astype(int)
    return [order[step] for step in steps]


def blocks_of_space(space: ArchitectureSpace, layers_of: LayersOf) -> list[Block]:
    """The layers that its networks are made of, each once. Raises ValueError for a network that
    can't be built."""
    found: dict[Block, None] = {}
    n_idle = 0
    for choices in _looked_at(space):
        n_before = len(found)
        found |= dict.fromkeys(layers_of(choices))
        n_idle = 0 if len(found) > n_before else n_idle + 1
        if n_idle >= _ENOUGH and space.n_networks > MAX_ENUMERATED:
            break
    return list(found)


def space_table(
    space: ArchitectureSpace,
    layers_of: LayersOf,
    wanted: Iterable[Block],
    seconds: Seconds,
    batch_size: int,
) -> SpaceTable | None:
    """The table of the layers wanted, as far as they have seconds; None where none has."""
    found = {block.key: seconds(block) for block in wanted}
    known = {key: one for key, one in found.items() if one is not None}
    if not known:
        return None
    content = "\n".join(f"{key} {one!r}" for key, one in sorted(known.items()))
    digest = hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]
    times = {(key, batch_size): one for key, one in known.items()}
    return SpaceTable(space, layers_of, LatencyModel(times, batch_size), digest)


def _looked_at(space: ArchitectureSpace) -> Iterator[Choices]:
    if space.n_networks <= MAX_ENUMERATED:
        yield from space.every()
        return
    yield space.extreme(is_largest=False)
    yield space.extreme(is_largest=True)
    rng = np.random.default_rng(0)
    for _ in range(_MAX_DRAWN):
        yield space.sample(rng)


def _neighbours(space: ArchitectureSpace, choices: Choices) -> Iterator[Choices]:
    """Networks that differ in one decision; what comes to exist by it takes its first option."""
    for index, is_open in enumerate(space.is_open(choices)):
        if not is_open:
            continue
        for option in range(len(space.decisions[index].options)):
            if option != choices[index]:
                yield space.canonical((*choices[:index], option, *choices[index + 1 :]))
