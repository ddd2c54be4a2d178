"""Measuring: what an engine computes and how long it takes, on the target that will serve it.

This module holds the contract; `local` runs it in this process, `child` in one of its own, `remote`
on another machine. A measurer knows engines and arrays; it knows neither torch nor the store nor
what is judged by what it finds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from optimizer.timing import Contender, Effort, Timing
from serve.engines import KernelTime
from serve.machine import Machine
from serve.tensor import Array

Batch = Mapping[str, Array]
"""Arrays by tensor's name, which share the batch axis."""


class ContenderFailed(Exception):
    """An engine failed in another process than this one: it raised there, or took the process
    with it. The message says which."""


class Measurer(Protocol):
    """Measures engines. A `Contender` is a folder of files and the spec to load them by.

    Whatever loading or running raises is the engine's failure, of any type (in another process:
    ContenderFailed); a measurer that can't be reached, or finds no cores free, raises
    MeasurerUnavailable. What is timed has the machine's cores alone meanwhile. Used from one thread
    at a time.
    """

    @property
    def machine(self) -> Machine:
        """The machine that it measures on."""
        ...

    def outputs(self, contender: Contender, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Run batch after batch on one instance, each output as it comes, in the order of the
        engine's signature; the engine is loaded once."""
        ...

    def kernels(self, contender: Contender, batch: Batch, n_runs: int) -> Sequence[KernelTime]:
        """The kernels that a run executes, by the engine's own profile."""
        ...

    def time(
        self,
        variant: Contender,
        baseline: Contender | None,
        inputs: Batch,
        batch_sizes: Sequence[int],
        *,
        effort: Effort,
        seed: int,
    ) -> Timing:
        """Service times, and the speedup where there is a baseline; see `timing.measure`."""
        ...

    def memory_bytes(self, contender: Contender, batch: Batch) -> int:
        """Resident memory that all instances of the contender take in a process of their own,
        after each ran the batch: engine, weights and buffers, beyond the bare interpreter's."""
        ...

    def joules(self, contender: Contender, batch: Batch, seconds: float) -> float | None:
        """Energy of one run of the batch, in the mean over `seconds` in which all instances run
        it over and over, by the machine's counters; None where it has none that can be read."""
        ...
