"""Block times: what the target takes for layers and for some whole networks, as the store has it.

They are measured once for each engine and machine, by `optimizer.estimates`. Here they are only
found again, by whoever estimates a network and by techniques that shape one.
"""

from dataclasses import dataclass

from optimizer import blocks
from optimizer.blocks import Block
from optimizer.store import Key, Store
from serve.machine import Machine

SIZES = (1, 8, 32)
"""Batch sizes that blocks are timed at."""
TABLE_ENGINE = "onnxruntime"
"""The engine of tables for techniques: it runs everywhere."""
TABLE_SIZE = 8
"""The batch size of those."""


def time_key(block: Block, machine: Machine, engine: str, cores: int) -> Key:
    """Of the block's times: a mapping of batch size to seconds, empty where it can't run."""
    serving = {"engine": engine, "instances": cores, "batch_sizes": list(SIZES)}
    return Key(block.key, machine, "block", blocks.PROTOCOL_VERSION, serving)


def network_key(key: str, machine: Machine, cores: int) -> Key:
    """Of a whole network's times on `TABLE_ENGINE`, as a block's."""
    serving = {"engine": TABLE_ENGINE, "instances": cores, "batch_sizes": list(SIZES)}
    return Key(key, machine, "network", blocks.PROTOCOL_VERSION, serving)


@dataclass(frozen=True, eq=False)
class StoredTimes:
    """Seconds on `machine` with `cores` of it busy, one thread each."""

    store: Store
    machine: Machine
    cores: int

    def __call__(self, block: Block) -> float | None:
        """Of a batch of `TABLE_SIZE`; None where it wasn't measured."""
        return self._seconds(time_key(block, self.machine, TABLE_ENGINE, self.cores))

    def network(self, key: str) -> float | None:
        """Of a batch of `TABLE_SIZE` of the whole network of that key, likewise."""
        return self._seconds(network_key(key, self.machine, self.cores))

    def _seconds(self, key: Key) -> float | None:
        seconds = (self.store.recorded(key) or {}).get(str(TABLE_SIZE))
        return None if seconds is None else float(seconds)
