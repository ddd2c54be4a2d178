"""The outcome of a study: the answer, every variant that was looked at, and how to get it again.

Plain values that survive a round trip through JSON. It knows neither how they were found
(`optimizer.study`) nor how they are shown (`optimizer.report`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import pydantic

from loadtest.slo import Slo
from optimizer.architectures import ArchitectureRecord, Network, ProposerRecord
from optimizer.errors import OptimizerError
from serve.artifact import Quality, ServiceTime, Step
from serve.machine import Machine

SCHEMA_VERSION = 1
MAX_RESULT_BYTES = 64_000_000

Outcome = Literal["met", "infeasible", "inconclusive", "unverified"]
"""`met`: the chosen variant kept the SLO on the real server. `infeasible`: no variant can.
`inconclusive`: the evidence decides neither way. `unverified`: a variant is predicted to keep it,
and nothing was asked to check that."""

Status = Literal["chosen", "verified", "unverified", "infeasible", "dropped"]
"""`infeasible`: it breaks a constraint of the SLO. `dropped`: it never got that far (it couldn't
be built, computed something else, or the budget ended)."""

Constraint = Literal[
    "accuracy_drop", "accuracy_samples", "latency", "rate", "success_ratio", "size", "memory",
    "outclassed", "applicable", "built", "parity", "budget", "evidence",
]  # fmt: skip
"""What a variant failed. The last five may have no number to compare: `detail` says what happened.
`outclassed`: a candidate is so much better that nothing more was asked of it."""

Unit = Literal["", "s", "1", "1/s", "bytes", "samples"]
"""Of a reason's value and limit; `1` is a share, 0 to 1."""

Verdict = Literal["met", "violated", "inconclusive"]

LEVELS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999, 1.0)
"""Shares at which distributions of seconds are kept."""


class ResultInvalid(OptimizerError):
    """A JSON document that isn't the result of a study that this version can read."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


@dataclass(frozen=True)
class Reason:
    """Why a variant isn't the answer: its `value` is on the wrong side of `limit`."""

    constraint: Constraint
    value: float | None = None
    limit: float | None = None
    unit: Unit = ""
    detail: str = ""


@dataclass(frozen=True)
class Speedup:
    """Seconds of the baseline over those of the variant, timed in turns; above 1 is faster.

    `noisy`: the interval stayed too wide to rank variants by, however often it was repeated.
    """

    low: float
    estimate: float
    high: float
    confidence: float
    batch_size: int
    n_pairs: int
    noisy: bool = False


@dataclass(frozen=True)
class InstanceTimes:
    """Service times, by rising batch size, of one instance of `threads` threads while
    `instances` of them are busy. With `padded`, these are the only sizes that run: a batch is
    padded to the next of them. `quantiles` are the seconds of each size at `LEVELS`, empty where
    they weren't kept."""

    instances: int
    threads: int
    times: tuple[ServiceTime, ...]
    padded: bool = False
    quantiles: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class KernelShare:
    """A kernel that the engine really ran, and its share of the seconds of a run."""

    kernel: str
    operator: str
    precision: str
    n_nodes: int
    time_share: float


@dataclass(frozen=True)
class Prediction:
    """What a simulation says of one replica at `rate_per_s` requests a second.

    Quantiles count from the arrival of a request and are infinite where that many were refused.
    `slo_latency_s` is at the quantile of the SLO. `utilization` is the busy share of the
    instances' time, `mean_batch_rows` the rows of a batch in the mean over batches.
    """

    rate_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    slo_latency_s: float
    goodput_per_s: float
    success_ratio: float
    utilization: float
    mean_batch_rows: float
    n_requests: int


@dataclass(frozen=True)
class ServingChoice:
    """How to serve a variant, and what that costs.

    `replicas` of this configuration carry the SLO's rate, and `prediction` is for one of them at
    its part of it. `max_rate_per_s` is what one replica sustains within the SLO, 0 where there is
    no such rate; `cost_per_million` is the price of a million inferences (rows, not requests) by
    a replica at that rate, infinite for 0.
    """

    instances: int
    threads: int
    max_batch_size: int
    max_queue_delay_s: float
    replicas: int
    max_rate_per_s: float
    cost_per_million: float
    prediction: Prediction


