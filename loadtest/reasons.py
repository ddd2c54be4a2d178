"""Why a run isn't met: each reason a value with its numbers, and a message for people.

Knows what to say, not when: that is the verdict's.
"""

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from loadtest.document import Strict


class Reason(Strict):
    """Base of all reasons; `kind` names the class in a report."""

    @property
    @abstractmethod
    def message(self) -> str:
        """The reason as a sentence with its numbers, and what to do where something can be."""


class LatencyMissed(Reason):
    kind: Literal["latency_missed"] = "latency_missed"
    quantile: float
    threshold_s: float
    good_share: float
    latency_at_quantile_s: float | None
    """none: not even that share was answered"""

    @property
    def message(self) -> str:
        observed = (
            "has no answer at all"
            if self.latency_at_quantile_s is None
            else f"took {_ms(self.latency_at_quantile_s)}"
        )
        return (
            f"{_share(self.good_share)} of the requests were answered correctly within "
            f"{_ms(self.threshold_s)}, want {_share(self.quantile)}; the request at that "
            f"quantile {observed}"
        )


class SuccessRatioMissed(Reason):
    kind: Literal["success_ratio_missed"] = "success_ratio_missed"
    success_ratio: float
    observed: float
    n_failed: int
    n: int

    @property
    def message(self) -> str:
        return (
            f"{self.n_failed} of {self.n} requests failed: {_share(self.observed)} succeeded, "
            f"want {_share(self.success_ratio)}"
        )


class TooFewRequests(Reason):
    kind: Literal["too_few_requests"] = "too_few_requests"
    quantile: float
    n: int
    needed: int

    @property
    def message(self) -> str:
        return (
            f"{self.n} requests can't show a quantile of {self.quantile:g}, even if all are "
            f"good: want at least {self.needed}, {self.needed - self.n} more, so a longer "
            "--duration-s"
        )


class TooCloseToCall(Reason):
    kind: Literal["too_close_to_call"] = "too_close_to_call"
    quantile: float
    good_share: float
    lower_bound: float
    n: int
    needed: int | None
    """about how many requests would show it, if the share stays; none: no number would"""

    @property
    def message(self) -> str:
        advice = (
            "no number of requests shows a share that may be just the one wanted"
            if self.needed is None
            else f"about {self.needed} requests would show it, {max(1, self.needed - self.n)} "
            "more, so a longer --duration-s"
        )
        return (
            f"{_share(self.good_share)} of {self.n} requests were good, but the lower bound "
            f"of that share is {_share(self.lower_bound)}, below {_share(self.quantile)}: {advice}"
        )


class RequestsCorrelated(Reason):
    kind: Literal["requests_correlated"] = "requests_correlated"
    correlation_requests: float
    effective_n: int
    n: int
    needed: int

    @property
    def message(self) -> str:
        return (
            f"slow requests come in bursts: {self.n} say no more than {self.effective_n} "
            f"independent ones; about {self.needed} would do, so a longer --duration-s: "
            f"{max(1, self.needed - self.n)} more"
        )


class RateNotReached(Reason):
    kind: Literal["rate_not_reached"] = "rate_not_reached"
    planned_per_s: float
    achieved_per_s: float
    min_share: float

    @property
    def message(self) -> str:
        return (
            f"sent {self.achieved_per_s:.5g} requests/s of {self.planned_per_s:.5g} planned, "
            f"want {_share(self.min_share)}: use a faster or idler machine for the load test"
        )


class LoopClosed(Reason):
    kind: Literal["loop_closed"] = "loop_closed"
    n_clients: int
    achieved_per_s: float
    rate_per_s: float

    @property
    def message(self) -> str:
        return (
            f"{self.n_clients} clients waited for their answers (--closed-loop) and sent "
            f"{self.achieved_per_s:.5g} requests/s, the promise is for {self.rate_per_s:.5g} "
            "that come whatever the server does: leave --closed-loop out for a verdict"
        )


