"""Whether keeping an engine's threads to processors of their own makes timings steadier.

    python -m benchmarks.affinity --rounds 4

A network is timed against itself (A/A), so the true ratio is 1: the narrower its interval and the
nearer its estimate to 1, the better. *free* leaves threads to the system, *together* keeps all
instances to as many processors as they have threads, *apart* each instance to its own. Ways take
turns, round by round.
"""

import argparse
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from optimizer.evaluator import configurations
from optimizer.measuring.local import places
from optimizer.parity import fixed_sizes
from optimizer.timing import Contender, Effort, Places, Timing, measure
from serve.engines import EngineSpec
from serve.machine import allowed_cores, allowed_cpus

SIZES = (1, 8, 32)
CHANNELS = (3, 16, 16, 32, 32, 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one timing, at least")
    arguments = parser.parse_args()
    effort = Effort(min_passes=16, seconds=arguments.seconds, max_warmup_s=0.5, max_retries=0)
    print("| engine | instances x threads | way | width | error | p50 ms | its spread | steal |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        write_network(Path(scratch, "model.onnx"))
        for spec in specs():
            for way, timings in compare(Contender(Path(scratch), spec), arguments.rounds, effort):
                print(row(spec, way, timings), flush=True)


def specs() -> Iterator[EngineSpec]:
    for engine in ("onnxruntime", "openvino"):
        for one in configurations(allowed_cores()):
            yield EngineSpec(
                engine, "model.onnx", "fp32", one.threads, one.instances, fixed_sizes(engine, SIZES)
            )


def ways(spec: EngineSpec) -> dict[str, Places]:
    apart = places(spec, allowed_cpus())
    return {"free": (), "together": [frozenset().union(*apart)] * len(apart), "apart": apart}


def compare(
    contender: Contender, rounds: int, effort: Effort
) -> Iterator[tuple[str, list[Timing]]]:
    images = np.random.default_rng(0).normal(size=(64, 3, 16, 16)).astype(np.float32)
    timings: dict[str, list[Timing]] = {way: [] for way in ways(contender.spec)}
    for seed in range(rounds):
        for way, bound in ways(contender.spec).items():
            timing = measure(
                contender, contender, {"x": images}, SIZES, effort=effort, seed=seed, places=bound
            )
            timings[way].append(timing)
    yield from timings.items()


def row(spec: EngineSpec, way: str, timings: list[Timing]) -> str:
    speedups = [timing.speedup for timing in timings if timing.speedup is not None]
    widths = [(one.high - one.low) / one.estimate for one in speedups]
    errors = [abs(one.estimate - 1) for one in speedups]
    p50s = np.array([timing.times.times[-1].p50_s * 1e3 for timing in timings])
    steal = [timing.surroundings.steal_share or 0.0 for timing in timings]
    figures = (
        f"{np.median(widths):.1%}", f"{np.median(errors):.1%}", f"{np.median(p50s):.2f}",
        f"{np.ptp(p50s) / np.median(p50s):.0%}", f"{np.mean(steal):.1%}",
    )  # fmt: skip
    return f"| {spec.name} | {spec.instances} x {spec.threads} | {way} | {' | '.join(figures)} |"


def write_network(path: Path) -> None:
    """x FP32[-1, 3, 16, 16] -> y FP32[-1, 10]: six convolutions, two of them with stride 2."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer, (n_in, n_out) in enumerate(pairwise(CHANNELS)):
        kernel = random.normal(size=(n_out, n_in, 3, 3)) / np.sqrt(9 * n_in)
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"w{layer}"))
        stride = 1 + (n_in not in (n_out, CHANNELS[0]))
        nodes += [
            helper.make_node(
                "Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1] * 4, strides=[stride] * 2
            ),
            helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]),
        ]
        last = f"r{layer}"
    final = random.normal(size=(CHANNELS[-1], 10)).astype(np.float32)
    weights.append(numpy_helper.from_array(final, "w"))
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "network",
        [tensor("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [tensor("y", TensorProto.FLOAT, ["n", 10])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


if __name__ == "__main__":
    main()
