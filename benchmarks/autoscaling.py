"""By which metric Kubernetes' autoscaler keeps an SLO, and at what cost: a simulation.

    python -m benchmarks.autoscaling start [MODEL.onnx]        # how long the real server takes
    python -m benchmarks.autoscaling compare [--start-s 15] [--plot docs/autoscaling.svg]

Requests arrive at random, go to a replica at random, and wait there in line for one that takes
`--service-ms` (an M/D/1 queue for each replica; whoever would wait longer than `--max-wait-ms` is
refused). The highest rate that keeps the SLO, and what is in flight, in use and asked for at
`--utilization` of it, are found on one such replica, as `trimserve k8s render` has it from a
measured one: all autoscalers but one aim at that same point. They decide by the algorithm of the
HorizontalPodAutoscaler (horizontal_autoscaler.py) every 15 s, on metrics that are as old as they
are in a cluster: Prometheus scrapes every 15 s and a rate is over a minute; the metrics server has
the CPU of the last 15 s. A new replica serves `--start-s` after it was asked for, and is paid from
then.
"""

import argparse
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.horizontal_autoscaler import (
    DEFAULT,
    SYNC_S,
    Behavior,
    State,
    behavior_of,
    decide,
    wanted_by_total,
    wanted_by_utilization,
)

SCALED_OBJECT = Path(__file__).parents[1] / "k8s/components/keda/scaled-object.yaml"
SCRAPE_S, RATE_WINDOW_S, CPU_WINDOW_S = 15, 60, 15
QUANTILE = 0.99
USUAL_CPU = 0.8
"""What is set for want of a measurement."""


@dataclass(frozen=True)
class Queue:
    """A replica."""

    service_s: float
    threshold_s: float
    max_wait_s: float


@dataclass(frozen=True)
class Point:
    """A replica at a rate, on average over time."""

    rate_per_s: float
    in_flight: float
    used: float
    """share of the time in which it computes"""
    good_share: float


@dataclass
class Second:
    """What happened in one, all replicas together; `used` of each that was ready."""

    arrived: int = 0
    good: int = 0
    in_flight: float = 0.0
    used: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """What an autoscaler may look at: the past, and pods by their number."""

    seconds: Sequence[Second]
    ready: int
    unready: int
    now: int


@dataclass(frozen=True)
class Scaler:
    """`wanted` gives replicas from what is seen and how many there are."""

    name: str
    wanted: Callable[[Seen, int], int]
    behavior: Behavior
    least: int
    most: int


@dataclass(frozen=True)
class Run:
    """By second: replicas that are paid, requests, and those that kept the threshold."""

    replicas: tuple[int, ...]
    arrived: tuple[int, ...]
    good: tuple[int, ...]

    @property
    def bad_share(self) -> float:
        return 1 - sum(self.good) / sum(self.arrived)

    @property
    def replica_hours(self) -> float:
        return sum(self.replicas) / 3600


# --- the queue


class Replica:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._free_at = 0.0

    def answer(self, at_s: float, service_s: float, into: Second) -> bool:
        """Whether a request of `at_s` was taken; its time and whether it was good are counted."""
        wait_s = max(0.0, self._free_at - at_s)
        if wait_s > self._queue.max_wait_s:
            return False
        duration_s = wait_s + service_s
        self._free_at = at_s + duration_s
        into.in_flight += duration_s
        into.good += duration_s <= self._queue.threshold_s
        return True


def serve_second(
    replicas: Sequence[Replica], service_s: float, rate_per_s: float, now: int, rng: random.Random
) -> Second:
    """Poisson arrivals of one second, each at a replica at random."""
    second = Second(used=[0.0] * len(replicas))
    at_s = float(now)
    while rate_per_s > 0:
        at_s += rng.expovariate(rate_per_s)
        if at_s >= now + 1:
            break
        second.arrived += 1
        index = rng.randrange(len(replicas))
        if replicas[index].answer(at_s, service_s, second):
            second.used[index] += service_s
    return second