class RequestsDropped(Reason):
    kind: Literal["requests_dropped"] = "requests_dropped"
    n_dropped: int
    n: int
    max_in_flight: int

    @property
    def message(self) -> str:
        return (
            f"{self.n_dropped} of {self.n} requests weren't sent, as {self.max_in_flight} were "
            "in flight: raise --max-in-flight, unless the server is far from keeping up"
        )


class RequestsInvalid(Reason):
    kind: Literal["requests_invalid"] = "requests_invalid"
    n_invalid: int
    n: int

    @property
    def message(self) -> str:
        return (
            f"the server refused {self.n_invalid} of {self.n} requests as invalid, so they say "
            "nothing of its load: want a workload, or --inputs, that the model takes"
        )


class AnswersUngraded(Reason):
    kind: Literal["answers_ungraded"] = "answers_ungraded"
    n_ungraded: int
    n_ok: int
    output: str

    @property
    def message(self) -> str:
        return (
            f"{self.n_ungraded} of {self.n_ok} successful answers have no output "
            f"'{self.output}' of numbers [rows, classes], so the accuracy isn't known: want "
            "another --label-output"
        )


class GeneratorLagged(Reason):
    kind: Literal["generator_lagged"] = "generator_lagged"
    lag_p99_s: float
    limit_s: float
    good_share: float
    good_share_from_send: float

    @property
    def message(self) -> str:
        return (
            f"requests were sent up to {_ms(self.lag_p99_s)} late (p99), want "
            f"{_ms(self.limit_s)}, and it matters: {_share(self.good_share)} are good from the "
            f"intended send, {_share(self.good_share_from_send)} from the actual one"
        )


class GeneratorBusy(Reason):
    kind: Literal["generator_busy"] = "generator_busy"
    cpu_share: float
    limit: float

    @property
    def message(self) -> str:
        return (
            f"the load generator used {_share(self.cpu_share)} of its core, want at most "
            f"{_share(self.limit)}: what it measured may be itself"
        )


class MetricsUnreadable(Reason):
    kind: Literal["metrics_unreadable"] = "metrics_unreadable"
    error: str

    @property
    def message(self) -> str:
        return f"the server's metrics can't be read: {self.error}"


class MetricMissing(Reason):
    kind: Literal["metric_missing"] = "metric_missing"
    url: str
    transport: str

    @property
    def message(self) -> str:
        return (
            f"{self.url} doesn't count this model's {self.transport} requests: give the right "
            "--metrics-url, or --no-server-metrics for a server that isn't trimserve"
        )


class EdgeMissing(Reason):
    kind: Literal["edge_missing"] = "edge_missing"
    url: str
    threshold_s: float
    edges_s: tuple[float, ...]

    @property
    def message(self) -> str:
        edges = ", ".join(f"{edge:g}" for edge in self.edges_s) or "none"
        return (
            f"{self.url}: no histogram edge at {self.threshold_s:g} s (there are {edges}): "
            "start the server with --slo and this objective"
        )


class CountsDisagree(Reason):
    """The server counted other requests than these: lost ones, or somebody else's."""

    kind: Literal["counts_disagree"] = "counts_disagree"
    transport: str
    what: Literal["requests", "successes"]
    client_least: int
    client_most: int
    server: int

    @property
    def message(self) -> str:
        span = (
            str(self.client_least)
            if self.client_least == self.client_most
            else f"{self.client_least} to {self.client_most}"
        )
        return (
            f"the server counted {self.server} {self.transport} {self.what}, the client {span}: "
            "is there other traffic, or a server whose --metrics-url is missing?"
        )


class ServerSlowerThanClient(Reason):
    kind: Literal["server_slower_than_client"] = "server_slower_than_client"
    transport: str
    client_over: int
    server_over: int

    @property
    def message(self) -> str:
        return (
            f"the server counted {self.server_over} {self.transport} requests over the "
            f"threshold, the client {self.client_over}: it can't see more than the client waits"
        )


class ServerRestarted(Reason):
    kind: Literal["server_restarted"] = "server_restarted"
    url: str

    @property
    def message(self) -> str:
        return f"the server behind {self.url} restarted during the measurement"


