"""One load test from its settings to its result: ask, plan, warm up, measure, compare, judge.

Knows no terminal and no file format; progress and results go to the caller.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.arrivals import Arrivals, TraceInvalid, draw_profile, mean_level, peak_level
from loadtest.chaos.conductor import Conductor
from loadtest.chaos.counters import expect_losses
from loadtest.chaos.faults import ActionFailed, check_action, perform
from loadtest.chaos.findings import Chaos
from loadtest.chaos.profile import ChaosProfile, misfit
from loadtest.drift import Soak
from loadtest.driver import Listener, Played, Progress, Warmed, Workers, check_generator, play
from loadtest.endpoint import describe_all
from loadtest.inputs import FileInputs, RandomInputs, read_inputs_file, read_labelled_file
from loadtest.labels import AnswerKey, choose_output
from loadtest.memory import MemorySampler, every_s
from loadtest.plan import ClosedLoop, Plan
from loadtest.profile import LoadProfile, simple_profile
from loadtest.prometheus import Prometheus
from loadtest.prometheus_observer import PrometheusObserver
from loadtest.samples import Samples
from loadtest.server_metrics import MetricsUnusable, Scrapes, Snapshot, counted, scrape
from loadtest.signature import Signature, TensorSpec, check_fit, check_lengths
from loadtest.slo import Slo
from loadtest.target import Target
from loadtest.verdict import Evidence, Judgement, ServerEvidence, judge
from loadtest.wire import MAX_LABELLED_PAYLOADS, MAX_PAYLOADS, encode_payloads

MAX_REQUESTS = 5_000_000
MIN_TIMEOUT_S = 5.0
TIMEOUT_PER_THRESHOLD = 4
MAX_IN_FLIGHT = 8192
SETTLE_S = 2.0
"""How long the server's counters may take to show a request that was answered."""
SETTLE_EVERY_S = 0.05


class SettingsInvalid(ValueError):
    """Settings that no run can have; `str()` says which and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """What the user asks for."""

    slo: Slo
    model: str
    targets: tuple[Target, ...]
    version: str = ""
    inputs: Path | None = None
    duration_s: float | None = None
    """none: the objective's window"""
    warmup_s: float = 2.0
    seed: int = 0
    metrics_urls: tuple[str, ...] = ()
    """none: port 8002 of each target's host"""
    server_metrics: bool = True
    prometheus: str | None = None
    """URL of the Prometheus to take the counters from; none: from the servers themselves"""
    drift_horizon_s: float | None = None
    """none: drift is shown, not judged"""
    max_memory_bytes: float | None = None
    max_in_flight: int | None = None
    """none: as many as can be waiting before the first times out"""
    profile: LoadProfile | None = None
    """none: the SLO's own arrivals at its rate"""
    labels: str | None = None
    """array of `inputs` with the class of each row; none: answers aren't graded"""
    closed_loop: int | None = None
    """number of clients that wait for their answers; none: an open loop"""
    label_output: str | None = None
    """the output with the scores; none: the model's only one"""
    workers: Workers | None = None
    """none: one process generates the load"""
    web: str | None = None
    """HOST:PORT of Locust's interface while the test runs; none: it isn't served"""
    chaos: ChaosProfile | None = None
    """what is done to the server meanwhile; none: nothing"""

    @property
    def load(self) -> LoadProfile:
        return self.profile or simple_profile(self.slo.workload.arrivals)

    @property
    def window_s(self) -> float:
        return self.slo.window_s if self.duration_s is None else self.duration_s

    @property
    def timeout_s(self) -> float:
        return max(MIN_TIMEOUT_S, TIMEOUT_PER_THRESHOLD * self.slo.latency.threshold_s)

    @property
    def in_flight_limit(self) -> int:
        if self.closed_loop is not None:
            return self.closed_loop
        if self.max_in_flight is not None:
            return self.max_in_flight
        peak = peak_level(self.load, self.window_s)
        waiting = self.slo.workload.rate_per_s * peak * self.timeout_s
        return max(64, min(MAX_IN_FLIGHT, int(1.5 * waiting)))

    @property
    def scraped_urls(self) -> tuple[str, ...]:
        if not self.server_metrics:
            return ()
        urls = self.metrics_urls or [target.metrics_url for target in self.targets]
        return tuple(dict.fromkeys(urls))


