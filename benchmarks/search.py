"""How soon the search finds the cheapest variant, on a space of which everything is known.

    python -m benchmarks.search TABLE.json [--max-drop 15 20 25] [--seeds 5] [--plot out.svg]

TABLE is what `search_table.py` measured: all 220 points of a space around ResNet-20. Contestants
get a tenth of them as evaluations: the search as a study runs it (ladder, block table, predictor
of recovered accuracy; what is ruled out by estimate isn't built and is no evaluation), the same
with Optuna's random and NSGA-II samplers, random search without any of it, and Optuna used plainly
(one flat space, `TPESampler` as it comes, with its constraints). All are replayed for each seed and
each limit of the drop in accuracy, of which each has another optimum.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna

from benchmarks.search_recorded import Point, Table, empty_store, recorded_trials
from optimizer.choice import ranked
from optimizer.search.coordinator import Coordinator
from optimizer.search.landscape import remembered
from optimizer.variant import Kind
from optimizer.warm_start import promising

SHARE = 0.1
WITHIN = 0.05

Curve = list[float]
"""The best feasible cost after each evaluation, infinite while there is none."""


def study(sampler: str) -> Callable[[Table, float, int, int], Curve]:
    def run(table: Table, max_drop: float, n: int, seed: int) -> Curve:
        with empty_store() as store:
            trials = recorded_trials(table, store, max_drop, seed)
            return [best for best, _ in _searched(trials, sampler, seed, n)]

    return run


def _searched(trials, sampler: str, seed: int, n: int, first=()) -> list[tuple[float, float]]:
    """After each evaluation, the best cost and the epochs that were trained; the last ones are
    repeated where the space is exhausted before."""
    landscape = remembered(trials.builder.options)
    coordinator = Coordinator(landscape, Kind.TORCH, trials.builder.ids, seed, sampler, first)
    found: list[tuple[float, float]] = []
    for trial in coordinator.trials():
        n_before = len(trials.rows)
        coordinator.tell(trial, trials.run(trial, lambda _rung: None, lambda: 0.0))
        if len(trials.rows) > n_before:
            best = ranked(trials.rows, "cost")
            cost = best[0].serving.cost_per_million if best else np.inf
            found.append((cost, trials.epochs))
        if len(found) == n:
            break
    return found + found[-1:] * (n - len(found))


def again(table: Table, max_drop: float, n: int, n_seeds: int) -> None:
    """What a second study of the same model has of the first one's records."""
    near = table.best(max_drop) * (1 + WITHIN)
    print("evaluations, and epochs of training, until within 5 % of the optimum; in all")
    for seed in range(n_seeds):
        with empty_store() as store:
            first = _searched(recorded_trials(table, store, max_drop, seed), "gp", seed, n)
            trials = recorded_trials(table, store, max_drop, seed + 1000)
            trials.recall()
            decisions = promising(store.trials(f"study {seed}"), trials.spec)
            second = _searched(trials, "gp", seed + 1000, n, decisions)
        print(f"seed {seed}: first {_reached(first, near)}, second {_reached(second, near)}")


def _reached(found: list[tuple[float, float]], near: float) -> str:
    for number, (cost, epochs) in enumerate(found, 1):
        if cost <= near:
            return f"{number} and {epochs:.2f}; {found[-1][1]:.2f}"
    return f"never; {found[-1][1]:.2f}"


def random_search(table: Table, max_drop: float, n: int, seed: int) -> Curve:
    rng = np.random.default_rng(seed)
    points = list(table.rows)
    return _curve(table, max_drop, [points[i] for i in rng.permutation(len(points))[:n]])


def plain_optuna(table: Table, max_drop: float, n: int, seed: int) -> Curve:
    """A parameter for each axis of the space; a shape of None is one of the choices."""
    shapes = list(dict.fromkeys(point[0] for point in table.rows))
    axes = [sorted({shape[i] for shape in shapes if shape}) for i in range(4)]
    asked: list[Point] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(seed=seed)
    found = optuna.create_study(sampler=sampler)
    while len(asked) < n:
        trial = found.ask()
        shape = None
        if trial.suggest_categorical("shrink", [True, False]):
            shape = tuple(
                trial.suggest_categorical(f"axis {i}", axis) for i, axis in enumerate(axes)
            )
        is_int8 = trial.suggest_categorical("int8", [False, True])
        engine = trial.suggest_categorical("engine", ["onnxruntime", "openvino"])
        point = (shape, is_int8, engine)
        row = table.rows[point]
        trial.set_constraint("accuracy_drop", row.drop() - max_drop)
        found.tell(trial, row.cost)
        if point not in asked:  # what it asks for twice is free
            asked.append(point)
    return _curve(table, max_drop, asked)


