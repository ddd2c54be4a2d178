"""Whether channels chosen by measured seconds buy more than those chosen by counted operations.

    python -m benchmarks.allocations [examples/cifar10/spec.yaml] [--ratios 0.2 0.35 0.5]

A table of the network's layers at several widths is timed on this machine as a study does it, and
the network is pruned by each allocation at each ratio: of multiply-adds for `cost` and `uniform`,
of the table's seconds for `latency`. Each row has what ONNX Runtime in fp32 gains at batch 8 on one
thread, in turns with the whole network, and top-1 on test after recalibration: the better
allocation has more of the one at the same of the other. Nothing is trained. About half an hour for
ResNet-56 on one core.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.techniques import Bench, accuracy_of, kept, open_bench, times_of
from optimizer.block_times import StoredTimes
from optimizer.estimates import Estimates
from optimizer.measuring.local import LocalMeasurer
from optimizer.space import Value
from optimizer.store import Store
from optimizer.techniques import load_technique

SPEC = Path(__file__).parent.parent / "examples" / "cifar10" / "spec.yaml"
RESULTS = Path(__file__).parent / "results" / "allocations"
ALLOCATIONS = ("uniform", "cost", "latency")
CORES = 1


@dataclass(frozen=True)
class Point:
    allocation: str
    ratio: float

    @property
    def parameters(self) -> Mapping[str, Value]:
        return {
            "what": "channels",
            "criterion": "taylor",
            "allocation": self.allocation,
            "ratio": self.ratio,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path, nargs="?", default=SPEC)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    given = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    points = [Point(one, ratio) for one in ALLOCATIONS for ratio in given.ratios]
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "store.sqlite") as store:
        bench = timed(open_bench(given.spec), store)
        print("| allocation | ratio | fewer operations | faster | top-1 |\n|---|---|---|---|---|")
        for point in points:
            show(bench, point)


def timed(bench: Bench, store: Store) -> Bench:
    """With the table of layers in the context."""
    machine = bench.context.machine
    estimates = Estimates(bench.spec, store, LocalMeasurer(), "", CORES, lambda _: None)
    pruning = load_technique("pruning")
    wanted = pruning.timed_blocks(bench.model, bench.context)  # type: ignore[attr-defined]
    started_s = time.monotonic()
    n_known = estimates.measure(wanted, lambda: True)
    seconds = time.monotonic() - started_s
    print(f"{n_known} of {len(wanted)} layers timed in {seconds:.0f} s", flush=True)
    context = replace(bench.context, block_seconds=StoredTimes(store, machine, CORES))
    return replace(bench, context=context)


def show(bench: Bench, point: Point) -> None:
    name = f"{point.allocation} {point.ratio:g}"
    time_ = kept(RESULTS, f"{name} time", lambda: times_of(bench, point.parameters))
    accuracy = kept(RESULTS, f"{name} accuracy", lambda: accuracy_of(bench, point.parameters))
    print(
        f"| {point.allocation} | {point.ratio:g} | {time_['fewer operations']:.2f}x | "
        f"{time_['faster']:.2f} [{time_['low']:.2f}, {time_['high']:.2f}] | "
        f"{accuracy['recalibrated']:.2%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