@dataclass(frozen=True)
class Watcher:
    """Called as the run goes on."""

    on_warmup: Callable[[int], None]
    """number of warm-up requests planned"""
    on_window: Callable[[int | None], None]
    """number of requests planned, once the warm-up has drained; none in a closed loop"""
    on_progress: Callable[[Progress], None]
    on_workers: Callable[[int, int], None]
    """how many workers are there, of how many"""


@dataclass(frozen=True)
class Result:
    settings: Settings
    plan: Plan
    played: Played
    warmed: Warmed
    server: ServerEvidence | None
    judgement: Judgement
    soak: Soak = field(default_factory=Soak)


def run(settings: Settings, watcher: Watcher) -> Result:
    """Test and judge.

    Before the first request it may raise SettingsInvalid, GeneratorMissing, TargetUnusable,
    SignatureUnusable, InputsInvalid, LabelsInvalid, MetricsUnusable or PrometheusUnusable;
    later only GeneratorFailed and KeyboardInterrupt.
    """
    check_settings(settings)
    check_chaos(settings)
    check_generator()
    signature = describe_all(settings.targets, settings.model, settings.version)
    plan = make_plan(settings, signature)
    observer = open_observer(settings)
    plan = replace(plan, pause_s=observer.longest_s)
    sampler = MemorySampler(
        settings.scraped_urls if settings.prometheus is None else (), every_s(settings.window_s)
    )
    warmed: list[Warmed] = []

    def on_warm(message: Warmed) -> None:
        warmed.append(message)
        observer.before()
        sampler.start()
        watcher.on_window(len(plan.window) if plan.closed is None else None)

    def on_workers(n: int, n_wanted: int) -> None:
        watcher.on_workers(n, n_wanted)
        if n == n_wanted:
            watcher.on_warmup(len(plan.warmup))

    if settings.workers is None:
        watcher.on_warmup(len(plan.warmup))
    conductor = Conductor(
        () if settings.chaos is None else settings.chaos.actions, settings.targets, perform
    )
    listener = Listener(on_warm, watcher.on_progress, on_workers, conductor.start)
    try:
        with tempfile.TemporaryDirectory(prefix="trimserve-loadtest-") as folder:
            played = play(plan, Path(folder), listener, settings.workers, settings.web)
        performed = conductor.finish()
    finally:
        conductor.close()
        sampler.stop()
    server = observer.evidence(played.samples) if settings.scraped_urls else None
    if server is not None:
        server = expect_losses(server, performed, settings.scraped_urls)
    memory = (*sampler.series(), *(() if server is None else server.memory))
    evidence = Evidence(
        slo=settings.slo,
        samples=played.samples,
        window_s=settings.window_s,
        transports=tuple(target.protocol for target in settings.targets),
        max_in_flight=plan.max_in_flight,
        cpu_share=played.cpu_share,
        server=server,
        closed_loop=settings.closed_loop,
        label_output=None if plan.key is None else plan.key.output,
        soak=Soak(memory, settings.drift_horizon_s, settings.max_memory_bytes),
        chaos=None
        if settings.chaos is None
        else Chaos(settings.chaos.objectives, settings.window_s, performed),
    )
    return Result(settings, plan, played, warmed[0], server, judge(evidence), evidence.soak)


def check_chaos(settings: Settings) -> None:
    """Raises SettingsInvalid."""
    if settings.chaos is None:
        return
    if settings.closed_loop is not None:
        raise SettingsInvalid(
            "--chaos: got it with --closed-loop, want one of them: clients that wait for a server "
            "that is down send nothing that could be lost"
        )
    problem = misfit(settings.chaos, settings.window_s)
    if problem is not None:
        raise SettingsInvalid(f"--chaos: {problem}")
    for index, action in enumerate(settings.chaos.actions):
        try:
            check_action(action, settings.targets)
        except ActionFailed as error:
            raise SettingsInvalid(f"--chaos: actions.{index}: {error}") from error