CONTESTANTS = {
    "trimserve": study("gp"),
    "trimserve, TPE": study("tpe"),
    "trimserve, random": study("random"),
    "trimserve, NSGA-II": study("nsga2"),
    "random search": random_search,
    "Optuna, plain": plain_optuna,
}


def _curve(table: Table, max_drop: float, points: Sequence[Point]) -> Curve:
    feasible = table.feasible(max_drop)
    costs = [feasible[point].cost if point in feasible else np.inf for point in points]
    return [float(best) for best in np.minimum.accumulate(costs)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument(
        "--max-drop", type=float, nargs="+", default=[15.0, 20.0, 25.0], help="percentage points"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="a second study on the same records")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table = Table.read(arguments.table)
    found = []
    for max_drop in arguments.max_drop:
        n = int(SHARE * len(table.rows))
        question = Question.of(table, max_drop / 100, n)
        print(question.shown)
        if arguments.again:
            again(table, max_drop / 100, n, arguments.seeds)
        else:
            found.append((question, contest(table, question, arguments.seeds)))
    if arguments.plot and found:
        plot(arguments.plot, found)
    return 0


@dataclass(frozen=True)
class Question:
    """The cheapest within a limit of the drop, which is known."""

    max_drop: float
    n: int
    best: float
    baseline: float
    shown: str

    @classmethod
    def of(cls, table: Table, max_drop: float, n: int) -> "Question":
        best, baseline = table.best(max_drop), table.best_baseline(max_drop)
        feasible = table.feasible(max_drop).values()
        near = sum(row.cost <= best * (1 + WITHIN) for row in feasible)
        shown = (
            f"drop of at most {100 * max_drop:g} points: {len(feasible)} of {len(table.rows)}, "
            f"{near} within {WITHIN:.0%} of the best; the best baseline costs "
            f"{baseline / best - 1:+.0%}; {n} evaluations"
        )
        return cls(max_drop, n, best, baseline, shown)


def contest(table: Table, question: Question, n_seeds: int) -> dict[str, list[Curve]]:
    """Curves relative to the optimum, by contestant and seed."""
    found = {}
    for name, run in CONTESTANTS.items():
        runs = [run(table, question.max_drop, question.n, seed) for seed in range(n_seeds)]
        found[name] = [[cost / question.best for cost in curve] for curve in runs]
        regrets = sorted(curve[-1] - 1 for curve in found[name])
        hits = sum(regret <= WITHIN for regret in regrets)
        shown = "  ".join(f"{regret:6.1%}" for regret in regrets[:10])
        print(
            f"{name:20} {hits}/{n_seeds} within; median {statistics.median(regrets):6.1%}: {shown}"
        )
    return found


def plot(path: Path, found: Sequence[tuple[Question, dict[str, list[Curve]]]]) -> None:
    """A panel for each question: median over seeds, and lowest to highest as a band."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "trimserve"  # the same file for the same figures
    from matplotlib import pyplot

    width = 0.6 + 4.2 * len(found)
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(width, 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (question, curves) in zip(axes[0], found, strict=True):
        evaluations = np.arange(1, question.n + 1)
        for name, runs in curves.items():
            costs = np.array(runs)
            (line,) = axis.plot(
                evaluations, np.median(costs, axis=0), label=name, drawstyle="steps-post"
            )
            if name in list(CONTESTANTS)[:1]:
                axis.fill_between(
                    evaluations, costs.min(axis=0), costs.max(axis=0), step="post", alpha=0.15,
                    color=line.get_color(), linewidth=0,
                )  # fmt: skip
        baseline = question.baseline / question.best
        axis.axhline(baseline, linestyle=":", color="grey", label="best baseline")
        axis.axhline(1 + WITHIN, linestyle="--", color="grey", label=f"optimum + {WITHIN:.0%}")
        axis.set(
            title=f"drop of at most {100 * question.max_drop:g} points", xlabel="evaluations",
            xlim=(1, question.n), xticks=range(2, question.n + 1, 4),
        )  # fmt: skip
    axes[0][0].set(ylabel="cost of the best so far / optimum", ylim=(0.95, 2.5))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
