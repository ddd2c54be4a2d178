"""A Prometheus server's HTTP API, as far as a load test asks it: targets, scrapes, raw counters.

Asks for raw samples only and computes nothing in PromQL: `increase()` and `rate()` extrapolate to
the edges of their range (https://prometheus.io/docs/prometheus/latest/querying/functions/), a
difference of two samples doesn't. Knows no load test.
"""

import http.client
import json
import math
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlencode, urlsplit

from loadtest.server_metrics import BATCH_ROWS, HISTOGRAM, START_TIME, Sample

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 200_000_000
MAX_SHOWN = 5
"""How many scraped addresses an error lists."""
PORTS = {"http": 80, "https": 443}
COUNTERS = (
    f"{HISTOGRAM}_bucket",
    f"{HISTOGRAM}_sum",
    f"{BATCH_ROWS}_count",
    f"{BATCH_ROWS}_sum",
    START_TIME,
)
DURATION = re.compile(r"(\d+)(ms|[smhdwy])")
UNITS_S = {
    "ms": 0.001,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86_400.0,
    "w": 604_800.0,
    "y": 31_536_000.0,
}


class PrometheusUnusable(Exception):
    """Prometheus can't be asked, or doesn't know the server; `str()` says what to change."""


@dataclass(frozen=True)
class ScrapeTarget:
    """One address that Prometheus scrapes."""

    url: str
    labels: Mapping[str, str]
    """after relabelling, as its series have them"""
    interval_s: float
    health: str
    """"up", "down" or "unknown" (not scraped yet)"""
    error: str
    """of the last scrape"""

    @property
    def selector(self) -> str:
        """The label matchers that pick this target's series, braces left out."""
        return ",".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in self.labels.items()
        )


