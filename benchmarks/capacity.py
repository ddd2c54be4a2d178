"""Whether the capacity simulation says what the real server does.

    python -m benchmarks.capacity accuracy MODEL.onnx [--json out.json]
    python -m benchmarks.capacity slos MODEL.onnx [--first 0] [--count 20] [--json out.json]
    python -m benchmarks.capacity build FOLDER          # ResNet-8 and ResNet-56, random weights

`accuracy` measures this machine's overheads and the engine's times, predicts, loads the real server
at 0.5, 0.7 and 0.85 of the predicted highest throughput, each twice with other arrivals, each right
after timing the engine anew, since machines drift. How far the two runs of one rate are apart is
what no prediction can be better than.

`slos` finds by bisection the rate that the real server holds at a threshold, places objectives at
0.9 to 1.1 of it, decides each as the optimizer does (prediction, then verification), and then tests
it once more, twice as long, for the truth.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from loadtest.slo import Slo
from optimizer.capacity import max_rate_per_s, predict
from optimizer.overheads import measure_overheads
from optimizer.simulation import FrontEnd, Load, Replica
from optimizer.timing import Contender, Effort, measure
from optimizer.verify import Candidate, ServerVerifier
from serve.artifact import Batching, Manifest
from serve.engines import EngineSpec, load_engine

UTILIZATIONS = (0.5, 0.7, 0.85)
SIZES = (1, 2, 4, 8)
EFFORT = Effort(min_passes=150, max_passes=600, seconds=6.0)
BRIEF = Effort(min_passes=30, max_passes=400, seconds=2.0)
"""Before each load, since these machines drift."""
TRUTH = 2
"""Windows of the test that says the truth."""
BISECTIONS = 5
UNCERTAIN = 1.15
"""Predictions up to so many times the threshold are put to the server."""


@dataclass(frozen=True)
class Subject:
    """A model in its serving configuration: one instance, one thread, one core."""

    path: Path
    spec: EngineSpec
    inputs: dict[str, np.ndarray]
    manifest: Manifest

    @classmethod
    def of(cls, path: Path) -> "Subject":
        spec = EngineSpec("onnxruntime", path.name, instances=1, threads=1)
        engine = load_engine(path.parent, spec)
        try:
            signature = engine.signature
        finally:
            engine.close()
        rng = np.random.default_rng(0)
        inputs = {
            one.name: rng.standard_normal((64, *one.shape[1:])).astype(np.float32)
            for one in signature.inputs
        }
        manifest = Manifest("subject", "1", signature, spec, Batching(SIZES[-1]))
        return cls(path, spec, inputs, manifest)

    @property
    def n_values(self) -> int:
        return sum(array[0].size for array in self.inputs.values())

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.manifest, {self.path.name: self.path})

    def times(self, seed: int, effort: Effort):
        contender = Contender(self.path.parent, self.spec)
        return measure(contender, None, self.inputs, SIZES, effort=effort, seed=seed).times

    def replica(self, seed: int, front_end: FrontEnd, effort: Effort = EFFORT) -> Replica:
        return Replica(self.times(seed, effort), 1, SIZES[-1], front_end=front_end)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mode", choices=("accuracy", "slos", "build"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--window-s", type=float, default=10.0)
    parser.add_argument("--overheads-s", type=float, default=3.0)
    parser.add_argument(
        "--threshold", type=float, default=12.0, help="of slos, in calls at batch 1"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.mode == "build":
        return build(arguments.path)
    rows = (accuracy if arguments.mode == "accuracy" else slos)(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def accuracy(arguments):
    subject = Subject.of(arguments.path)
    overheads = measured_overheads(subject, arguments)
    replica = subject.replica(0, overheads.front_end())
    service_s = replica.times.times[0].p50_s
    highest = replica.highest_throughput(1)
    print(f"engine {service_s * 1e3:.2f} ms at 1, highest throughput predicted {highest:.0f}/s")
    rows = []
    for seed in range(2):
        for share in UTILIZATIONS if seed % 2 == 0 else reversed(UTILIZATIONS):
            timed = subject.replica(seed, overheads.front_end(), effort=BRIEF)
            said = predict(timed, Load(share * highest))
            seen = verified(subject, share * highest, arguments.window_s, seed)
            slowed = timed.times.times[0].p50_s / service_s
            rows.append(
                {"share": share, "slowed": slowed, "predicted": asdict(said), "seen": asdict(seen)}
            )
            print(
                f"{share:.2f} {share * highest:6.0f}/s  engine x{slowed:.2f}  "
                f"{compared('p50', said.p50_s, seen.p50_s)}  "
                f"{compared('p99', said.p99_s, seen.p99_s)}",
                flush=True,
            )
    for share in UTILIZATIONS:
        p99s_s = [row["seen"]["p99_s"] or np.inf for row in rows if row["share"] == share]
        print(f"{share:.2f} p99 of two runs of the same rate: x{max(p99s_s) / min(p99s_s):.2f}")
    return {
        "model": arguments.path.name,
        "overheads": overheads.to_dict(),
        "times": asdict(replica.times),
        "rows": rows,
    }


def compared(name, said_s, seen_s):
    seen_s = seen_s or np.inf
    return (
        f"{name} {said_s * 1e3:7.2f} ms predicted {seen_s * 1e3:7.2f} measured "
        f"({said_s / seen_s:.2f})"
    )


def slos(arguments):
    subject = Subject.of(arguments.path)
    overheads = measured_overheads(subject, arguments)
    replica = subject.replica(0, overheads.front_end())
    threshold_s = arguments.threshold * replica.times.times[0].p50_s
    predicted = max_rate_per_s(replica, Load(1.0, threshold_s))
    print(f"threshold {threshold_s * 1e3:.1f} ms, capacity predicted {predicted:.0f}/s", flush=True)
    capacity = measured_capacity(subject, arguments, threshold_s, predicted)
    print(f"capacity measured {capacity:.0f}/s, predicted / measured {predicted / capacity:.2f}")
    rows = []
    for index in range(arguments.first, arguments.first + arguments.count):
        rate = capacity * (0.9 + 0.2 * (index * 7 % 20) / 19)
        said = predict(replica, Load(rate, threshold_s))
        decided = "infeasible"
        if said.slo_latency_s <= UNCERTAIN * threshold_s:
            window_s = arguments.window_s
            decided = verified(subject, rate, window_s, index, threshold_s).verdict
        truth = verified(subject, rate, TRUTH * arguments.window_s, 100 + index, threshold_s)
        feasible = truth.p99_s is not None and truth.p99_s <= threshold_s
        outcome = {(True, True): "found", (False, True): "missed", (True, False): "FALSE"}.get(
            (decided == "met", feasible), "refused"
        )
        print(
            f"{rate / capacity:.2f} predicted {said.p99_s * 1e3:.2f} ms, decided {decided}, "
            f"truth {(truth.p99_s or np.inf) * 1e3:.2f} ms: {outcome}",
            flush=True,
        )
        rows.append({"rate_per_s": rate, "outcome": outcome, "truth": asdict(truth)})
    n = {name: sum(row["outcome"] == name for row in rows) for name in ("found", "missed", "FALSE")}
    print(f"found {n['found']}, missed {n['missed']}, false {n['FALSE']}, of {len(rows)}")
    return {
        "model": arguments.path.name,
        "threshold_s": threshold_s,
        "predicted_per_s": predicted,
        "measured_per_s": capacity,
        "rows": rows,
    }


def measured_capacity(subject, arguments, threshold_s, predicted):
    """The rate that is held, from half to one and a half times the prediction, to 3 %."""
    low, high = 0.5 * predicted, 1.5 * predicted
    for seed in range(BISECTIONS):
        rate = (low + high) / 2
        p99_s = verified(subject, rate, TRUTH * arguments.window_s, 200 + seed).p99_s or np.inf
        print(f"{rate:.0f}/s: p99 {p99_s * 1e3:.1f} ms", flush=True)
        low, high = (rate, high) if p99_s <= threshold_s else (low, rate)
    if low == 0.5 * predicted:
        raise SystemExit(
            f"{low:.0f}/s, half of the predicted rate, may be too much: not one was held"
        )
    return (low + high) / 2


def measured_overheads(subject, arguments):
    started = time.monotonic()
    overheads = measure_overheads(
        1, n_values=subject.n_values, window_s=arguments.overheads_s, seed=0
    )
    for transport, cost in overheads.costs.items():
        print(
            f"{transport}: {cost.request_s * 1e6:.0f} us a request, {cost.wakeup_s * 1e6:.0f} a "
            f"wake-up, {cost.batch_s * 1e6:.0f} a batch, way {quantiles(cost.way)} ms"
        )
    seconds = time.monotonic() - started
    print(f"wait for a taken core {quantiles(overheads.wake)} ms; all that took {seconds:.0f} s")
    return overheads


def quantiles(spread):
    return " ".join(f"{spread.seconds[index] * 1e3:.2f}" for index in (4, 6, 9, 11))


def verified(subject, rate_per_s, window_s, seed, threshold_s=1.0):
    slo = Slo.model_validate(
        {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": "benchmark",
            "latency": {"threshold_ms": threshold_s * 1e3},
            "workload": {"rate_per_s": rate_per_s},
            "window_s": window_s,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **subject.inputs)
        verifier = ServerVerifier(cores=1, inputs=inputs, seed=seed, warmup_s=2.0, max_repeats=0)
        return verifier.verify(subject.candidate, slo)


def build(folder: Path) -> int:
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "cifar10"))
    import resnet

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, n_blocks in (("resnet8", 1), ("resnet56", 9)):
        axes = {"image": {0: "n"}, "logits": {0: "n"}}
        torch.onnx.export(
            resnet.ResNet(n_blocks).eval(),
            (torch.zeros(2, 3, 32, 32),),
            str(folder / f"{name}.onnx"),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes=axes,
            dynamo=False,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
