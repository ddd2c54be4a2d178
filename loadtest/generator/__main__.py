"""Play a plan with Locust: started by `loadtest.driver`, as `python -m loadtest.generator`.

`play FOLDER` talks to its parent in JSON lines on standard output: `warm` once the warm-up has
drained, `started` with the window's start on time.monotonic(), `progress`, and `finished` when the
samples are in the folder; with workers also `listening`, `workers` and `failed`. After `warm` it
waits for a line on standard input. Exit code 0, 70 for a defect of its own, 130 when interrupted.

`work --master HOST:PORT` is a worker, which plays its part of the plan that the master has; 69
where no master answers.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

# Locust first: it patches the standard library, which all others must find patched.
from locust.env import Environment  # isort: skip
from locust.stats import stats_history  # isort: skip

import gevent

from loadtest.generator.files import allow_open_files
from loadtest.generator.master import WAIT_S, Master
from loadtest.generator.parent import PipeParent
from loadtest.generator.rpc import use_gevent
from loadtest.generator.run import EXIT_DEFECT, Run, longest_s, user_class
from loadtest.generator.stopping import on_signals
from loadtest.generator.worker import START_S, work
from loadtest.plan import Plan, load_plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    player = commands.add_parser("play")
    player.add_argument("folder", type=Path)
    player.add_argument("--workers", type=int, default=0, help="0: plays alone")
    player.add_argument("--bind", type=address, default=("127.0.0.1", 0), help="for the workers")
    player.add_argument("--web", type=address, help="of Locust's interface; without it none")
    worker = commands.add_parser("work")
    worker.add_argument("--master", type=address, required=True)
    given = parser.parse_args()
    # Locust's web interface reads the command line too, as its own.
    del sys.argv[1:]
    use_gevent()
    if given.command == "work":
        return work(*given.master)
    plan = load_plan(given.folder)
    if given.workers:
        return lead(plan, given)
    return play(plan, given)


def play(plan: Plan, given: argparse.Namespace) -> int:
    """Alone."""
    environment = Environment()
    run = Run(plan, PipeParent(given.folder), environment)
    environment.user_classes = [user_class(run)]
    allow_open_files(plan.max_in_flight)
    runner = environment.create_local_runner()
    on_signals(run.over.set)
    show(environment, given.web)
    runner.start(user_count=1, spawn_rate=1)
    if not run.over.wait(longest_s(plan)):
        run.exit_code, run.trace = EXIT_DEFECT, "the run didn't end in its time"
    sys.stderr.write(run.trace)
    runner.quit()
    return run.exit_code


def lead(plan: Plan, given: argparse.Namespace) -> int:
    """As the master of workers."""
    environment = Environment()
    environment.user_classes = [user_class()]
    runner = environment.create_master_runner(*given.bind)
    master = Master(environment, runner, plan, given.workers)
    on_signals(master.over.set)
    show(environment, given.web)
    gevent.spawn(master.guarded, given.folder)
    if not master.over.wait(WAIT_S + START_S + longest_s(plan)):
        sys.stderr.write("the run didn't end in its time\n")
        master.exit_code = EXIT_DEFECT
    runner.quit()
    return master.exit_code


def show(environment: Environment, web: tuple[str, int] | None) -> None:
    """Locust's web interface, for as long as the run takes."""
    if web is not None:
        environment.create_web_ui(*web)
        history: Any = stats_history
        gevent.spawn(history, environment.runner)


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, want HOST:PORT")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    sys.exit(main())