def point_at(queue: Queue, rate_per_s: float, length_s: int = 2_000, seed: int = 0) -> Point:
    rng, replicas = random.Random(seed), [Replica(queue)]
    seconds = [
        serve_second(replicas, queue.service_s, rate_per_s, now, rng) for now in range(length_s)
    ]
    arrived = sum(one.arrived for one in seconds)
    return Point(
        rate_per_s,
        sum(one.in_flight for one in seconds) / length_s,
        sum(one.used[0] for one in seconds) / length_s,
        sum(one.good for one in seconds) / arrived,
    )


def capacity_of(queue: Queue) -> float:
    """The highest rate at which QUANTILE is good, by bisection to 1 %."""
    low, high = 0.01 / queue.service_s, 1 / queue.service_s
    while high / low > 1.01:
        middle = (low + high) / 2
        is_good = point_at(queue, middle).good_share >= QUANTILE
        low, high = (middle, high) if is_good else (low, middle)
    return low


# --- loads


@dataclass(frozen=True)
class Load:
    """By second: the rate, in multiples of what a replica is to have, and how many times as long
    as usual a request takes."""

    rates: tuple[float, ...]
    dearness: tuple[float, ...]

    def needed(self, now: int) -> float:
        """Replicas."""
        return self.rates[now] * self.dearness[now]


def usual(rates: Sequence[float]) -> Load:
    return Load(tuple(rates), (1.0,) * len(rates))


def step(length_s: int = 2_700) -> Load:
    return usual([2.0 if not 600 <= now < 1_500 else 8.0 for now in range(length_s)])


def day(length_s: int = 7_200) -> Load:
    """A day's wave in two hours: twelve times as steep as a day."""
    return usual([7.0 - 5.0 * math.cos(2 * math.pi * now / length_s) for now in range(length_s)])


def bursts(length_s: int = 2_700) -> Load:
    """45 s in each five minutes, about as long as it takes to see and answer one."""
    return usual([9.0 if now % 300 >= 255 else 3.0 for now in range(length_s)])


def dear(length_s: int = 2_700) -> Load:
    """The same rate, and requests that take half as long again: longer inputs, a new version."""
    dearness = tuple(1.5 if 600 <= now < 1_500 else 1.0 for now in range(length_s))
    return Load((4.0,) * length_s, dearness)


LOADS: dict[str, Callable[[], Load]] = {
    "step": step,
    "day": day,
    "bursts": bursts,
    "dear requests": dear,
}


# --- autoscalers