def check_settings(settings: Settings) -> None:
    """Raises SettingsInvalid."""
    if not settings.model.strip():
        raise SettingsInvalid(
            f"--model: got {settings.model!r}, want the name of one on the server"
        )
    if settings.labels is not None and settings.inputs is None:
        raise SettingsInvalid("--labels: got it without --inputs, want the file that they are in")
    if settings.closed_loop is not None and settings.profile is not None:
        raise SettingsInvalid(
            "--closed-loop: got it with --profile, want one of them: clients that wait for "
            "answers follow no arrivals"
        )
    if settings.closed_loop is not None and settings.max_in_flight is not None:
        raise SettingsInvalid(
            "--closed-loop: got it with --max-in-flight, want one of them: so many clients have "
            "so many requests in flight"
        )
    if settings.workers is not None and settings.workers.n > settings.in_flight_limit:
        raise SettingsInvalid(
            f"--workers: got {settings.workers.n}, want at most {settings.in_flight_limit}, as "
            "many as there may be requests in flight"
        )
    if settings.label_output is not None and settings.labels is None:
        raise SettingsInvalid("--label-output: got it without --labels, want both or neither")
    if settings.max_memory_bytes is not None and settings.drift_horizon_s is None:
        raise SettingsInvalid(
            "--max-memory-mb: got it without --drift-horizon-s, want how far ahead to look too"
        )
    if settings.prometheus is not None and not settings.server_metrics:
        raise SettingsInvalid(
            "--prometheus: got it with --no-server-metrics, want one of them: it is where the "
            "server's metrics come from"
        )
    if not settings.targets:
        raise SettingsInvalid("--target: got none, want at least one")
    rate_per_s = settings.slo.workload.rate_per_s * mean_level(settings.load, settings.window_s)
    if round(rate_per_s * settings.window_s) < 1:
        raise SettingsInvalid(
            f"--duration-s: got {settings.window_s:g}, in which workload.rate_per_s "
            f"{rate_per_s:g} sends no request, want more than {0.5 / rate_per_s:g}"
        )
    n = rate_per_s * (settings.window_s + settings.warmup_s)
    if n > MAX_REQUESTS:
        raise SettingsInvalid(
            f"--duration-s: got {settings.window_s:g}, which at workload.rate_per_s "
            f"{rate_per_s:g} is {n:.3g} requests with the warm-up, want at most {MAX_REQUESTS}"
        )
    if settings.slo.workload.encoding == "json":
        for target in settings.targets:
            if target.protocol == "grpc":
                raise SettingsInvalid(
                    f"--target: got {target.url} with workload.encoding json, "
                    "want binary for gRPC or only http:// targets"
                )


def make_plan(settings: Settings, signature: Signature) -> Plan:
    """Draw schedules and payloads from the seed.

    Raises SignatureUnusable, InputsInvalid or LabelsInvalid.
    """
    workload = settings.slo.workload
    check_fit(signature, workload)
    output = None
    if settings.labels is not None:
        output = choose_output(signature, settings.label_output)
    inputs, classes = open_inputs(settings, signature, output)
    seeds = np.random.SeedSequence(settings.seed).spawn(3)
    rngs = [np.random.default_rng(one) for one in seeds]
    payloads = encode_payloads(
        inputs.draw(rngs[0]),
        signature,
        workload,
        sorted({target.protocol for target in settings.targets}),
        settings.model,
        settings.version,
        MAX_PAYLOADS if output is None else MAX_LABELLED_PAYLOADS,
    )
    n_payloads = len(next(iter(payloads.values())))
    key = None
    if output is not None and classes is not None and isinstance(inputs, FileInputs):
        # The same seed gives the same rows again.
        rows = inputs.draw_rows(np.random.default_rng(seeds[0]))
        chosen = np.stack(list(islice(rows, n_payloads)))
        key = AnswerKey(output.name, classes[chosen])
    warmup, window = draw_schedules(settings, n_payloads, rngs[1], rngs[2])
    return Plan(
        model=settings.model,
        version=settings.version,
        targets=settings.targets,
        payloads=payloads,
        warmup=warmup,
        window=window,
        timeout_s=settings.timeout_s,
        max_in_flight=settings.in_flight_limit,
        key=key,
        closed=None
        if settings.closed_loop is None
        else ClosedLoop(settings.closed_loop, settings.warmup_s, settings.window_s),
    )