@dataclass(frozen=True)
class Verification:
    """A load test of the variant on the real server: one replica at its part of the SLO's rate.

    `slo_latency_s` is at the quantile of the SLO, and `slo_latency_bound_s` its upper confidence
    bound: the promise is kept where that is within the threshold. Figures are missing where the
    test ended before it had them, the bound also where so few requests can't bound it; `reasons`
    are the load test's own sentences.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    p50_s: float | None = None
    p99_s: float | None = None
    slo_latency_s: float | None = None
    slo_latency_bound_s: float | None = None
    bound_confidence: float | None = None
    rate_per_s: float | None = None
    goodput_per_s: float | None = None
    success_ratio: float | None = None
    n_requests: int = 0


@dataclass(frozen=True)
class Variant:
    """One row: what a recipe made of the model. The baseline's recipe is empty or plain
    compilation, and its id the study's `baseline_id`.

    `quality` is on the validation split, `test_quality` on the locked test split, which only the
    answer sees. `int8_share` is the share of the convolutions' and matrix products' work that
    ran in int8 kernels, by the engine's own profile. `version` is set where it was published.
    """

    id: str
    label: str
    status: Status
    recipe: tuple[Step, ...] = ()
    reasons: tuple[Reason, ...] = ()
    engine: str = ""
    precision: str = ""
    quality: Quality | None = None
    test_quality: Quality | None = None
    service_times: tuple[InstanceTimes, ...] = ()
    speedup: Speedup | None = None
    int8_share: float | None = None
    kernels: tuple[KernelShare, ...] = ()
    size_bytes: int | None = None
    memory_bytes: int | None = None
    joules: float | None = None
    """Of one inference, in the mean over batches of the largest size."""
    drop_bound_among_all: float | None = None
    """The drop's upper bound, corrected for having picked the best of all variants compared."""
    build_s: float | None = None
    serving: ServingChoice | None = None
    verification: Verification | None = None
    version: str = ""


@dataclass(frozen=True)
class BudgetUsed:
    """`screened` counts the recipes that were ruled out by estimate and are no trials."""

    wall_clock_s: float
    max_wall_clock_s: float
    trials: int
    max_trials: int
    training_epochs: float = 0.0
    max_training_epochs: float | None = None
    screened: int = 0


@dataclass(frozen=True)
class NearestMiss:
    """Where nothing is feasible: the variant that came closest, and the constraint that binds."""

    variant_id: str
    binding: Reason


@dataclass(frozen=True)
class Relaxation:
    """What giving way on one constraint alone would buy: with `limit` moved from `from_limit` to
    `to_limit`, the variant would be the answer, at `value` of the objective."""

    constraint: Constraint
    from_limit: float
    to_limit: float
    unit: Unit
    variant_id: str
    value: float


@dataclass(frozen=True)
class RungRecord:
    """What one rung of the ladder did. `n_entered` trials came to it, `n_dropped` went no
    further; it took `spent_s`, and dropping them saved `saved_s` of the rungs above, by what
    those took in the mean for the trials that came to them."""

    rung: int
    name: str
    n_entered: int
    n_dropped: int
    spent_s: float
    saved_s: float


@dataclass(frozen=True)
class Ablation:
    """The answer without one of its steps: what that step contributed.

    `without_id` is the variant without `technique`. Differences are the answer's value minus the
    other's: of the price of a million inferences, seconds of latency at the SLO's quantile, the
    accuracy drop (a share) and bytes; None where either isn't known.
    """

    technique: str
    without_id: str
    cost_per_million: float | None = None
    latency_s: float | None = None
    drop: float | None = None
    size_bytes: float | None = None


@dataclass(frozen=True)
class Layer:
    """A heavy operator of the model, in the base and in the answer. Shapes are those of its
    weights; empty, and times None, where the layer isn't there or isn't told apart."""

    name: str
    operator: str
    base_shape: tuple[int, ...]
    shape: tuple[int, ...]
    base_precision: str
    precision: str
    base_s: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Fusion:
    """Operators of the graph that one kernel computes, `n` times in a run, and the seconds of all:
    `base_s` in kernels of their own, without any optimization. No operators: a kernel that the
    engine added, to convert a layout or type. No kernel: operators that are gone."""

    operators: tuple[str, ...]
    kernel: str
    precision: str
    n: int
    base_s: float
    seconds: float


