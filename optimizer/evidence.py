"""Evidence: a load test's report, from which the model of the overheads is corrected.

Closes the loop: a promise that was broken in service tells by how much the front end was taken for
too fast. It knows simulations and reports, neither studies nor the store.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic

from optimizer.capacity import predict
from optimizer.errors import OptimizerError
from optimizer.loadtest_report import FullReport, read_bytes
from optimizer.simulation import FloatArray, FrontEnd, Load, Replica, Spread
from serve.artifact import Manifest
from serve.machine import Machine

SLOWER = (0.25, 8.0)
"""How many times as slow as modelled the front end may turn out to be."""
WIDER = (0.05, 30.0)
"""The same for the distance of slow requests from the median."""
TOLERANCES = np.asarray([0.1, 0.025])
"""Relative, of the median and of the latency at the SLO's quantile, within which a corrected model
must predict them."""
MIN_REQUESTS, MAX_REQUESTS = 2_000, 10_000
"""Of a simulation that is compared with a report: as many as it reports, within bounds."""
MIN_RATE_SHARE = 0.99
N_WIDER = 8
N_OTHERS = 4
"""Further runs of the corrected model, with other arrivals, where the first doesn't fit."""
PREDICTION = 3.0
"""Standard deviations of the 95 % prediction interval from five runs: Student's 2.78 with 4 degrees
of freedom, times the root of 1 + 1/5."""
_NEVER_S = 1e6
_PROBE = 0.15
_BISECTIONS = 8
_PROBES = _PROBE * np.eye(2)
_MAX_STEP = 0.7
_MAX_STEPS = 10
_MAX_HALVINGS = 4


class EvidenceInvalid(OptimizerError):
    """A report that nothing can be learned from; `problem` says why, and what would do."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


@dataclass(frozen=True)
class Evidence:
    """What clients saw of one version of a model under a load: `latency_s` is at `quantile`, the
    SLO's."""

    source: str
    model: str
    version: str
    rate_per_s: float
    n_requests: int
    quantile: float
    p50_s: float
    latency_s: float
    threshold_s: float
    rows: int = 1
    arrivals: Literal["poisson", "constant"] = "poisson"
    encoding: Literal["binary", "json"] = "binary"

    @property
    def load(self) -> Load:
        return Load(
            self.rate_per_s, self.threshold_s, self.quantile, rows=self.rows, arrivals=self.arrivals
        )


def read_evidence(path: Path) -> Evidence:
    """Read a load test's JSON report. Raises EvidenceInvalid where it is none, or says nothing of
    the server: inconclusive, the rate not reached, no latencies."""
    source = str(path)
    try:
        report = FullReport.model_validate_json(read_bytes(path))
    except OSError as error:
        raise EvidenceInvalid(source, error.strerror or str(error)) from error
    except pydantic.ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in detail["loc"]) or "the document"
        what = "isn't JSON" if detail["type"] == "json_invalid" else detail["msg"]
        problem = f"{key}: {what}; want the JSON report of trimserve loadtest"
        raise EvidenceInvalid(source, problem) from error
    return _evidence(source, report)


def _evidence(source: str, report: FullReport) -> Evidence:
    if report.verdict == "inconclusive":
        said = "; ".join(reason.message for reason in report.reasons) or "no reason given"
        want = "want one that is met or violated"
        raise EvidenceInvalid(source, f"verdict: got inconclusive ({said}), {want}")
    slo, requests = report.slo, report.requests
    rate_per_s = slo.workload.rate_per_s
    if requests.achieved_per_s < MIN_RATE_SHARE * rate_per_s:
        raise EvidenceInvalid(
            source,
            f"requests.achieved_per_s: got {requests.achieved_per_s:g}, want the SLO's rate of "
            f"{rate_per_s:g}",
        )
    quantile = slo.latency.quantile
    p50_s, latency_s = report.latency_s(0.5), report.latency_s(quantile)
    if p50_s is None or latency_s is None or not 0 < p50_s <= latency_s:
        raise EvidenceInvalid(
            source,
            f"latency: got {p50_s} s at 0.5 and {latency_s} s at {quantile:g}, want both: a server "
            "that doesn't answer so many says nothing of its overheads",
        )
    return Evidence(
        source=source,
        model=report.run.model,
        version=report.run.version,
        rate_per_s=rate_per_s,
        n_requests=requests.n,
        quantile=quantile,
        p50_s=p50_s,
        latency_s=latency_s,
        threshold_s=slo.latency.threshold_s,
        rows=slo.workload.rows,
        arrivals=slo.workload.arrivals,
        encoding=slo.workload.encoding,
    )


def check_subject(evidence: Evidence, manifest: Manifest, machine: Machine) -> None:
    """Raise EvidenceInvalid unless the evidence is about this version, on this kind of machine.

    A report names model and version, not the machine: the version's profile does.
    """
    for key, got, want in (
        ("run.model", evidence.model, manifest.model),
        ("run.version", evidence.version or manifest.version, manifest.version),
    ):
        if got != want:
            raise EvidenceInvalid(evidence.source, f"{key}: got {got!r}, want {want!r}")
    if manifest.profile is None:
        raise EvidenceInvalid(evidence.source, "the version has no profile, so no machine")
    differences = machine.differences(manifest.profile.machine)
    if differences:
        what = "; ".join(differences)
        raise EvidenceInvalid(evidence.source, f"the version is of another machine: {what}")


