"""The service-level objective: one definition for search, server, load test and alerts.

Pure: it imports neither Locust nor an engine, and touches nothing but the file it is given.
Words follow the SRE workbook; the accuracy floor is ours, since a variant that is fast and
wrong keeps no promise.
"""

import math
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from loadtest.document import Strict, read_document

API_VERSION = "trimserve/v1"
REQUESTS_CONFIDENCE = 0.95
"""With which a load test has to show the latency quantile."""

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LatencyObjective(Strict):
    """`quantile` of the requests is answered within `threshold_ms`, from the intended send."""

    quantile: float = 0.99
    threshold_ms: float = Field(gt=0, le=600_000, allow_inf_nan=False)

    @field_validator("quantile")
    @classmethod
    def _quantile_is_a_share(cls, value: float) -> float:
        if 1 < value < 100:
            raise ValueError(f"want a share of the requests: did you mean {value / 100:g}?")
        if not 0 < value < 1:
            raise ValueError("want a share above 0 and below 1, for example 0.99")
        return value

    @property
    def threshold_s(self) -> float:
        return self.threshold_ms / 1e3


class InputLengths(Strict):
    """Length of every variable axis but the batch, drawn uniformly for each request."""

    min: int = Field(ge=1, le=1_000_000)
    max: int = Field(ge=1, le=1_000_000)

    @field_validator("max")
    @classmethod
    def _max_is_not_below_min(cls, value: int, info: object) -> int:
        low = getattr(info, "data", {}).get("min")
        if low is not None and value < low:
            raise ValueError(f"want at least min ({low})")
        return value


class Workload(Strict):
    """The load for which the objective must hold."""

    arrivals: Literal["poisson", "constant"] = "poisson"
    rate_per_s: float = Field(gt=0, le=1_000_000, allow_inf_nan=False)
    rows: int = Field(default=1, ge=1, le=65_536)
    encoding: Literal["binary", "json"] = "binary"
    input_lengths: InputLengths | None = None


class AccuracyObjective(Strict):
    """How far accuracy may fall below the base model's, in percentage points.

    `bound`: the upper confidence bound of the drop must be within it; `estimate`: the measured
    drop itself, which a small sample can flatter.
    """

    max_drop_points: float = Field(ge=0, le=100, allow_inf_nan=False)
    judged_by: Literal["bound", "estimate"] = "bound"
    confidence: float = 0.95

    @field_validator("confidence")
    @classmethod
    def _confidence_is_a_probability(cls, value: float) -> float:
        if 1 < value < 100:
            raise ValueError(f"want a probability: did you mean {value / 100:g}?")
        if not 0.5 <= value < 1:
            raise ValueError("want a probability of at least 0.5 and below 1, for example 0.95")
        return value

    @model_validator(mode="after")
    def _bound_can_be_shown(self) -> Self:
        if self.judged_by == "bound" and self.max_drop_points == 0:
            raise ValueError("max_drop_points 0 can't be shown by a bound, want more, or estimate")
        return self

    @property
    def max_drop(self) -> float:
        """The largest allowed drop as a share, 0 to 1."""
        return self.max_drop_points / 100

    def min_samples(self) -> int:
        """The fewest samples with which any variant can pass.

        The bound is Tango's score bound (see `optimizer.stats`); with not one sample on which
        base and variant disagree it is z²/(n + z²), which must not exceed `max_drop`.
        """
        if self.judged_by == "estimate":
            return 1
        z = NormalDist().inv_cdf(self.confidence)
        return max(1, math.ceil(z * z * (1 - self.max_drop) / self.max_drop))


class Slo(Strict):
    """A promise: latency at a load, share of successes, accuracy."""

    api_version: Literal["trimserve/v1"] = Field(alias="apiVersion")
    kind: Literal["SLO"]
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
    latency: LatencyObjective
    workload: Workload
    success_ratio: float = 0.999
    window_s: float = Field(default=30, ge=1, le=86_400, allow_inf_nan=False)
    accuracy: AccuracyObjective | None = None

    @field_validator("success_ratio")
    @classmethod
    def _success_ratio_is_a_share(cls, value: float) -> float:
        if 1 < value <= 100:
            raise ValueError(f"want a share of the requests: did you mean {value / 100:g}?")
        if not 0 < value <= 1:
            raise ValueError("want a share above 0 and at most 1, for example 0.999")
        return value

    def planned_requests(self) -> float:
        """Expected number of requests in the measurement window."""
        return self.workload.rate_per_s * self.window_s

    def min_requests(self) -> int:
        """The fewest requests, all good, that show the latency quantile: 299 for 0.99.

        So many independent ones are all good with a probability of `REQUESTS_CONFIDENCE` less
        than 1, if the share of good ones is just the quantile.
        """
        quantile = self.latency.quantile
        return math.ceil(math.log(1 - REQUESTS_CONFIDENCE) / math.log(quantile))

    def to_dict(self) -> dict[str, object]:
        """The document as plain values, the way `read_slo` reads it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def read_slo(path: Path) -> Slo:
    """Read an SLO file. Raises loadtest.document.DocumentInvalid, which says where and what."""
    return read_document(path, Slo)


def histogram_edges(threshold_s: float) -> tuple[float, ...]:
    """Edges of a latency histogram, in seconds, with one exactly on the threshold.

    Dense around the threshold, where the verdict is made, and geometric towards both ends
    (0.1 ms to at least 10 s). Rounded to 9 significant digits, so that 0.05 is printed as 0.05.
    """
    near = [threshold_s * share for share in (0.5, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4)]
    low = [threshold_s * 0.5 / 1.5**step for step in range(1, 40)]
    high = [threshold_s * 4 * 1.5**step for step in range(1, 40)]
    far = [edge for edge in low if edge >= 1e-4]
    far += [edge for index, edge in enumerate(high) if index == 0 or high[index - 1] < 10]
    return tuple(sorted({float(f"{edge:.9g}") for edge in (*far, *near)} | {threshold_s}))
