"""The worker: takes jobs from the ledger, one at a time, and runs each in a child process.

It holds a lease while it runs one and renews it every second. It stops the child where the lease
is lost, where somebody cancels, and where a limit is broken; and where the database doesn't answer
for as long as the lease is good, since another worker may have the job by then. What it tells the
ledger carries the lease's token, so an outlived worker can't end a job that isn't its own.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from optimizer import tracing
from optimizer.execution.cluster import Cluster
from optimizer.service import scratch
from optimizer.service.addresses import Stores
from optimizer.service.blobs import Blobs
from optimizer.service.child import REPOSITORY, Order
from optimizer.service.database import DatabaseUnavailable
from optimizer.service.disk import folder_bytes
from optimizer.service.jobs import JOB_ID, Job, Kind, LeaseLost, State
from optimizer.service.journal import MAX_LOG_BYTES
from optimizer.service.ledger import Ledger
from optimizer.service.object_store import StoreUnavailable
from optimizer.service.orders import Orders, Surroundings, Unusable
from optimizer.service.records import Claim, StorageExceeded
from optimizer.service.reporting import SPAN
from optimizer.service.running import ChildLimits, Running
from optimizer.service.uploads import Uploads

log = logging.getLogger(__name__)

T = TypeVar("T")
CLAIM_CHARS = 12
"""Of a lease's token, which name the folders of what is made and was made under it."""
_TICK_S = 0.25
_RENEW_S = 1.0
_BACK_OFF_S = 2.0
_EVENTS = ("error", "result")
"""The child's last word, which decides how the job ended."""
LET_GO = "let_go"


@dataclass(frozen=True)
class WorkerOptions:
    """`work` is the folder of the jobs that are under way, on the worker's own disk; `store` and
    `artifacts` are those of all studies (`optimizer.store`). `allowed_wall_clock_s` comes on top
    of a study's budget, for what a study does before and after it searches; a store of files that
    is away is waited for `store_patience_s`. `max_running` and `max_stored_bytes`, of files
    that jobs keep, are of one owner, over all workers."""

    name: str
    work: Path
    store: str
    artifacts: Path | None = None
    repositories: Mapping[str, Path | str] = field(default_factory=dict)
    lease_s: float = 15.0
    poll_s: float = 1.0
    max_running: int | None = None
    max_stored_bytes: int | None = None
    limits: ChildLimits = field(default_factory=ChildLimits)
    allowed_wall_clock_s: float = 3_600.0
    max_fetched_bytes: int = 20 << 30
    min_free_bytes: int = 1 << 30
    store_patience_s: float = 300.0
    verify: bool = True
    cluster: Cluster | None = None
    """On whose nodes studies build and measure; then they see `work` as the worker does."""


class Stopped(Exception):
    """The job isn't run on; `why` is for the log."""


