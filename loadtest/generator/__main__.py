"""Play a plan with Locust: `python -m loadtest.generator FOLDER`, started by `loadtest.driver`.

It talks to its parent in JSON lines on standard output: `warm` once the warm-up has drained,
`progress`, and `finished` when the samples are in the folder. After `warm` it waits for a line
on standard input. Exit code 0, 70 for a defect of its own, 130 when interrupted.
"""

import gc
import json
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

# Locust first: it patches the standard library, which all others must find patched.
from locust import User, task  # isort: skip
from locust.env import Environment  # isort: skip
from locust.exception import StopUser  # isort: skip

import gevent
from gevent.event import Event

from loadtest.answers import READERS
from loadtest.generator.dispatcher import Dispatcher, Grade
from loadtest.generator.rest import RestSender
from loadtest.generator.rpc import RpcSender, use_gevent
from loadtest.generator.sender import Answer, Sender
from loadtest.generator.timer import open_timer
from loadtest.plan import SAMPLES_FILE, Plan, load_plan
from loadtest.samples import GRPC_BASE, HTTP_OK, Samples, save_samples, status_label
from loadtest.target import Target

PROGRESS_EVERY_S = 0.2
MAX_ERROR_CHARACTERS = 300
SPARE_FILES = 64
SPARE_S = 60.0
EXIT_DEFECT = 70
EXIT_INTERRUPTED = 130


class Run:
    """State of one run: the plan, what is counted while it plays, and how it ended."""

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        self.plan = load_plan(folder)
        self.environment = environment
        self.exit_code = EXIT_INTERRUPTED
        self.over = Event()
        self.n_done = 0
        self.n_bad = 0
        self.errors: dict[int, str] = {}

    def guarded(self) -> None:
        """Play, and keep the exit code: Locust would log an error and start over."""
        try:
            self.play()
            self.exit_code = 0
        except Abandoned:
            self.exit_code = EXIT_INTERRUPTED
        except Exception:  # noqa: BLE001 - the process boundary
            traceback.print_exc()
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
                    self.play_phase(dispatcher, "warmup")
                self.window(dispatcher)
            finally:
                dispatcher.kill()
                for sender in senders:
                    sender.close()

    def window(self, dispatcher: Dispatcher) -> None:
        tell("warm", n_sent=self.n_done, n_bad=self.n_bad)
        if not sys.stdin.readline():
            raise Abandoned
        self.n_done = self.n_bad = 0
        self.errors.clear()
        self.environment.stats.reset_all()
        reporter = gevent.spawn(self.report_progress)
        # What lives by now stays: the collector needn't look at it while requests are timed.
        gc.collect()
        gc.freeze()
        clocks = Clocks()
        samples = self.play_phase(dispatcher, "window")
        shares = clocks.shares()
        reporter.kill()
        save_samples(samples, self.folder / SAMPLES_FILE)
        tell("finished", errors=self.errors, **shares)

    def play_phase(self, dispatcher: Dispatcher, phase: Literal["warmup", "window"]) -> Samples:
        plan = self.plan
        arrivals = plan.warmup if phase == "warmup" else plan.window
        if plan.closed is None:
            return dispatcher.play(arrivals)
        duration_s = plan.closed.warmup_s if phase == "warmup" else plan.closed.window_s
        return dispatcher.play_closed(arrivals, plan.closed.n_clients, duration_s)

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
                tell("progress", n_done=self.n_done, n_bad=self.n_bad)
            except OSError:
                # Nobody listens any more, so nobody wants the load.
                self.over.set()
                return
            gevent.sleep(PROGRESS_EVERY_S)


class PlanUser(User):
    """The one user of a run; it plays the whole plan, so Locust's spawning isn't a schedule."""

    abstract = True
    fixed_count = 1
    run_to_play: Run

    @task
    def play_plan(self) -> None:
        self.run_to_play.guarded()
        raise StopUser


def user_of(run: Run) -> type[PlanUser]:
    """Locust wants a class and makes its instances itself, so the run goes into the class."""
    return type("PlanUser", (PlanUser,), {"run_to_play": run, "abstract": False})


class Abandoned(Exception):
    """The parent is gone."""


class RequestFailed(Exception):
    """How a failed request is shown to Locust."""


class Clocks:
    """How busy this process is, from its making on."""

    def __init__(self) -> None:
        self.wall_s = time.monotonic()
        self.thread_s = time.thread_time()
        self.process_s = time.process_time()

    def shares(self) -> dict[str, float]:
        """CPU of the thread that does all the sending, and of the process, in cores."""
        wall_s = time.monotonic() - self.wall_s
        return {
            "cpu_share": (time.thread_time() - self.thread_s) / wall_s,
            "process_cores": (time.process_time() - self.process_s) / wall_s,
        }


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


def allow_open_files(n: int) -> None:
    """Raise the soft limit of open files to `n` where the hard one allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n if hard == resource.RLIM_INFINITY else min(n, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def tell(event: str, **content: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **content}) + "\n")
    sys.stdout.flush()


def longest_s(plan: Plan) -> float:
    """After this time a run must be over, whatever happens."""
    if plan.closed is not None:
        schedules_s = plan.closed.warmup_s + plan.closed.window_s
        return schedules_s + plan.pause_s + 2 * plan.timeout_s + SPARE_S
    schedules_s = sum(float(one.intended_s[-1]) for one in (plan.warmup, plan.window) if len(one))
    return schedules_s + plan.pause_s + 2 * plan.timeout_s + SPARE_S


def main() -> int:
    use_gevent()
    environment = Environment()
    run = Run(Path(sys.argv[1]), environment)
    environment.user_classes = [user_of(run)]
    allow_open_files(run.plan.max_in_flight + SPARE_FILES)
    runner = environment.create_local_runner()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, run.over.set)
    runner.start(user_count=1, spawn_rate=1)
    if not run.over.wait(longest_s(run.plan)):
        sys.stderr.write("the run didn't end in its time\n")
        run.exit_code = EXIT_DEFECT
    runner.quit()
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
