"""How soon the controller finds the best network, against its controls, on a space of which
everything is known.

    python -m benchmarks.architecture table
    python -m benchmarks.architecture time
    python -m benchmarks.architecture replay [--seeds 50] [--plot docs/architecture.svg]

`table` trains each of 288 networks for scikit-learn's digits from scratch, the same few epochs,
and `time` measures their blocks and 24 of them whole, in ONNX Runtime on one thread; both are kept
in `benchmarks/results/architecture-digits.json`, and what is there isn't done again. `replay`
needs neither: every proposer looks up what a network is worth, with the latency that the block
table predicts.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from benchmarks.quantization import Results
from optimizer.architecture.controller import Controller
from optimizer.architecture.latency import LatencyModel, blocks_in
from optimizer.architecture.networks import build
from optimizer.architecture.predictor import PredictorGuided
from optimizer.architecture.proposers import Evolution, Proposer, RandomSearch
from optimizer.architecture.reward import Reward
from optimizer.architecture.search import Worth, explored
from optimizer.architecture.space import ArchitectureSpace, Choices, StageChoices, VisionNetworks
from optimizer.blocks import block_inputs, write_block
from optimizer.data.splits import Samples
from optimizer.search.block_table import Pair, correction, trust
from optimizer.timing import Contender, Effort, measure
from optimizer.training.batches import Batches
from optimizer.training.distillation import Distillation, Mixture
from optimizer.training.loop import Settings, train
from optimizer.training.recalibration import recalibrate
from optimizer.training.teacher import answering
from serve.engines import EngineSpec
from serve.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "architecture-digits.json"
BLOCKS = ("conv", "depthwise", "mbconv")
SPACE = ArchitectureSpace(
    VisionNetworks(
        (1, 8, 8),
        10,
        (4, 8),
        (
            StageChoices((1, 2), (8, 16), BLOCKS, expansions=(2,)),
            StageChoices((1, 2), (16, 32), BLOCKS, expansions=(2,), stride=2),
        ),
    )
)
N_TRAIN, EPOCHS, BATCH = 1200, 2, 32
BATCH_SIZE, N_WHOLE = 8, 24
EFFORT = Effort(min_passes=20, max_passes=200, seconds=1.0)
REWARD = Reward(target_s=2e-4)
N_EVALUATIONS = 100


class Digits:
    """Rows of scikit-learn's digits as a split."""

    def __init__(self, name: str, rows: slice) -> None:
        found = load_digits()
        order = np.random.default_rng(0).permutation(len(found.target))[rows]
        self.name, self.digest = name, ""
        self.images = (found.images[order, None] / 16 - 0.5).astype(np.float32)
        self.labels = found.target[order].astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Any = None) -> Samples:
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)
        return Samples({"image": self.images[chosen]}, self.labels[chosen], "")


def key_of(choices: Choices) -> str:
    return ",".join(map(str, choices))


def table(results: Results) -> None:
    data = Digits("train", slice(N_TRAIN))
    judged = Digits("validation", slice(N_TRAIN, None))
    for choices in SPACE.every():
        results.once(("accuracy", key_of(choices)), lambda c=choices: trained(c, data, judged))


def trained(choices: Choices, data: Digits, judged: Digits) -> float:
    """Top-1 of the network, trained from scratch."""
    torch.manual_seed(0)
    network = build(SPACE.plan(choices))
    batches = Batches(data, ["image"])
    loss = Distillation(Mixture(alpha=1.0), answering(["logits"], "logits"), None)
    train(network, batches, loss, Settings(EPOCHS, BATCH, 0.1, seed=0))
    recalibrate(network, batches.each(np.arange(1024), 128, whole=True))
    with torch.inference_mode():
        answers = network(torch.from_numpy(judged.images)).argmax(1).numpy()
    return float((answers == judged.labels).mean())


def timed(results: Results) -> None:
    every = list(SPACE.every())
    blocks = {block.key: block for one in every for block in blocks_in(SPACE.plan(one))}
    for key, block in sorted(blocks.items()):

        def of_block(block: Any = block) -> float:
            with tempfile.TemporaryDirectory() as folder:
                model = write_block(block, "onnxruntime", Path(folder), this_machine())
                contender = Contender(Path(folder), model.served(1, 1, (1, BATCH_SIZE)))
                return seconds(contender, block_inputs(block, BATCH_SIZE, 0))

        results.once(("block", key), of_block)
    chosen = np.random.default_rng(1).permutation(len(every))[:N_WHOLE]
    for choices in (every[index] for index in chosen):
        results.once(("whole", key_of(choices)), lambda c=choices: whole(c))