def corrected(replica: Replica, evidence: Evidence, *, seed: int = 0) -> FrontEnd:
    """The replica's front end, changed so that the simulation of the replica under the evidence's
    load gives the latencies that it reports.

    Two things are told apart. All of its costs are multiplied by one factor, which decides the
    median; then what is above the median of the way, and the wait for a core, by another, which
    decides the SLO's quantile. It is enough that what was reported could be one more run of the
    changed model with other arrivals, which near saturation is all that can be had. The rest of
    the model, the engine's times above all, stays. Raises EvidenceInvalid where factors within
    `SLOWER` and `WIDER` can't explain the report: something else is wrong then. Takes some dozens
    of simulations.
    """
    front_end, load = replica.front_end, evidence.load
    n_requests = min(max(evidence.n_requests, MIN_REQUESTS), MAX_REQUESTS)

    def distance(factors: FloatArray, luck: int = 0) -> FloatArray:
        changed = replace(replica, front_end=_changed(front_end, factors))
        said = predict(changed, load, n_requests=n_requests, seed=seed + luck)
        latencies_s = [min(one, _NEVER_S) for one in (said.p50_s, said.slo_latency_s)]
        wanted_s = [evidence.p50_s, evidence.latency_s]
        logarithms: FloatArray = np.log(np.asarray(latencies_s) / np.asarray(wanted_s))
        return logarithms

    factors, left = _solved(distance)
    if (np.abs(left) <= TOLERANCES).all():
        return _changed(front_end, factors)
    factors, left = _searched(distance)
    others = [distance(factors, luck) for luck in range(1, 1 + N_OTHERS)]
    if _is_luck([left, *others]):
        return _changed(front_end, factors)
    p50_s, latency_s = np.exp(left) * (evidence.p50_s, evidence.latency_s)
    raise EvidenceInvalid(
        evidence.source,
        f"latency: got {_ms(evidence.p50_s)} at 0.5 and {_ms(evidence.latency_s)} at "
        f"{evidence.quantile:g}; a front end {SLOWER[0]:g} to {SLOWER[1]:g} times as slow explains "
        f"{_ms(p50_s)} and {_ms(latency_s)} at best: want a report of this version on this "
        "machine, or measure its times anew",
    )


def _solved(
    distance: Callable[[FloatArray], FloatArray],
) -> tuple[FloatArray, FloatArray]:
    """(logarithms of both factors, what is left of the distance): Newton's method with
    differences for derivatives, whose steps are bounded and halved until they help; where none
    does, one factor is searched alone."""
    bounds = np.log(np.asarray([SLOWER, WIDER])).T
    factors = np.zeros(2)
    left = distance(factors)
    for _ in range(_MAX_STEPS):
        if (np.abs(left) <= TOLERANCES / 2).all():
            break
        ahead, behind = ([distance(factors + one) for one in way] for way in (_PROBES, -_PROBES))
        slopes = np.stack([a - b for a, b in zip(ahead, behind, strict=True)], axis=1) / _PROBE / 2
        step = np.linalg.lstsq(slopes, -left, rcond=1e-3)[0].clip(-_MAX_STEP, _MAX_STEP)
        for halvings in range(_MAX_HALVINGS):
            tried = (factors + step / 2**halvings).clip(*bounds)
            found = distance(tried)
            if np.linalg.norm(found / TOLERANCES) < np.linalg.norm(left / TOLERANCES):
                factors, left = tried, found
                break
        else:
            factors = _with_quantile(factors, distance, bounds)
            left = distance(factors)
    return factors, left


def _is_luck(distances: list[FloatArray]) -> bool:
    """Whether what was reported could be one more run of the same model, by the prediction interval
    of their logarithms. Near saturation runs differ by tens of percent."""
    spread = np.std(distances, axis=0, ddof=1)
    return bool((np.abs(np.mean(distances, axis=0)) <= TOLERANCES + PREDICTION * spread).all())


def _searched(
    distance: Callable[[FloatArray], FloatArray],
) -> tuple[FloatArray, FloatArray]:
    """The same for a server near saturation, where the quantile is no slope to follow and may even
    fall as waits grow: for some values of the second factor the first by the median, which it
    raises. Of all these the nearest."""
    bounds = np.log(np.asarray([SLOWER, WIDER])).T
    seen: list[tuple[FloatArray, FloatArray]] = []
    for wider in np.linspace(bounds[0, 1], bounds[1, 1], N_WIDER):
        low, high = bounds[:, 0]
        for _ in range(_BISECTIONS):
            factors = np.asarray([(low + high) / 2, wider])
            seen.append((factors, distance(factors)))
            low, high = (low, factors[0]) if seen[-1][1][0] > 0 else (factors[0], high)
    return min(seen, key=lambda one: float(np.abs(one[1] / TOLERANCES).max()))


def _with_quantile(
    factors: FloatArray, distance: Callable[[FloatArray], FloatArray], bounds: FloatArray
) -> FloatArray:
    """The factors with the second such that the quantile fits, by halving what it can be: it
    rises with it."""
    low, high = bounds[:, 1]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        error = distance(np.asarray([factors[0], middle]))[1]
        low, high = (low, middle) if error > 0 else (middle, high)
    return np.asarray([factors[0], (low + high) / 2])


def _changed(front_end: FrontEnd, factors: FloatArray) -> FrontEnd:
    slower, wider = np.exp(factors).tolist()
    return replace(
        front_end,
        receive_s=slower * front_end.receive_s,
        answer_s=slower * front_end.answer_s,
        wakeup_s=slower * front_end.wakeup_s,
        batch_s=slower * front_end.batch_s,
        way=_scaled(front_end.way, slower).stretched(wider),
        wake=_scaled(front_end.wake, wider),
    )


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(tuple(factor * seconds for seconds in spread.seconds))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