class Prometheus:
    """The API at a base URL, with or without a path before `/api/v1`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def targets(self) -> tuple[ScrapeTarget, ...]:
        """All that is scraped. Raises PrometheusUnusable."""
        active = self._get("targets", {"state": "active"})["activeTargets"]
        return tuple(
            ScrapeTarget(
                url=one["scrapeUrl"],
                labels=one["labels"],
                interval_s=duration_s(one["scrapeInterval"]),
                health=one["health"],
                error=one.get("lastError", ""),
            )
            for one in active
        )

    def last_scrape_s(self, target: ScrapeTarget) -> float | None:
        """When the last scrape that has come in began, Unix time; none: never.

        A scrape that failed counts too: its `up` is 0.
        """
        found = self._query(f"timestamp(up{{{target.selector}}})")
        return max((float(one["value"][1]) for one in found), default=None)

    def counters_at(self, target: ScrapeTarget, at_s: float) -> list[Sample]:
        """The counters of the scrape at `at_s`, one of `last_scrape_s` or `scrapes`.

        A series that isn't in that scrape is marked stale and isn't among them.
        """
        name = "|".join(COUNTERS)
        found = self._query(f'{{__name__=~"{name}",{target.selector}}} @ {at_s:.3f}')
        return [_sample(one["metric"], float(one["value"][1])) for one in found]

    def scrapes(
        self, target: ScrapeTarget, from_s: float, to_s: float
    ) -> tuple[tuple[float, bool], ...]:
        """(Unix time, whether it succeeded) of all scrapes from `from_s` to `to_s`, both in it."""
        return tuple(
            (time_s, value == 1) for time_s, value in self.values(target, "up", from_s, to_s)
        )

    def values(
        self, target: ScrapeTarget, metric: str, from_s: float, to_s: float
    ) -> list[tuple[float, float]]:
        """(Unix time, value) of all samples of a metric that has one series a target."""
        # A second more, since Prometheus 3 leaves the left end of a range out.
        length_ms = math.ceil((to_s - from_s + 1) * 1e3)
        found = self._query(f"{metric}{{{target.selector}}}[{length_ms}ms] @ {to_s:.3f}")
        values = [(float(at), float(value)) for one in found for at, value in one["values"]]
        return sorted((at, value) for at, value in values if from_s - 5e-4 <= at <= to_s + 5e-4)

    def n_resets(self, target: ScrapeTarget, from_s: float, to_s: float) -> int:
        """How often counters of requests fell from one scrape to the next, over all series."""
        length_ms = math.ceil((to_s - from_s) * 1e3) + 1
        series = f"{HISTOGRAM}_count{{{target.selector}}}[{length_ms}ms] @ {to_s:.3f}"
        found = self._query(f"sum(resets({series}))")
        return int(sum(float(one["value"][1]) for one in found))

    def _query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self._get("query", {"query": expression})["result"]
        return result

    def _get(self, path: str, parameters: Mapping[str, str]) -> Any:
        base = parse_url(self.url)
        kind = http.client.HTTPSConnection if base.scheme == "https" else http.client.HTTPConnection
        connection = kind(base.hostname or "", base.port or PORTS[base.scheme], timeout=TIMEOUT_S)
        where = f"{self.url.rstrip('/')}/api/v1/{path}"
        try:
            prefix = base.path.rstrip("/")
            connection.request("GET", f"{prefix}/api/v1/{path}?{urlencode(parameters)}")
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise PrometheusUnusable(
                f"{self.url} can't be reached ({str(error) or type(error).__name__})"
            ) from error
        finally:
            connection.close()
        try:
            content = json.loads(body)
            if content["status"] != "success":
                raise PrometheusUnusable(f"{where}: {content['error']}")
            return content["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise PrometheusUnusable(
                f"{where}: HTTP {answer.status} without Prometheus's JSON in it"
            ) from error


def parse_url(url: str) -> SplitResult:
    """Raises PrometheusUnusable."""
    want = "want http://HOST:PORT or https://HOST:PORT, with the path that it is served under"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise PrometheusUnusable(f"got {url!r} ({error}), {want}") from error
    if parts.scheme not in PORTS or not parts.hostname or parts.query or parts.username:
        raise PrometheusUnusable(f"got {url!r}, {want}")
    return parts


def find_target(prometheus: Prometheus, metrics_url: str) -> ScrapeTarget:
    """What Prometheus scrapes at `metrics_url`; hosts are compared by their addresses too.

    Raises PrometheusUnusable where it scrapes nothing there, or its last scrape failed.
    """
    targets = prometheus.targets()
    found = [one for one in targets if same_place(one.url, metrics_url)]
    if not found:
        shown = ", ".join(one.url for one in targets[:MAX_SHOWN]) or "nothing"
        more = f" and {len(targets) - MAX_SHOWN} more" if len(targets) > MAX_SHOWN else ""
        raise PrometheusUnusable(
            f"{prometheus.url} doesn't scrape {metrics_url} (it scrapes {shown}{more}): add that "
            "address to its scrape_configs, or give the one that it scrapes by --metrics-url"
        )
    # Scraped by two jobs, it has the same numbers twice: one of them is enough.
    best = min(found, key=lambda one: (one.health != "up", one.interval_s))
    if best.health != "up":
        raise PrometheusUnusable(
            f"{prometheus.url} has no successful last scrape of {best.url} ({best.health}"
            f"{': ' + best.error if best.error else ''}): want a server that it reaches"
        )
    return best


def same_place(one: str, other: str) -> bool:
    """Two URLs with the same path and port, and a host name or an address in common."""
    a, b = urlsplit(one), urlsplit(other)
    ports = [part.port or PORTS.get(part.scheme) for part in (a, b)]
    if ports[0] != ports[1] or (a.path or "/metrics") != (b.path or "/metrics"):
        return False
    return a.hostname == b.hostname or bool(_addresses(a.hostname) & _addresses(b.hostname))


def duration_s(text: str) -> float:
    """Seconds of Prometheus's "1m30s"."""
    return sum(int(number) * UNITS_S[unit] for number, unit in DURATION.findall(text))


def _addresses(host: str | None) -> set[str]:
    try:
        return {str(one[4][0]) for one in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


def _sample(metric: Mapping[str, str], value: float) -> Sample:
    """A label that the target has too comes as `exported_...` unless it honours the server's."""
    exported = "exported_"
    own = {
        name.removeprefix(exported): text
        for name, text in metric.items()
        if name.startswith(exported)
    }
    return Sample(metric["__name__"], {**metric, **own}, value)