class Worker:
    """Runs in one thread until `stop` is set."""

    def __init__(
        self,
        ledger: Ledger,
        uploads: Uploads,
        blobs: Blobs,
        stores: Stores,
        options: WorkerOptions,
        environ: Mapping[str, str],
        metrics: "WorkerMetrics | None" = None,
    ) -> None:
        self._ledger = ledger
        self._uploads = uploads
        self._blobs = blobs
        self._stores = stores
        self._options = options
        self._environ = environ
        self._metrics = metrics or WorkerMetrics()
        self._claimed_ns = 0
        options.work.mkdir(parents=True, exist_ok=True)

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                scratch.clear(self._options.work)
                claim = self._claim()
            except DatabaseUnavailable as error:
                log.warning("no job can be claimed: %s", error)
                stop.wait(_BACK_OFF_S)
                continue
            if claim is None:
                stop.wait(self._options.poll_s)
                continue
            self._traced(claim, stop)

    def _claim(self) -> Claim | None:
        options = self._options
        self._ledger.see_worker(options.name, None)
        self._claimed_ns = time.time_ns()
        free = shutil.disk_usage(options.work).free
        if free < options.min_free_bytes:
            log.error("%d bytes are free in %s, too few to take a job", free, options.work)
            return None
        claim = self._ledger.claim(options.name, options.lease_s, options.max_running)
        if claim is not None:
            self._ledger.see_worker(options.name, claim.job.id)
        return claim

    def _traced(self, claim: Claim, stop: threading.Event) -> None:
        job = claim.job
        about = {
            JOB_ID: job.id, "trimserve.job.kind": job.kind.value, "trimserve.job.run": job.run,
            "trimserve.job.attempt": job.attempt, "trimserve.worker": self._options.name,
        }  # fmt: skip
        with tracing.span(
            "run job", about, parent=job.traceparent, kind="consumer", start_ns=self._claimed_ns
        ) as span:
            with tracing.span("claim job", {JOB_ID: job.id}, start_ns=self._claimed_ns):
                pass  # it is ours already: the span tells when and for how long
            how = self._carry_out(claim, stop)
            span.set("trimserve.job.ended", how)
            if how in (State.FAILED, LET_GO):
                span.fail()

    def _carry_out(self, claim: Claim, stop: threading.Event) -> str:
        """Run the job to its end, or let go of it; says which. Nothing that a job does ends the
        worker."""
        about = {"job": claim.job.id, "attempt": claim.job.attempt}
        log.info("begins", extra=about)
        began_s = time.monotonic()
        how: str = LET_GO
        try:
            how = Attempt(self, claim, stop).run()
            log.info("ended as %s", how, extra=about)
        except (LeaseLost, Stopped) as error:
            log.warning("let go: %s", error, extra=about)
        except DatabaseUnavailable as error:
            log.error("let go, the database doesn't answer: %s", error, extra=about)
        except Exception:  # the job is taken back when its lease ends
            log.exception("let go by an internal error", extra=about)
        self._metrics.ended(how, time.monotonic() - began_s)
        return how


class WorkerMetrics:
    """What a worker counts; `optimizer.service.metrics` has one that Prometheus reads."""

    def ended(self, how: str, seconds: float) -> None:
        """A claim ended: in a state of the job, or `let_go`."""


@dataclass(frozen=True)
class _Batch:
    """What the ledger is told at once, and again until it is certain that it has been."""

    number: int
    events: list[tuple[str, Mapping[str, Any]]]
    text: str


