"""Estimates: what recipes would take at best, from the blocks of the networks that they make.

Blocks are timed once for each engine and machine and kept in the store; so are pairs of a
network's sum over blocks and its seconds as a whole, from which the correction is learned. What
is done with an estimate is the ladder's matter.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimizer import blocks
from optimizer.block_times import SIZES, TABLE_ENGINE, TABLE_SIZE, network_key, time_key
from optimizer.blocks import Block, block_inputs, write_block
from optimizer.capacity import cost_per_million
from optimizer.errors import MeasurerUnavailable
from optimizer.measuring import Measurer
from optimizer.parity import fixed_sizes
from optimizer.recipe import Recipe
from optimizer.result import Variant
from optimizer.search.block_table import Correction, Pair, Trust, block_sum, correction, trust
from optimizer.search.ladder import Bound
from optimizer.spec import Spec
from optimizer.store import Key, Store, StoredVariant
from optimizer.timing import Contender, Effort
from optimizer.variant import EngineModel, canonical_json
from serve.tensor import Array

_EFFORT = Effort(
    min_passes=8, max_passes=40, seconds=0.15, max_warmup_passes=12, max_warmup_s=0.1, max_retries=0
)
"""Of one block: it is short, and many of them are summed."""
_WHOLE_EFFORT = Effort(max_passes=100, seconds=1.5, max_warmup_s=0.3, max_retries=0)
"""Of a whole network: few are timed, and all others are corrected by them."""
_PAIR = "block_pair"


@dataclass(eq=False)
class Estimates:
    """`blocks_of` gives the blocks of the network that a recipe makes, None where it can't be
    made or seen through."""

    spec: Spec
    store: Store
    measurer: Measurer
    base_id: str
    cores: int
    blocks_of: Callable[[Recipe], Mapping[Block, int] | None]
    _times: dict[tuple[str, str, int], float] = field(default_factory=dict)
    """(engine, block's key, batch size) → seconds."""
    _timed_blocks: set[tuple[str, str]] = field(default_factory=set)
    _pairs: dict[tuple[str, int], dict[str, Pair]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """(family, batch size) → variant's id → pair."""
    _engines: dict[str, str] = field(default_factory=dict)
    """Family → the engine that its blocks are timed on."""

    def recall(self) -> None:
        """Take the pairs of earlier studies of the same base on this machine from the store."""
        found = self.store.values(_PAIR, blocks.PROTOCOL_VERSION, self.measurer.machine)
        for variant_id, _serving, stored in found:
            value: Any = stored
            if value["base"] == self.base_id and value["cores"] == self.cores:
                self._take(variant_id, value)

    def measure(self, wanted: Sequence[Block], has_time: Callable[[], bool]) -> int:
        """Time the blocks of a table for techniques, as far as they aren't known and there is time;
        how many are known then. Of one that the engine can't run nothing is."""
        for block in wanted:
            if self._is_known(block) or has_time():
                self._time({block: 1}, TABLE_ENGINE)
        return sum((TABLE_ENGINE, block.key, TABLE_SIZE) in self._times for block in wanted)

    def measure_networks(
        self,
        wanted: Sequence[tuple[str, StoredVariant]],
        inputs: Mapping[str, Array],
        has_time: Callable[[], bool],
    ) -> int:
        """Time whole networks, as `measure` does layers, on `inputs` of the largest batch or more;
        each has the key that its times are kept under."""
        n_known = 0
        for name, variant in wanted:
            key = network_key(name, self.measurer.machine, self.cores)
            stored: Any = self.store.recorded(key)
            if stored is None and has_time():
                assert isinstance(variant.model, EngineModel)
                stored = self._served(variant.model, TABLE_ENGINE, inputs, _WHOLE_EFFORT)
                self.store.record(key, stored)
            n_known += bool(stored)
        return n_known

    def learn(self, recipe: Recipe, row: Variant) -> None:
        """Set the row's measured seconds beside its sum over blocks."""
        found = self.blocks_of(recipe)
        if not found or not row.service_times:
            return
        measured = {time.batch_size: time.p50_s for time in row.service_times[0].times}
        counts = _by_key(found)
        self._time(found, row.engine)
        pairs = {
            str(size): [total, measured[size]]
            for size in SIZES
            if size in measured and (total := self._sum(counts, row.engine, size)) is not None
        }
        value = {
            "base": self.base_id, "cores": self.cores, "family": _family(recipe),
            "engine": row.engine, "pairs": pairs,
        }  # fmt: skip
        key = Key(
            row.id, self.measurer.machine, _PAIR, blocks.PROTOCOL_VERSION, {"cores": self.cores}
        )
        if self.store.recorded(key) is None:
            self.store.record(key, value)
        self._take(row.id, value)

    def bound(self, recipe: Recipe) -> Bound | None:
        """The most optimistic view of the recipe, None where blocks don't tell."""
        family = _family(recipe)
        corrections = self.corrections(family)
        if not corrections:
            return None
        found = self.blocks_of(recipe)
        if not found:
            return None
        engine = self._engines[family]
        self._time(found, engine)
        counts = _by_key(found)
        fastest = {
            size: one.fastest(total)
            for size, one in corrections.items()
            if (total := self._sum(counts, engine, size)) is not None
        }
        return self._bound(fastest) if fastest else None

    def corrections(self, family: str) -> Mapping[int, Correction]:
        """By batch size, those that are known."""
        found = {
            size: correction(list(self._pairs[family, size].values()))
            for size in SIZES
            if (family, size) in self._pairs
        }
        return {size: one for size, one in found.items() if one is not None}

    def trusts(self) -> Mapping[str, Trust]:
        """How well blocks predict batches of `TABLE_SIZE`, by family; those of enough variants
        timed whole."""
        found = {
            family: trust(list(pairs.values()))
            for (family, size), pairs in self._pairs.items()
            if size == TABLE_SIZE
        }
        return {family: one for family, one in found.items() if one is not None}

    def _bound(self, fastest: Mapping[int, float]) -> Bound:
        rows = self.spec.slo.workload.rows
        per_row_s = min(seconds / size for size, seconds in fastest.items())
        # At best all cores share one request, and all batches are as cheap as the cheapest.
        seconds = fastest[min(fastest)] / self.cores
        return Bound(seconds, self._value(seconds, per_row_s * rows))

    def _value(self, seconds: float, per_request_s: float) -> float:
        """The least that the objective can be."""
        if self.spec.objective == "latency":
            return seconds
        if self.spec.objective != "cost":
            return 0.0
        rate = self.cores / per_request_s if per_request_s > 0 else math.inf
        price = self.spec.target.price_per_core_hour
        return cost_per_million(price, self.cores, rate, self.spec.slo.workload.rows)

    def _sum(self, counts: Mapping[str, int], engine: str, size: int) -> float | None:
        times = {
            (key, size): self._times[engine, key, size]
            for key in counts
            if (engine, key, size) in self._times
        }
        return block_sum(counts, times, size)

    def _time(self, found: Mapping[Block, int], engine: str) -> None:
        """Time the blocks that neither this study nor the store knows."""
        for block in found:
            if (engine, block.key) not in self._timed_blocks:
                for size, seconds in self._timed(block, engine).items():
                    self._times[engine, block.key, int(size)] = float(seconds)
                # Last, or a trial beside this one would go without what isn't there yet.
                self._timed_blocks.add((engine, block.key))

    def _is_known(self, block: Block) -> bool:
        key = time_key(block, self.measurer.machine, TABLE_ENGINE, self.cores)
        return self.store.recorded(key) is not None

    def _timed(self, block: Block, engine: str) -> Mapping[str, float]:
        key = time_key(block, self.measurer.machine, engine, self.cores)
        stored: Any = self.store.recorded(key)
        if stored is None:
            with self.store.workshop() as directory:
                try:
                    model = write_block(block, engine, directory, self.measurer.machine)
                except Exception:  # noqa: BLE001  what can't be written says nothing of networks
                    stored = {}
                else:
                    inputs = block_inputs(block, SIZES[-1], self.spec.seed)
                    stored = self._served(model, engine, inputs, _EFFORT)
            self.store.record(key, stored)
        return dict(stored)

    def _served(
        self, model: EngineModel, engine: str, inputs: Mapping[str, Array], effort: Effort
    ) -> dict[str, float]:
        """Seconds by batch size; none of what the engine can't run."""
        contender = Contender(
            model.directory, model.served(self.cores, 1, fixed_sizes(engine, SIZES))
        )
        try:
            timing = self.measurer.time(
                contender, None, inputs, SIZES, effort=effort, seed=self.spec.seed
            )
        except MeasurerUnavailable:
            raise
        except Exception:  # noqa: BLE001  an engine that can't run one says nothing of networks
            return {}
        return {str(time.batch_size): time.p50_s for time in timing.times.times}

    def _take(self, variant_id: str, value: Mapping[str, Any]) -> None:
        family = str(value["family"])
        self._engines[family] = str(value["engine"])
        for size, (total, whole) in value["pairs"].items():
            self._pairs[family, int(size)][variant_id] = Pair(total, whole)


def _by_key(found: Mapping[Block, int]) -> Counter[str]:
    return Counter({block.key: count for block, count in found.items()})


def _family(recipe: Recipe) -> str:
    """What a correction is for: the steps that don't change the network, and how it is compiled."""
    kept = recipe.skeleton().choices
    names = " → ".join(choice.traits.name for choice in kept)
    return f"{names} {canonical_json(dict(kept[-1].parameters))}" if kept else ""
