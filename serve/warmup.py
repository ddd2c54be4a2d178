"""Warming up: every batch size, and every bucket of lengths, is run on every instance and timed.

Batching starts from what this machine needs, whatever the version's profile says. It knows
engines and their shapes, not requests.
"""

import statistics
import time
from collections.abc import Hashable, Mapping

import numpy as np

from serve.artifact import Manifest
from serve.batch_policy import BatchQueue, Limits, ServiceTimes
from serve.batcher import Work
from serve.engines import Engine
from serve.tensor import NUMPY_DTYPES, Array, TensorSpec

WARMUP_RUNS = 3
_VARIABLE_AXIS_LENGTH = 8  # of what a model with variable axes is tried with


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
    spec: TensorSpec, size: int, lengths: Mapping[tuple[str, int], int]
) -> tuple[int, ...]:
    """A shape to try a model with: `size` rows, `lengths` on the axes they are given for."""
    shape = [_VARIABLE_AXIS_LENGTH if axis == -1 else axis for axis in spec.shape]
    if spec.shape and spec.shape[0] == -1:
        shape[0] = size
    for axis, length in ((axis, n) for (name, axis), n in lengths.items() if name == spec.name):
        shape[axis] = length
    return tuple(shape)


def _warmed_up(
    manifest: Manifest, engines: list[Engine], lengths: Mapping[tuple[str, int], int]
) -> ServiceTimes:
    """Run every batch size on every instance, and return how long they take here."""
    sizes = _batch_sizes(manifest)
    seconds = []
    for size in sizes:
        inputs = {
            spec.name: np.zeros(shape_of(spec, size, lengths), NUMPY_DTYPES[spec.datatype])
            for spec in engines[0].signature.inputs
        }
        for name, array in inputs.items():
            if array.dtype.kind == "O":
                inputs[name] = np.full(array.shape, b"", object)
        for engine in engines:
            runs = [_timed(engine, inputs) for _ in range(WARMUP_RUNS)]
        seconds.append(max(statistics.median(runs), 1e-6))
    # Times must rise with the size; what noise says otherwise is smoothed away.
    return ServiceTimes(sizes, np.maximum.accumulate(seconds).tolist(), _is_padded(manifest))


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