class Attempt:
    """One claim of one job, from the fetching of its files to the word on how it ended."""

    def __init__(self, worker: Worker, claim: Claim, stop: threading.Event) -> None:
        self._worker = worker
        self._ledger = worker._ledger
        self._options = worker._options
        self._job, self._spec, self._lease = claim.job, claim.spec, claim.lease
        self._stop = stop
        # Of this claim alone: a worker that lost the job may still be at it for a moment.
        self._name = f"{claim.job.id}-{claim.lease.token[:CLAIM_CHARS]}"
        self._folder = self._options.work / self._name
        self._out = self._folder / "out"
        self._good_until_s = time.monotonic() + self._options.lease_s
        self._last_word: dict[str, Mapping[str, Any]] = {}
        self._untold: list[tuple[str, Mapping[str, Any]]] = []
        self._unlogged = ""
        self._batch: _Batch | None = None
        self._n_batches = 0
        self._traceparent: str | None = None
        self._n_spans = 0

    def run(self) -> State:
        """Raises LeaseLost, Stopped, DatabaseUnavailable."""
        with scratch.held(self._options.work, self._name):
            self._out.mkdir()
            return self._run()

    def _run(self) -> State:
        try:
            with self._renewing(), tracing.span("fetch files", {JOB_ID: self._job.id}):
                order = self._prepared()
        except Unusable as error:
            return self._ended(str(error))
        with tracing.span("run process", {JOB_ID: self._job.id}):
            child, broken = self._carried_out(order)
        return self._concluded(child, broken)

    def _carried_out(self, order: Order) -> tuple[Running, str | None]:
        """The child that has ended, and the limit that it broke."""
        self._traceparent = tracing.traceparent()
        order = replace(order, traceparent=self._traceparent)
        child = Running(order, self._folder / "order.json", self._limits(), self._worker._environ)
        try:
            broken = self._watch(child)
            child.close()
            self._report(child)
            broken = broken or child.broken_disk_limit()
        except BaseException:
            child.stop()
            raise
        return child, broken

    # --- before

    def _prepared(self) -> Order:
        """Raises Unusable."""
        self._untold.append(("phase", {"name": "fetching files"}))
        self._patiently(self._tell)
        options, worker = self._options, self._worker
        around = Surroundings(
            worker._uploads, worker._stores, options.store, options.artifacts,
            options.repositories, options.max_fetched_bytes, options.verify, options.cluster,
        )  # fmt: skip
        orders = Orders(around, self._job, self._spec, self._folder, self._out, self._stored)
        return orders.load_test() if self._job.kind is Kind.LOAD_TEST else orders.study()

    def _limits(self) -> ChildLimits:
        limits, asked_s = self._options.limits, self._spec.get("wall_clock_s")
        if asked_s is None:
            return limits
        own_s = float(asked_s) + self._options.allowed_wall_clock_s
        most_s = limits.wall_clock_s
        return replace(limits, wall_clock_s=own_s if most_s is None else min(own_s, most_s))

    # --- while it runs

    def _watch(self, child: Running) -> str | None:
        """Until the child has ended, by itself or for a limit that it broke, which is returned.

        Raises Stopped where it was stopped, with the ledger told, and LeaseLost."""
        renewed_s = 0.0
        while child.exit_code() is None:
            if self._stop.wait(_TICK_S):
                child.stop()
                self._report(child)
                self._ledger.release(self._job.id, self._lease.token)
                raise Stopped("the worker stops")
            now_s = time.monotonic()
            if now_s - renewed_s < _RENEW_S:
                continue
            renewed_s = now_s
            if self._renewed().state is State.CANCELLING:
                child.stop()
                self._report(child)
                self._ledger.stopped(self._job.id, self._lease.token)
                raise Stopped("cancelled")
            self._report(child)
            if broken := child.broken_limit():
                child.stop()
                return broken
        return None

    def _renewed(self) -> Job:
        """Renew the lease. A database that is away for a moment is no reason to stop, until the
        lease may be another's."""
        began_s = time.monotonic()
        try:
            job = self._ledger.renew(self._job.id, self._lease.token, self._options.lease_s)
        except DatabaseUnavailable:
            if time.monotonic() > self._good_until_s:
                raise
            return self._job
        self._good_until_s = began_s + 0.8 * self._options.lease_s
        return job

    @contextlib.contextmanager
    def _renewing(self) -> Iterator[None]:
        """Renew while this thread is busy fetching files."""
        done = threading.Event()
        failures: list[Exception] = []

        def renew() -> None:
            while not done.wait(_RENEW_S):
                try:
                    self._renewed()
                except (LeaseLost, DatabaseUnavailable) as error:
                    failures.append(error)
                    return

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if failures:
            raise failures[0]

    def _report(self, child: Running) -> None:
        """Pass on what the child has told; where the database is away, later."""
        events, text = child.taken()
        self._last_word |= {kind: payload for kind, payload in events if kind in _EVENTS}
        self._pass_on([payload for kind, payload in events if kind == SPAN])
        own = (*_EVENTS, SPAN)
        self._untold += [(kind, payload) for kind, payload in events if kind not in own]
        self._unlogged = (self._unlogged + text)[-MAX_LOG_BYTES:]
        with contextlib.suppress(DatabaseUnavailable):
            self._tell()

    def _pass_on(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Spans of the child, to whom only this claim's trace is open."""
        root = tracing.Context.parse(self._traceparent)
        if root is None:
            return
        for document in documents[: max(0, tracing.MAX_SPANS - self._n_spans)]:
            self._n_spans += 1
            with contextlib.suppress(ValueError):
                record = tracing.SpanRecord.from_dict(document)
                if record.trace_id == root.trace_id:
                    attributes = {**record.attributes, JOB_ID: self._job.id}
                    tracing.pass_on(replace(record, attributes=attributes))

    def _tell(self) -> None:
        """All that is untold. A database that died may have taken what it didn't confirm: that is
        told again under its number. Raises LeaseLost, DatabaseUnavailable."""
        while self._batch or self._untold or self._unlogged:
            if self._batch is None:
                self._n_batches += 1
                self._batch = _Batch(self._n_batches, self._untold, self._unlogged)
                self._untold, self._unlogged = [], ""
            batch = self._batch
            self._ledger.tell(
                self._job.id, self._lease.token, batch.events, batch.text, batch.number
            )
            self._batch = None

    # --- after

    def _concluded(self, child: Running, broken: str | None) -> State:
        code = child.exit_code()
        result = self._last_word.get("result")
        if broken is not None:
            return self._ended(f"stopped: it {broken}")
        if code == 0 and result is not None:
            return self._succeeded(str(result["outcome"]))
        told = self._last_word.get("error", {}).get("message")
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return self._ended(str(told) if told else f"its process ended {how}; the log may say why")

    def _succeeded(self, outcome: str) -> State:
        """What was made is stored first, the word that it counts comes last."""
        token, claim = self._lease.token, self._lease.token[:CLAIM_CHARS]
        blobs, most = self._worker._blobs, self._options.max_stored_bytes
        n_bytes = folder_bytes(self._out)
        try:
            self._patiently(lambda: self._ledger.keep(self._job.id, token, n_bytes, most))
        except StorageExceeded as error:
            return self._ended(str(error))
        try:
            with self._renewing(), tracing.span("store files", {JOB_ID: self._job.id}):
                self._stored(lambda: blobs.store(self._job.id, claim, self._out))
        except Unusable as error:
            return self._ended(str(error))
        has_version = any((self._out / REPOSITORY).glob("*/*/manifest.json"))
        made = {"claim": claim, "outcome": outcome, "has_version": has_version}
        self._untold.append(("made", made))
        self._patiently(self._tell)
        job = self._patiently(lambda: self._ledger.succeed(self._job.id, token, outcome))
        with contextlib.suppress(StoreUnavailable):  # what it leaves goes with the job
            blobs.keep_only(self._job.id, claim)
        return job.state

    def _ended(self, error: str) -> State:
        token = self._lease.token
        self._patiently(self._tell)
        job = self._patiently(lambda: self._ledger.fail(self._job.id, token, error))
        return job.state

    def _patiently(self, call: Callable[[], T]) -> T:
        """A database that restarts shall not cost a study that is done: within the lease, ask
        again. Raises LeaseLost, DatabaseUnavailable."""
        while True:
            try:
                return call()
            except DatabaseUnavailable:
                if time.monotonic() > self._good_until_s:
                    raise
                time.sleep(0.5)

    def _stored(self, call: Callable[[], T]) -> T:
        """A store of files that is away for a while shall not cost a study that is done. Raises
        Unusable where it stays away, and Stopped, with the job given back, where the worker is to
        stop; the lease is renewed meanwhile by another thread."""
        until_s = time.monotonic() + self._options.store_patience_s
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                if time.monotonic() > until_s:
                    raise Unusable(f"the store of files: {error}") from error
                log.warning("the store of files is waited for: %s", error)
                if self._stop.wait(_BACK_OFF_S):
                    self._ledger.release(self._job.id, self._lease.token)
                    raise Stopped("the worker stops") from error
