"""Warming up: every batch size, and every bucket of lengths, is run on every instance and timed.

Batching starts from what this machine needs, whatever the version's profile says. It knows
engines and their shapes, not requests.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping

import numpy as np

from serve.artifact import Manifest
from serve.batch_policy import BatchQueue, Limits, ServiceTimes
from serve.batcher import Work
from serve.engines import Engine
from serve.tensor import NUMPY_DTYPES, Array, TensorSpec

WARMUP_RUNS = 3
# Of axes that vary, in turn until one of them runs: not every model takes every length.
TRIAL_LENGTHS = (8, 16, 32, 64, 128, 224, 256, 512)


def measured_queue(manifest: Manifest, engines: list[Engine]) -> BatchQueue[Work]:
    """The queue with the service times that warming up measured, by bucket where lengths are
    padded."""
    limits = Limits(
        max_batch_size=manifest.batching.max_batch_size or 1,
        max_queue_size=manifest.batching.max_queue_size,
        max_queue_delay_s=manifest.batching.max_queue_delay_s,
        n_instances=manifest.engine.instances,
    )
    if manifest.padding is None:
        return BatchQueue(limits, _warmed_up(manifest, engines, {}))
    by_bucket: dict[Hashable, ServiceTimes] = {}
    for bucket in manifest.padding.buckets:
        lengths = {(one.tensor, one.axis): bucket for one in manifest.padding.inputs}
        by_bucket[bucket] = _warmed_up(manifest, engines, lengths)
    return BatchQueue(limits, by_bucket[manifest.padding.max_length], by_bucket)


def shape_of(
    spec: TensorSpec, size: int, length: int, lengths: Mapping[tuple[str, int], int] | None = None
) -> tuple[int, ...]:
    """A shape to try a model with: `size` rows, `lengths` on the axes they are given for, and
    `length` on others that vary."""
    shape = [length if axis == -1 else axis for axis in spec.shape]
    if spec.shape and spec.shape[0] == -1:
        shape[0] = size
    for (name, axis), given in (lengths or {}).items():
        if name == spec.name:
            shape[axis] = given
    return tuple(shape)


def trial_length(engine: Engine, inputs: Callable[[int], Mapping[str, Array]]) -> int:
    """The first length with which the model runs. Raises what the engine raises at the first,
    where it runs with none."""
    problem: Exception | None = None
    for length in TRIAL_LENGTHS:
        try:
            engine.run(inputs(length))
            return length
        except Exception as error:  # noqa: BLE001 - engines raise anything; the first one goes on
            problem = problem or error
    assert problem is not None
    raise problem


def _warmed_up(
    manifest: Manifest, engines: list[Engine], lengths: Mapping[tuple[str, int], int]
) -> ServiceTimes:
    """Run every batch size on every instance, and return how long they take here."""
    sizes = _batch_sizes(manifest)

    def inputs(size: int, length: int) -> dict[str, Array]:
        specs = manifest.signature.inputs
        return {spec.name: _zeros(spec, shape_of(spec, size, length, lengths)) for spec in specs}

    length = trial_length(engines[0], lambda length: inputs(sizes[0], length))
    seconds = []
    for size in sizes:
        given = inputs(size, length)
        for engine in engines:
            runs = [_timed(engine, given) for _ in range(WARMUP_RUNS)]
        seconds.append(max(statistics.median(runs), 1e-6))
    # Times must rise with the size; what noise says otherwise is smoothed away.
    return ServiceTimes(sizes, np.maximum.accumulate(seconds).tolist(), _is_padded(manifest))


def _zeros(spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    if spec.datatype == "BYTES":
        return np.full(shape, b"", object)
    return np.zeros(shape, NUMPY_DTYPES[spec.datatype])


def _batch_sizes(manifest: Manifest) -> tuple[int, ...]:
    largest = manifest.batching.max_batch_size or 1
    if _is_padded(manifest):
        return tuple(sorted({*manifest.engine.batch_sizes, largest}))
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return (*powers, largest)


def _is_padded(manifest: Manifest) -> bool:
    return bool(manifest.engine.batch_sizes) and manifest.batching.max_batch_size > 0


def _timed(engine: Engine, inputs: Mapping[str, Array]) -> float:
    started = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - started