def whole(choices: Choices) -> float:
    network = build(SPACE.plan(choices)).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            network,
            (torch.zeros(2, 1, 8, 8),),
            path,
            input_names=["image"],
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        spec = EngineSpec("onnxruntime", path.name, "fp32", 1, 1, ())
        images = np.random.default_rng(0).standard_normal((BATCH_SIZE, 1, 8, 8))
        return seconds(Contender(path.parent, spec), {"image": images.astype(np.float32)})


def seconds(contender: Contender, inputs: Mapping[str, Any]) -> float:
    """The median of a batch, batch sizes changing."""
    timing = measure(contender, None, inputs, (1, BATCH_SIZE), effort=EFFORT)
    return timing.times.times[-1].p50_s


def latency_model(found: Mapping[str, Any]) -> tuple[LatencyModel, list[Pair]]:
    times = {(key, BATCH_SIZE): value for key, value in found["block"].items()}
    model = LatencyModel(times, BATCH_SIZE)
    by_key = {key_of(choices): choices for choices in SPACE.every()}
    pairs = [
        Pair(model(blocks_in(SPACE.plan(by_key[key]))), value)
        for key, value in sorted(found["whole"].items())
    ]
    found_line = correction(pairs)
    assert found_line is not None, "the space has networks enough"
    return replace(model, corrections={"fp32": found_line}), pairs


def replay(found: Mapping[str, Any], n_seeds: int, plot: Path | None) -> None:
    model, pairs = latency_model(found)
    judged = trust(pairs)
    assert judged is not None
    print(
        f"block table, {judged.n_networks} networks left out one by one: rank correlation "
        f"{judged.rank_correlation:.3f}, mean relative error {judged.relative_error:.1%}"
    )
    worths = {
        choices: Worth(found["accuracy"][key_of(choices)], model(blocks_in(SPACE.plan(choices))))
        for choices in SPACE.every()
    }
    rewards = {one: REWARD(worth.accuracy, worth.latency_s) for one, worth in worths.items()}
    best = max(rewards.values())
    spread = np.quantile(list(rewards.values()), (0, 0.5, 0.9))
    print(f"{len(rewards)} networks, best reward {best:.4f}; least, median, upper tenth {spread}")

    def discount(choices: Choices) -> float:
        return rewards[choices] / worths[choices].accuracy

    proposers: dict[str, Callable[[int], Proposer]] = {
        "controller (REINFORCE)": lambda seed: Controller(SPACE, seed),
        "controller (PPO)": lambda seed: Controller(SPACE, seed, "ppo"),
        "regularized evolution": lambda seed: Evolution(SPACE, seed),
        "predictor": lambda seed: PredictorGuided(SPACE, seed, discount),
        "random": lambda seed: RandomSearch(SPACE, seed),
    }
    curves: dict[str, np.ndarray] = {}
    print("| | regret after 25 | 50 | 100 evaluations | best found | s a run |")
    print("|---|---|---|---|---|---|")
    for name, make in proposers.items():
        started = time.perf_counter()
        runs = [regrets(make(seed), worths.__getitem__, best) for seed in range(n_seeds)]
        curves[name] = np.array(runs)
        after = [f"{np.mean(curves[name][:, n - 1]):.4f}" for n in (25, 50, 100)]
        n_best = int((curves[name][:, -1] < 1e-9).sum())
        took = (time.perf_counter() - started) / n_seeds
        cells = " | ".join([*after, f"{n_best} of {n_seeds}", f"{took:.2f}"])
        print(f"| {name} | {cells} |", flush=True)
    if plot is not None:
        draw(curves, plot)


def regrets(proposer: Proposer, evaluate: Callable[[Choices], Worth], best: float) -> list[float]:
    """What the best network so far falls short of the best, after each evaluation; the last is
    repeated where the proposer comes to its end before."""
    found: list[float] = []
    reached = -np.inf
    for looked in explored(proposer, evaluate, REWARD, N_EVALUATIONS):
        reached = max(reached, looked.reward)
        found.append(best - reached)
    return found + [found[-1]] * (N_EVALUATIONS - len(found))


def draw(curves: Mapping[str, np.ndarray], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, runs in curves.items():
        x = np.arange(1, N_EVALUATIONS + 1)
        (line,) = axes.plot(x, runs.mean(axis=0), label=name)
        low, high = np.quantile(runs, (0.25, 0.75), axis=0)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xlabel("networks looked at")
    axes.set_ylabel("regret: reward below the best network's")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("table", "time", "replay"))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "replay":
        replay(json.loads(RESULTS.read_text()), given.seeds, given.plot)
    else:
        {"table": table, "time": timed}[given.part](Results(RESULTS))


if __name__ == "__main__":
    main()
