"""Single layers decomposed: rank against time in ONNX Runtime and against the error of weights.

    python -m benchmarks.decomposition --weights resnet56-cifar10.safetensors

A trained 3x3 convolution of ResNet-56 (64 channels, 8x8 pixels), and shapes of a VGG-type network
whose weights are drawn, so that they have a time and no meaningful error. All chains of a layer
are timed in turns with the layer itself, on one thread; a round's time is the least of its runs,
and the median of the rounds counts. Takes about two minutes. Results and plot go to
benchmarks/results/; the plot needs matplotlib.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from optimizer.decomposition.factors import factors_of, ranks_of
from optimizer.decomposition.forms import CONVOLUTIONS, Geometry, Link, links_of
from optimizer.decomposition.ranks import RankRule
from serve.machine import this_machine

RESULTS = Path(__file__).parent / "results"
TRAINED = "layer3.4.conv2"
DRAWN = ((128, 16), (256, 8), (512, 4))
"""(channels, pixels a side)."""
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
BATCH_SIZE = 8
N_ROUNDS = 15
N_RUNS = 5


@dataclass(frozen=True)
class Row:
    layer: str
    form: str
    rule: str
    ranks: list[int]
    macs: int
    ms: float
    speedup: float
    error: float | None
    """Relative Frobenius norm of what the weights lost."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    weights = load_file(parser.parse_args().weights)
    rng = np.random.default_rng(0)
    layers = [(TRAINED, weights[f"{TRAINED}.weight"].astype(np.float64), 8, True)]
    for channels, side in DRAWN:
        weight = rng.normal(size=(channels, channels, 3, 3))
        layers.append((f"{channels} channels, {side}x{side}", weight, side, False))
    rows = [row for layer in layers for row in measured(*layer)]
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": this_machine().to_dict(), "batch_size": BATCH_SIZE,
               "rows": [asdict(row) for row in rows]}  # fmt: skip
    (RESULTS / "decomposition.json").write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        error = "" if row.error is None else f"  error {row.error:.1%}"
        print(
            f"{row.layer:22} {row.form:13} {row.rule:7} {row.ranks!s:16} "
            f"{row.macs / 1e6:7.2f} MMAC {row.ms:7.3f} ms {row.speedup:5.2f}x{error}"
        )
    plot(rows)


def measured(name: str, weight: np.ndarray, side: int, is_trained: bool) -> Iterator[Row]:
    n_out, n_in = weight.shape[:2]
    geometry = Geometry(n_in, n_out, (3, 3), (side, side), (side, side))
    chains: list[tuple[str, str, list[int], list[np.ndarray]]] = [("layer", "", [], [weight])]
    rules = [(f"{share:.1%}", RankRule("share", share, 8)) for share in SHARES]
    if is_trained:
        rules.append(("evbmf", RankRule("evbmf", round_to=8)))
    for form in CONVOLUTIONS:
        for shown, rule in rules:
            ranks = ranks_of(form, weight, rule)
            if is_trained:
                factors = factors_of(form, weight, ranks, 0)
            else:  # their values don't matter to the time
                factors = drawn(links_of(name, geometry, form, ranks))
            chains.append((form, shown, ranks, factors))
    sessions = [session(factors, n_in, side) for *_, factors in chains]
    seconds = times(sessions, n_in, side)
    for (form, rule, ranks, factors), one in zip(chains, seconds, strict=True):
        cost = geometry.cost
        if ranks:
            cost = geometry.cost_of(links_of(name, geometry, form, ranks))
        error = lost(weight, factors, form) if is_trained and ranks else None
        yield Row(name, form, rule, ranks, cost.macs, one * 1e3, seconds[0] / one, error)


def drawn(links: Sequence[Link]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.normal(
            size=(
                link.n_out,
                link.n_in // link.groups,
                3 if "y" in link.axes else 1,
                3 if "x" in link.axes else 1,
            )
        )
        for link in links
    ]


def lost(weight: np.ndarray, factors: list[np.ndarray], form: str) -> float:
    first, last = factors[0][:, :, 0, 0], factors[-1][:, :, 0, 0]
    if form == "tucker":
        again = np.einsum("ai,bayx,ob->oiyx", first, factors[1], last)
    elif form == "cp":
        y, x = factors[1][:, 0, :, 0], factors[2][:, 0, 0, :]
        again = np.einsum("ri,ry,rx,or->oiyx", first, y, x, last, optimize=True)
    else:
        y, x = factors[1][:, :, :, 0], factors[2][:, :, 0, :]
        again = np.einsum("ai,bay,cbx,oc->oiyx", first, y, x, last, optimize=True)
    return float(np.linalg.norm(weight - again) / np.linalg.norm(weight))


def session(factors: list[np.ndarray], n_in: int, side: int) -> onnxruntime.InferenceSession:
    """The convolutions one behind the other, with a ReLU at the end as networks have it."""
    nodes, given = [], "x"
    for index, factor in enumerate(factors):
        height, width = factor.shape[2:]
        groups = len(factor) if factor.shape[1] == 1 else 1
        pads = [height // 2, width // 2] * 2
        nodes.append(helper.make_node("Conv", [given, f"w{index}"], [f"y{index}"], pads=pads,
                                      group=groups))  # fmt: skip
        given = f"y{index}"
    nodes.append(helper.make_node("Relu", [given], ["z"]))
    graph = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", n_in, side, side])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(one.astype(np.float32), f"w{i}") for i, one in enumerate(factors)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def times(sessions: list[onnxruntime.InferenceSession], n_in: int, side: int) -> list[float]:
    rng = np.random.default_rng(0)
    images = {"x": rng.normal(size=(BATCH_SIZE, n_in, side, side)).astype(np.float32)}
    rounds = [
        [min(timed(one, images) for _ in range(N_RUNS)) for one in sessions]
        for _ in range(N_ROUNDS)
    ]
    return [float(np.median(column)) for column in zip(*rounds, strict=True)]


def timed(one: onnxruntime.InferenceSession, images: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    one.run(None, images)
    return time.perf_counter() - start


def plot(rows: list[Row]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name in dict.fromkeys(row.layer for row in rows):
        for form, style in zip(CONVOLUTIONS, ("-", "--", ":"), strict=True):
            own = [row for row in rows if row.layer == name and row.form == form]
            own = [row for row in own if row.rule != "evbmf"]
            shares = [float(row.rule.rstrip("%")) for row in own]
            label = f"{name}, {form.replace('_', ' ')}"
            line = left.plot(shares, [row.speedup for row in own], style, marker="o", label=label)
            if own[0].error is not None:
                right.plot(
                    [row.speedup for row in own],
                    [row.error for row in own],
                    style,
                    marker="o",
                    color=line[0].get_color(),
                    label=form.replace("_", " "),
                )
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="rank, % of the largest", ylabel="times as fast as the layer", yscale="log")
    left.legend(fontsize=6)
    right.axvline(1, color="grey", linewidth=0.8)
    right.set(xlabel="times as fast as the layer", ylabel="relative error of weights",
              title=TRAINED, ylim=(0, None))  # fmt: skip
    right.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "decomposition.png", dpi=120)


if __name__ == "__main__":
    main()