def scalers(target: Point) -> list[Scaler]:
    """With the behavior and the limits of k8s/components/keda; all but the last aim at `target`."""
    (document,) = yaml.safe_load_all(SCALED_OBJECT.read_text())
    spec = document["spec"]
    ours = behavior_of(spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"])
    limits = (spec["minReplicaCount"], spec["maxReplicaCount"])

    def in_flight(seen: Seen, replicas: int) -> int:
        total = _rate(seen, lambda one: one.in_flight)
        return replicas if total is None else wanted_by_total(total, target.in_flight, replicas)

    def rate(seen: Seen, replicas: int) -> int:
        total = _rate(seen, lambda one: one.arrived)
        return replicas if total is None else wanted_by_total(total, target.rate_per_s, replicas)

    def cpu(wanted_share: float) -> Callable[[Seen, int], int]:
        def wanted(seen: Seen, replicas: int) -> int:
            used = _cpu(seen)
            return wanted_by_utilization(used, wanted_share, seen.unready, replicas)

        return wanted

    return [
        Scaler("in flight", in_flight, ours, *limits),
        Scaler("in flight, default behavior", in_flight, DEFAULT, *limits),
        Scaler("requests/s", rate, ours, *limits),
        Scaler("CPU", cpu(target.used), ours, *limits),
        Scaler(f"CPU at {USUAL_CPU:.0%}", cpu(USUAL_CPU), ours, *limits),
    ]


def _rate(seen: Seen, value: Callable[[Second], float]) -> float | None:
    """As PromQL's rate over a minute, up to the last scrape; none before there are two."""
    scraped = seen.now // SCRAPE_S * SCRAPE_S
    begin = max(0, scraped - RATE_WINDOW_S)
    if scraped - begin < SCRAPE_S:
        return None
    return sum(value(one) for one in seen.seconds[begin:scraped]) / (scraped - begin)


def _cpu(seen: Seen) -> list[float]:
    """Of each pod that was ready for the whole of the metrics server's last window."""
    end = seen.now // CPU_WINDOW_S * CPU_WINDOW_S
    window = seen.seconds[max(0, end - CPU_WINDOW_S) : end]
    n = min((len(one.used) for one in (*window, *seen.seconds[-1:])), default=0)
    return (
        [sum(one.used[pod] for one in window) / len(window) for pod in range(n)] if window else []
    )


def simulate(
    load: Load, full_per_s: float, queue: Queue, scaler: Scaler, start_s: int, seed: int
) -> Run:
    """With as many replicas at first as the load needs, `full_per_s` the rate of one."""
    rng = random.Random(seed)
    replicas = max(scaler.least, math.ceil(load.needed(0)))
    ready = [Replica(queue) for _ in range(replicas)]
    starting: list[int] = []
    state = State(replicas, ((0.0, replicas),))
    seconds: list[Second] = []
    paid: list[int] = []
    for now, (rate, dearness) in enumerate(zip(load.rates, load.dearness, strict=True)):
        if now and now % SYNC_S == 7:
            seen = Seen(seconds, len(ready), len(starting), now)
            wanted = scaler.wanted(seen, state.replicas)
            state = decide(state, wanted, now, scaler.behavior, scaler.least, scaler.most)
        ready += [Replica(queue) for at in starting if at <= now]
        starting = [at for at in starting if at > now]
        missing = state.replicas - len(ready) - len(starting)
        starting += [now + start_s] * missing
        surplus = max(0, -missing)
        # The Deployment takes those first that aren't ready yet.
        starting = starting[: max(0, len(starting) - surplus)]
        ready = ready[: state.replicas - len(starting)]
        service_s = dearness * queue.service_s
        seconds.append(serve_second(ready, service_s, rate * full_per_s, now, rng))
        paid.append(len(ready) + len(starting))
    return Run(
        tuple(paid), tuple(one.arrived for one in seconds), tuple(one.good for one in seconds)
    )


# --- what the real server takes to start


def start_times(model: Path, rounds: int = 5) -> list[float]:
    """Seconds from the process's start to the line that says that the models are ready."""
    ports = [f"--{kind}-port=0" for kind in ("http", "grpc", "metrics")]
    command = [sys.executable, "-m", "trimserve", "serve", "--model", str(model), *ports]
    times = []
    for _ in range(rounds):
        began = time.monotonic()
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            times.append(time.monotonic() - began)
            if not line:
                raise SystemExit(f"{model}: the server ended before it was ready")
        finally:
            server.terminate()
            server.wait(60)
    return times


def tiny_model(folder: Path) -> Path:
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    rows = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [rows("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [rows("y", onnx.TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "linear.onnx")
    return folder / "linear.onnx"


# --- the command


def compare(arguments: argparse.Namespace) -> None:
    queue = Queue(
        arguments.service_ms / 1e3, arguments.threshold_ms / 1e3, arguments.max_wait_ms / 1e3
    )
    capacity_per_s = capacity_of(queue)
    target = point_at(queue, arguments.utilization * capacity_per_s)
    print(
        f"a replica keeps p{100 * QUANTILE:g} at {arguments.threshold_ms:g} ms up to "
        f"{capacity_per_s:.4g}/s; target: {target.rate_per_s:.4g}/s, {target.in_flight:.3g} in "
        f"flight, CPU {target.used:.0%}"
    )
    results: dict[str, dict[str, list[Run]]] = {}
    print(f"{'load':13} {'scaled by':28} {'bad %':>14} {'replica-hours':>14} {'of fixed':>9}")
    for load_name, make in LOADS.items():
        load = make()
        n = len(load.rates)
        fixed = math.ceil(max(load.needed(now) for now in range(n))) * n / 3600
        for scaler in scalers(target):
            runs = [
                simulate(load, target.rate_per_s, queue, scaler, arguments.start_s, seed)
                for seed in range(arguments.seeds)
            ]
            results.setdefault(load_name, {})[scaler.name] = runs
            shares = [100 * one.bad_share for one in runs]
            hours = sum(one.replica_hours for one in runs) / len(runs)
            print(
                f"{load_name:13} {scaler.name:28} {min(shares):6.2f} to {max(shares):<5.2f} "
                f"{hours:13.2f} {hours / fixed:8.0%}",
                flush=True,
            )
    if arguments.plot:
        plot(results, target, arguments)


def plot(
    results: dict[str, dict[str, list[Run]]], target: Point, arguments: argparse.Namespace
) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "trimserve"  # the same file for the same figures
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(LOADS), figsize=(14, 6.4), height_ratios=[3, 2])
    for column, (load_name, of) in enumerate(results.items()):
        over_time, bars = axes[0, column], axes[1, column]
        load = LOADS[load_name]()
        times = range(0, len(load.rates), 15)
        minutes = [now / 60 for now in times]
        over_time.plot(
            minutes,
            [load.needed(now) for now in times],
            color="black",
            linestyle=":",
            label="needed",
        )
        for name, runs in of.items():
            over_time.step(minutes, runs[0].replicas[::15], label=name, where="post", linewidth=1)
        over_time.set_title(load_name)
        over_time.set_xlabel("minutes")
        over_time.set_ylim(0, None)
        shares = [100 * sum(one.bad_share for one in runs) / len(runs) for runs in of.values()]
        hours = [sum(one.replica_hours for one in runs) / len(runs) for runs in of.values()]
        colors = [f"C{index}" for index in range(len(of))]
        bars.scatter(hours, shares, c=colors)
        bars.axhline(100 * (1 - QUANTILE), color="black", linewidth=0.8, linestyle="--")
        bars.set_yscale("symlog", linthresh=1)
        bars.set_ylim(0, 20)
        bars.set_xlim(0, None)
        bars.set_xlabel("replica-hours")
    axes[0, 0].set_ylabel("replicas")
    axes[1, 0].set_ylabel("bad requests, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False)
    figure.suptitle(
        f"{arguments.service_ms:g} ms a request, p99 within {arguments.threshold_ms:g} ms; a "
        f"replica starts in {arguments.start_s} s; target CPU {target.used:.0%}",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(arguments.plot, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    starting = commands.add_parser("start")
    starting.add_argument("model", type=Path, nargs="?")
    starting.set_defaults(run=start)
    comparing = commands.add_parser("compare")
    comparing.add_argument("--service-ms", type=float, default=10)
    comparing.add_argument("--threshold-ms", type=float, default=50)
    comparing.add_argument("--max-wait-ms", type=float, default=250)
    comparing.add_argument("--utilization", type=float, default=0.8)
    comparing.add_argument("--start-s", type=int, default=15)
    comparing.add_argument("--seeds", type=int, default=3)
    comparing.add_argument("--plot", type=Path)
    comparing.set_defaults(run=compare)
    arguments = parser.parse_args()
    arguments.run(arguments)


def start(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or tiny_model(Path(folder))
        times = sorted(start_times(model))
    print(f"{model.name}: ready after {times[0]:.2f} to {times[-1]:.2f} s, {len(times)} starts")


if __name__ == "__main__":
    main()
