"""Statistics of a version, as Triton's statistics extension counts them.

Plain counters that one owner, the event loop, adds to; scrapes read them from another thread, so a
reader may see one counter a request ahead of the next. It knows no transport and no metric names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serve.batcher import Batch, Phases, Timing

# Why a request failed, in Triton's words.
FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
# Code of a serve error -> the reason.
_REASONS = {
    "queue_full": "REJECTED",
    "deadline_exceeded": "REJECTED",
    "shutting_down": "REJECTED",
    "cancelled": "CANCELED",
    "engine_failed": "BACKEND",
}


@dataclass(slots=True)
class Duration:
    """How often something happened, and for how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += int(seconds * 1e9)


@dataclass(slots=True)
class BatchStatistics:
    """The batches of one size, in rows."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class Statistics:
    """Counters of one version since it was first loaded.

    `inference_count` is in rows and `execution_count` in batches; both, and the compute phases,
    leave out cache hits and requests merged into others. `cache_miss` is the time of keeping. A
    request's phases are those of its batch, whole; the compute phases have equal counts.
    `last_inference_ms` is wall-clock time since 1970.
    """

    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURE_REASONS, 0))
    batches: dict[int, BatchStatistics] = field(default_factory=dict)

    def durations(self) -> Iterator[tuple[str, Duration]]:
        """Name and value of every duration, in Triton's order."""
        for name in (
            "success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
            "cache_hit", "cache_miss",
        ):  # fmt: skip
            yield name, getattr(self, name)

    def answered(self, seconds: float, n_rows: int, timings: Sequence[Timing], now_ms: int) -> None:
        """A request of `n_rows` was answered with its outputs after `seconds`; `timings` are those
        of its batches, none where its answer was in the cache."""
        self.success.add(seconds)
        self.last_inference_ms = now_ms
        if not timings:
            self.queue.add(0.0)
            return
        self.inference_count += n_rows
        timing = timings[0] if len(timings) == 1 else _joined(timings)
        self.queue.add(timing.queue_s)
        self.compute_input.add(timing.phases.assemble_s)
        self.compute_infer.add(timing.phases.execute_s)
        self.compute_output.add(timing.phases.split_s)

    def failed(self, seconds: float, code: str) -> None:
        """A request ended with the error `code` after `seconds`."""
        self.fail.add(seconds)
        self.failures[_REASONS.get(code, "OTHER")] += 1

    def executed(self, batch: Batch) -> None:
        """A batch was run."""
        self.execution_count += 1
        batches = self.batches.setdefault(batch.n_rows, BatchStatistics())
        batches.compute_input.add(batch.phases.assemble_s)
        batches.compute_infer.add(batch.phases.execute_s)
        batches.compute_output.add(batch.phases.split_s)


def _joined(timings: Sequence[Timing]) -> Timing:
    """That of a request in several batches: their phases in all, and the longest wait."""
    return Timing(
        max(timing.queue_s for timing in timings),
        Phases(
            sum(timing.phases.assemble_s for timing in timings),
            sum(timing.phases.execute_s for timing in timings),
            sum(timing.phases.split_s for timing in timings),
        ),
        sum(timing.batch_rows for timing in timings),
    )