class ScrapesMissing(Reason):
    """Prometheus didn't see all of the window, so it can't say that nothing happened in it."""

    kind: Literal["scrapes_missing"] = "scrapes_missing"
    url: str
    n_scrapes: int
    n_failed: int
    longest_gap_s: float
    interval_s: float

    @property
    def message(self) -> str:
        return (
            f"Prometheus didn't see all of the window: of {self.n_scrapes} scrapes of {self.url} "
            f"{self.n_failed} failed, and up to {self.longest_gap_s:.3g} s lie between two, "
            f"want one every {self.interval_s:g} s"
        )


class LatencyDrifts(Reason):
    kind: Literal["latency_drifts"] = "latency_drifts"
    quantile: float
    threshold_s: float
    latency_s: float
    """by the trend, at the end of the window"""
    growth_s_per_hour: float
    least_growth_s_per_hour: float
    reached_in_s: float
    """seconds from the window's end, at the least growth"""
    horizon_s: float

    @property
    def message(self) -> str:
        return (
            f"latency at quantile {self.quantile:g} grows by {_ms(self.growth_s_per_hour)} an "
            f"hour (at least {_ms(self.least_growth_s_per_hour)}, 95 % sure) and was "
            f"{_ms(self.latency_s)} at the end: it reaches {_ms(self.threshold_s)} within "
            f"{_hours(self.reached_in_s)}, want that not before {_hours(self.horizon_s)}"
        )


class MemoryGrows(Reason):
    kind: Literal["memory_grows"] = "memory_grows"
    url: str
    memory_bytes: float
    """by the trend, at the end of the window"""
    limit_bytes: float
    growth_bytes_per_hour: float
    least_growth_bytes_per_hour: float
    reached_in_s: float
    horizon_s: float

    @property
    def message(self) -> str:
        return (
            f"the memory of {self.url} grows by {_mb(self.growth_bytes_per_hour)} an hour (at "
            f"least {_mb(self.least_growth_bytes_per_hour)}, 95 % sure) and was "
            f"{_mb(self.memory_bytes)} at the end: it reaches {_mb(self.limit_bytes)} within "
            f"{_hours(self.reached_in_s)}, want that not before {_hours(self.horizon_s)}"
        )


class RecoveryMissed(Reason):
    kind: Literal["recovery_missed"] = "recovery_missed"
    action: str
    recovery_s: float | None
    """none: not within the window"""
    max_recovery_s: float
    hold_s: float

    @property
    def message(self) -> str:
        observed = (
            "the server hadn't recovered by the window's end"
            if self.recovery_s is None
            else f"the server recovered in {self.recovery_s:.4g} s"
        )
        return (
            f"{self.action}: {observed}, want {self.max_recovery_s:g} s until the objective is "
            f"kept for {self.hold_s:g} s"
        )


class LossesMissed(Reason):
    kind: Literal["losses_missed"] = "losses_missed"
    action: str
    n_lost: int
    max_lost: int

    @property
    def message(self) -> str:
        return (
            f"{self.action}: {self.n_lost} requests were lost until the server recovered, want "
            f"at most {self.max_lost}"
        )


class ActionNotPerformed(Reason):
    kind: Literal["action_not_performed"] = "action_not_performed"
    action: str
    error: str

    @property
    def message(self) -> str:
        return f"{self.action} of --chaos failed: {self.error}"


AnyReason = Annotated[
    LatencyMissed
    | SuccessRatioMissed
    | TooFewRequests
    | TooCloseToCall
    | RequestsCorrelated
    | RateNotReached
    | LoopClosed
    | RequestsDropped
    | RequestsInvalid
    | AnswersUngraded
    | GeneratorLagged
    | GeneratorBusy
    | MetricsUnreadable
    | MetricMissing
    | EdgeMissing
    | CountsDisagree
    | ServerSlowerThanClient
    | ServerRestarted
    | ScrapesMissing
    | LatencyDrifts
    | MemoryGrows
    | RecoveryMissed
    | LossesMissed
    | ActionNotPerformed,
    Field(discriminator="kind"),
]


def _share(value: float) -> str:
    return f"{value * 100:.6g} %"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.4g} MB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h"