@dataclass(frozen=True)
class Target:
    """One replica's machine and what it costs."""

    device: str
    cores: int
    price_per_core_hour: float


@dataclass(frozen=True)
class StudyResult:
    """The answer of a study and the evidence for it.

    `data_digests` is by split, `seeds` by what they seed, `versions` by package. `command` makes
    it again; the same measurements make the same choice.
    """

    model: str
    slo: Slo
    objective: Literal["cost", "latency", "size", "energy"]
    outcome: Outcome
    variants: tuple[Variant, ...]
    baseline_id: str
    target: Target
    machine: Machine
    spec_digest: str
    data_digests: Mapping[str, str]
    seeds: Mapping[str, int]
    budget: BudgetUsed
    versions: Mapping[str, str]
    command: tuple[str, ...]
    finished_at: str
    """ISO 8601, UTC."""
    nearest_miss: NearestMiss | None = None
    relaxations: tuple[Relaxation, ...] = ()
    """Where nothing is feasible: the smallest step on each constraint that would change that."""
    rungs: tuple[RungRecord, ...] = ()
    ablations: tuple[Ablation, ...] = ()
    layers: tuple[Layer, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    """Of the answer, where it was made from an ONNX graph."""
    architectures: tuple[ArchitectureRecord, ...] = ()
    """The searches for another network that the variants come of."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the answer should know, for example that the machine was noisy."""
    schema_version: int = SCHEMA_VERSION

    @property
    def chosen(self) -> Variant | None:
        return next((variant for variant in self.variants if variant.status == "chosen"), None)

    @property
    def baseline(self) -> Variant | None:
        return self.variant(self.baseline_id)

    def variant(self, variant_id: str) -> Variant | None:
        return next((variant for variant in self.variants if variant.id == variant_id), None)


def to_json(result: StudyResult) -> str:
    """The result as JSON, infinite numbers as the string "Infinity"."""
    document = _in_words(_adapter().dump_python(result, mode="json", by_alias=True))
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str | bytes, source: str = "result") -> StudyResult:
    """Read what `to_json` wrote; `source` names it in errors. Raises ResultInvalid.

    A newer schema is refused; older ones will be migrated here.
    """
    if len(text) > MAX_RESULT_BYTES:
        raise ResultInvalid(source, f"over {MAX_RESULT_BYTES} bytes")
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResultInvalid(source, f"not valid JSON: {error}") from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != SCHEMA_VERSION:
        raise ResultInvalid(source, f"schema_version: got {found!r}, want {SCHEMA_VERSION}")
    try:
        return _adapter().validate_json(text)
    except pydantic.ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in detail["loc"])
        raise ResultInvalid(source, f"{key}: {detail['msg']}") from error


def variant_to_dict(variant: Variant) -> Any:
    """The row as JSON can hold it, what isn't finite as a string."""
    return _in_words(_rows().dump_python(variant, mode="json"))


def variant_from_dict(stored: Any) -> Variant:
    """What `variant_to_dict` gave. Raises ResultInvalid."""
    try:
        return _rows().validate_json(json.dumps(stored))
    except pydantic.ValidationError as error:
        raise ResultInvalid("trial log", str(error)) from error


def _in_words(value: Any) -> Any:
    """pydantic does it only in JSON text, and not for the dataclasses of other modules."""
    if isinstance(value, dict):
        return {name: _in_words(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_in_words(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


_KINDS = (
    Reason, Speedup, InstanceTimes, KernelShare, Prediction, ServingChoice, Verification, Variant,
    BudgetUsed, NearestMiss, Relaxation, RungRecord, Ablation, Layer, Fusion, Target,
    Network, ProposerRecord, ArchitectureRecord, StudyResult,
)  # fmt: skip
for _kind in _KINDS:
    _config = pydantic.ConfigDict(extra="forbid", ser_json_inf_nan="strings")
    setattr(_kind, "__pydantic_config__", _config)  # noqa: B010


@cache
def _adapter() -> pydantic.TypeAdapter[StudyResult]:
    return pydantic.TypeAdapter(StudyResult)


@cache
def _rows() -> pydantic.TypeAdapter[Variant]:
    return pydantic.TypeAdapter(Variant)
