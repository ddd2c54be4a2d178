"""One process' part of a run: a plan played as Locust's user, and how it ended.

Importing this imports Locust, which patches the process for gevent.
"""

import gc
import time
import traceback
from typing import Literal

# Locust first: it patches the standard library, which all others must find patched.
from locust import User, task  # isort: skip
from locust.env import Environment  # isort: skip
from locust.exception import StopUser  # isort: skip

import gevent
from gevent.event import Event

from loadtest.answers import READERS
from loadtest.generator.dispatcher import Dispatcher, Grade
from loadtest.generator.finish import Finish
from loadtest.generator.parent import LEAD_S, Abandoned, Parent
from loadtest.generator.rest import RestSender
from loadtest.generator.rpc import RpcSender
from loadtest.generator.sender import Answer, Sender
from loadtest.generator.timer import open_timer
from loadtest.plan import Plan
from loadtest.samples import GRPC_BASE, HTTP_OK, Samples, status_label
from loadtest.target import Target

PROGRESS_EVERY_S = 0.2
MAX_ERROR_CHARACTERS = 300
SPARE_S = 60.0
EXIT_DEFECT = 70
EXIT_INTERRUPTED = 130


class Run:
    """State of one run: the plan, what is counted while it plays, and how it ended."""

    def __init__(self, plan: Plan, parent: Parent, environment: Environment) -> None:
        self.plan = plan
        self.parent = parent
        self.environment = environment
        self.exit_code = EXIT_INTERRUPTED
        self.trace = ""
        """of the defect, where there was one"""
        self.is_begun = False
        self.over = Event()
        self.n_done = 0
        self.n_bad = 0
        self.errors: dict[int, str] = {}

    def guarded(self) -> None:
        """Play, and keep the exit code: Locust would log an error and start over."""
        self.is_begun = True
        try:
            self.play()
            self.exit_code = 0
        except Abandoned:
            self.exit_code = EXIT_INTERRUPTED
        except Exception:  # noqa: BLE001 - the process boundary
            self.trace = traceback.format_exc()
            self.exit_code = EXIT_DEFECT
        finally:
            self.over.set()

    def play(self) -> None:
        plan = self.plan
        senders = [open_sender(plan, target) for target in plan.targets]
        with open_timer() as timer:
            dispatcher = Dispatcher(
                senders, timer, plan.max_in_flight, plan.timeout_s, self.observe, grader(plan)
            )
            try:
                if len(plan.warmup):
                    self.play_phase(dispatcher, "warmup", time.monotonic() + LEAD_S)
                self.window(dispatcher)
            finally:
                dispatcher.kill()
                for sender in senders:
                    sender.close()

    def window(self, dispatcher: Dispatcher) -> None:
        # What lives by now stays: the collector needn't look at it while requests are timed.
        gc.collect()
        gc.freeze()
        start_s = self.parent.warm(self.n_done, self.n_bad)
        self.n_done = self.n_bad = 0
        self.errors.clear()
        self.environment.stats.reset_all()
        reporter = gevent.spawn(self.report_progress)
        clocks = Clocks()
        samples = self.play_phase(dispatcher, "window", start_s)
        shares = clocks.shares()
        reporter.kill()
        self.parent.finished(Finish(samples, self.errors, *shares))

    def play_phase(
        self, dispatcher: Dispatcher, phase: Literal["warmup", "window"], start_s: float
    ) -> Samples:
        plan = self.plan
        arrivals = plan.warmup if phase == "warmup" else plan.window
        if plan.closed is None:
            return dispatcher.play(arrivals, start_s)
        duration_s = plan.closed.warmup_s if phase == "warmup" else plan.closed.window_s
        return dispatcher.play_closed(arrivals, plan.closed.n_clients, start_s, duration_s)

    def observe(self, target: int, latency_s: float, answer: Answer) -> None:
        """Count a request and tell Locust, whose statistics its web interface shows."""
        ok = answer.status in (HTTP_OK, GRPC_BASE)
        self.n_done += 1
        failure = None
        if not ok:
            self.n_bad += 1
            self.errors.setdefault(answer.status, answer.error[:MAX_ERROR_CHARACTERS])
            failure = RequestFailed(status_label(answer.status))
        self.environment.events.request.fire(  # type: ignore[no-untyped-call]
            request_type=self.plan.targets[target].protocol,
            name=self.plan.model,
            response_time=latency_s * 1e3,
            response_length=answer.n_bytes,
            exception=failure,
            context={},
        )

    def report_progress(self) -> None:
        while True:
            try:
                self.parent.progress(self.n_done, self.n_bad)
            except Abandoned:
                # Nobody listens any more, so nobody wants the load.
                self.over.set()
                return
            gevent.sleep(PROGRESS_EVERY_S)


class PlanUser(User):
    """The one user of a process; it plays the whole plan, so Locust's spawning isn't a schedule."""

    abstract = True
    run_to_play: Run | None = None

    @task
    def play_plan(self) -> None:
        run = self.run_to_play
        # Locust's web interface can start more users; a plan is played once.
        if run is not None and not run.is_begun:
            run.guarded()
        raise StopUser


def user_class(run: Run | None = None) -> type[PlanUser]:
    """Locust wants a class and makes its instances itself, so the run goes into the class, by now
    or before the first user is started."""
    return type("PlanUser", (PlanUser,), {"run_to_play": run, "abstract": False})


class RequestFailed(Exception):
    """How a failed request is shown to Locust."""


class Clocks:
    """How busy this process is, from its making on."""

    def __init__(self) -> None:
        self.wall_s = time.monotonic()
        self.thread_s = time.thread_time()
        self.process_s = time.process_time()

    def shares(self) -> tuple[float, float]:
        """CPU of the thread that does all the sending, and of the process, in cores."""
        wall_s = time.monotonic() - self.wall_s
        thread_s = time.thread_time() - self.thread_s
        return thread_s / wall_s, (time.process_time() - self.process_s) / wall_s


def open_sender(plan: Plan, target: Target) -> Sender:
    payloads = plan.payloads[target.protocol]
    if target.protocol == "rest":
        return RestSender(target, plan.model, plan.version, payloads)
    return RpcSender(target, payloads)


def grader(plan: Plan) -> Grade | None:
    """How answers are graded; none where nobody asked for it."""
    key = plan.key
    if key is None:
        return None
    readers = [READERS[target.protocol] for target in plan.targets]

    def grade(target: int, payload: int, answer: Answer) -> int:
        scores = readers[target](answer.body, answer.json_bytes, key.output)
        return key.n_right(payload, scores)

    return grade


def longest_s(plan: Plan) -> float:
    """After this time a run must be over, whatever happens."""
    if plan.closed is not None:
        schedules_s = plan.closed.warmup_s + plan.closed.window_s
        return schedules_s + plan.pause_s + 2 * plan.timeout_s + SPARE_S
    schedules_s = sum(float(one.intended_s[-1]) for one in (plan.warmup, plan.window) if len(one))
    return schedules_s + plan.pause_s + 2 * plan.timeout_s + SPARE_S