def open_inputs(
    settings: Settings, signature: Signature, output: TensorSpec | None
) -> tuple[RandomInputs | FileInputs, npt.NDArray[np.int64] | None]:
    """Where tensors come from, and the classes [n] of its rows where there is an output for them.

    Raises SignatureUnusable, InputsInvalid or LabelsInvalid.
    """
    workload = settings.slo.workload
    if settings.inputs is None:
        check_lengths(signature, workload)
        return RandomInputs(signature, workload.rows, workload.input_lengths), None
    classes = None
    if settings.labels is not None and output is not None:
        arrays, classes = read_labelled_file(settings.inputs, signature, settings.labels, output)
    else:
        arrays = read_inputs_file(settings.inputs, signature)
    return FileInputs(signature, workload.rows, arrays), classes


def draw_schedules(
    settings: Settings,
    n_payloads: int,
    warmup_rng: np.random.Generator,
    window_rng: np.random.Generator,
) -> tuple[Arrivals, Arrivals]:
    """Warm-up at the SLO's own rate, and the window by the profile. Raises SettingsInvalid."""
    workload, n_targets = settings.slo.workload, len(settings.targets)
    plain = simple_profile(workload.arrivals)
    try:
        warmup, window = (
            draw_profile(profile, workload.rate_per_s, duration_s, n_targets, n_payloads, rng)
            for profile, duration_s, rng in (
                (plain, settings.warmup_s, warmup_rng),
                (settings.load, settings.window_s, window_rng),
            )
        )
    except TraceInvalid as error:
        raise SettingsInvalid(f"--profile: {error}") from error
    if len(warmup) + len(window) > MAX_REQUESTS or len(window) == 0:
        raise SettingsInvalid(
            f"--profile: gives {len(window)} requests, want 1 to {MAX_REQUESTS} with the warm-up"
        )
    return warmup, window


def scrape_of(settings: Settings, url: str) -> Snapshot:
    return scrape(url, settings.model, settings.version, settings.slo.latency.threshold_s)


def open_observer(settings: Settings) -> "ServerObserver | PrometheusObserver":
    """Who takes the servers' counters, once they are known to be there.

    Raises MetricsUnusable or PrometheusUnusable.
    """
    if settings.prometheus is not None:
        return PrometheusObserver(
            Prometheus(settings.prometheus),
            settings.scraped_urls,
            settings.model,
            settings.version,
            settings.slo.latency.threshold_s,
        )
    for url in settings.scraped_urls:
        scrape_of(settings, url)
    return ServerObserver(settings)


class ServerObserver:
    """Scrapes the servers before and after the measured requests.

    A server counts a request a moment after it has answered it, so both scrapes are repeated
    until they have settled.
    """

    longest_s = SETTLE_S
    """of `before`, as far as the servers answer at once"""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._before: dict[str, Snapshot] = {}
        self._error = ""

    def before(self) -> None:
        """Scrape until nothing moves any more; call it while no request is in flight."""
        try:
            self._before = self._scrape_all()
            deadline_s = time.monotonic() + SETTLE_S
            while time.monotonic() < deadline_s:
                time.sleep(SETTLE_EVERY_S)
                again = self._scrape_all()
                settled = again == self._before
                self._before = again
                if settled:
                    return
        except MetricsUnusable as error:
            self._error = str(error)

    def evidence(self, samples: Samples) -> ServerEvidence:
        """Scrape until every answered request is counted, or for SETTLE_S at most."""
        if self._error:
            return ServerEvidence(error=self._error)
        n_answered = int(samples.answered.sum())
        deadline_s = time.monotonic() + SETTLE_S
        try:
            while True:
                after = self._scrape_all()
                pairs = tuple(Scrapes(url, self._before[url], after[url]) for url in after)
                n = sum(count.n for count in counted(pairs).values())
                if n >= n_answered or time.monotonic() > deadline_s:
                    return ServerEvidence(scrapes=pairs)
                time.sleep(SETTLE_EVERY_S)
        except MetricsUnusable as error:
            return ServerEvidence(error=str(error))

    def _scrape_all(self) -> dict[str, Snapshot]:
        return {url: scrape_of(self._settings, url) for url in self._settings.scraped_urls}
