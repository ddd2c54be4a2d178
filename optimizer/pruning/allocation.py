"""Allocation: how many units each group loses, so that a share of the operations goes.

The ratio is the share of the network's multiply-adds that are to go, and for `latency` of the
seconds that the target's table has for it. Which units of a group go is by their scores.
"""

# ruff: noqa: ARG001  every rule takes what the table passes

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.pruning.costs import Costs, Counts
from optimizer.pruning.groups import Group
from optimizer.pruning.importance import Scores
from optimizer.pruning.knapsack import choose
from optimizer.pruning.latency import Latency

_STEPS = 256
_ROUNDS = 8
"""Of knapsacks, at most."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Groups with the scores of their units, and what may be left of them."""

    groups: Sequence[Group]
    scores: Sequence[Scores]
    costs: Costs
    multiple: int
    """Of channels that a layer keeps; 1 or more, else ValueError."""
    latency: Latency | None = None
    """By the target's table, for the rule `latency`."""

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"multiple: got {self.multiple}, want 1 or more")

    def levels(self, index: int) -> list[int]:
        """How many units of the group may go, rising from 0: what stays is a multiple, and not
        nothing. Of a group without scores nothing goes."""
        group, n_units = self.groups[index], len(self.groups[index].units)
        if not np.isfinite(self.scores[index]).all():
            return [0]
        width = width_of(group)
        kept = [n for n in range(n_units - 1, 0, -1) if n * width % self.multiple == 0]
        return [0, *(n_units - n for n in kept)]

    def lost(self, index: int) -> NDArray[np.float64]:
        """[count]: the importance of so many units of the group, of those that go first."""
        return np.concatenate([[0.0], np.cumsum(np.sort(self.scores[index]))])

    def gone(self, counts: Counts) -> list[int]:
        """The units that go: of each group those with the lowest scores."""
        return [
            group.units[index]
            for group, scores, count in zip(self.groups, self.scores, counts, strict=True)
            for index in np.argsort(scores, kind="stable")[:count]
        ]


Left = Callable[[Counts], float]
"""What is left of the network when so many units of each group go."""
Sensitivity = Callable[[int, int], float]
"""(group's index, units gone) → how far the outputs move when only those go; at least 0."""


def width_of(group: Group) -> int:
    """Channels a unit has in the layer that makes it: more than 1 for heads."""
    return len(group.places[group.makers[0]][0])


def allocate(rule: str, candidates: Candidates, ratio: float, sensitivity: Sensitivity) -> Counts:
    """How many units go from each group so that at least `ratio` of the operations (for `latency`
    of the seconds) go, or, where multiples don't allow that, as few more as the rule can.

    Raises ValueError for a ratio out of (0, 1), one that would empty a layer, or no groups.
    """
    check_reachable(rule, candidates, ratio)
    target = (1 - ratio) * left_by(rule, candidates)(_none(candidates))
    return RULES[rule](candidates, target, sensitivity)


def left_by(rule: str, candidates: Candidates) -> Left:
    """What a ratio of that rule is a share of: multiply-adds, or for `latency` seconds. Raises
    ValueError for `latency` without a table."""
    return _seconds(candidates) if rule == "latency" else candidates.costs.operations


def _seconds(candidates: Candidates) -> Left:
    if candidates.latency is None:
        raise ValueError("allocation: got latency without a table of the target's times")
    return candidates.latency.seconds


def check_reachable(rule: str, candidates: Candidates, ratio: float) -> None:
    """Raises ValueError for an unknown rule, a ratio out of (0, 1), one that would empty a layer,
    or where nothing can go that the ratio is a share of."""
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: got {ratio:g}, want more than 0 and less than 1")
    if rule not in RULES:
        raise ValueError(f"allocation: got {rule!r}, want one of {', '.join(RULES)}")
    if not candidates.groups:
        raise ValueError("groups: got none, want at least one of which units can go")
    left = left_by(rule, candidates)
    if not left(_none(candidates)) > 0:
        raise ValueError(f"ratio: got {ratio:g} of no costs: the model has none that are counted")
    most = np.array([candidates.levels(index)[-1] for index in range(len(candidates.groups))])
    possible = 1 - left(most) / left(_none(candidates))
    if ratio > possible:
        fullest = int(np.argmax([len(group.units) for group in candidates.groups]))
        group = candidates.groups[fullest]
        raise ValueError(
            f"ratio: got {ratio:g}, want at most {possible:.3g}: more would empty a layer, "
            f"such as {group.name}, which has to keep {len(group.units) - most[fullest]} of its "
            f"{len(group.units)} units"
        )


def _uniform(candidates: Candidates, target: float, sensitivity: Sensitivity) -> Counts:
    """The same share of every group."""

    def at(step: int) -> Counts:
        share = step / _STEPS
        return np.array([
            _nearest(candidates.levels(index), share * len(group.units))
            for index, group in enumerate(candidates.groups)
        ])  # fmt: skip

    return _smallest(at, _STEPS, candidates, target)


def _global(candidates: Candidates, target: float, sensitivity: Sensitivity) -> Counts:
    """Whatever scores lowest in the whole network."""
    finite = [scores[np.isfinite(scores)] for scores in candidates.scores]
    thresholds = np.unique(np.concatenate(finite))

    def at(step: int) -> Counts:
        threshold = thresholds[step - 1] if step else -np.inf
        below = [int((scores <= threshold).sum()) for scores in candidates.scores]
        return np.array([
            _at_most(candidates.levels(index), count) for index, count in enumerate(below)
        ])  # fmt: skip

    return _smallest(at, len(thresholds), candidates, target)


def _by_sensitivity(candidates: Candidates, target: float, sensitivity: Sensitivity) -> Counts:
    """From each group as much as moves the outputs equally far, alone (Li et al. 2017,
    section 3.2)."""
    tables = [_table(candidates, index, sensitivity) for index in range(len(candidates.groups))]
    thresholds = sorted({moved for table in tables for moved in table.values()})

    def at(step: int) -> Counts:
        threshold = thresholds[step - 1] if step else -1.0
        return np.array([
            max((level for level, moved in table.items() if moved <= threshold), default=0)
            for table in tables
        ])  # fmt: skip

    return _smallest(at, len(thresholds), candidates, target)


def _by_cost(candidates: Candidates, target: float, sensitivity: Sensitivity) -> Counts:
    """The least importance for the most effort saved, step by step: the knapsack of Shen et al.
    2022 ("Structural Pruning via Latency-Saliency Knapsack") by its greedy solution, and with
    counted in place of measured costs."""

    def effort(counts: Counts) -> float:
        return candidates.costs.effort(counts, candidates.multiple)

    return _greedy(candidates, _none(candidates), target, candidates.costs.operations, effort)


def _by_latency(candidates: Candidates, target: float, sensitivity: Sensitivity) -> Counts:
    """The knapsack of Shen et al. 2022 (equation 6) with measured seconds: the most importance kept
    within the budget.

    A layer's seconds depend on its inputs' group, too. The paper prunes in steps, each with the
    inputs of the step before; here each group's seconds are taken with the others as they are,
    the knapsack solved, and that again from its solution until it stays, beginning with the greedy
    solution. What then misses the budget is mended step by step, what it has to spare given back.
    """
    seconds = _seconds(candidates)
    losses = [
        candidates.lost(index)[candidates.levels(index)] for index in range(len(candidates.groups))
    ]

    def loss(counts: Counts) -> float:
        return sum(float(candidates.lost(index)[n]) for index, n in enumerate(counts))

    counts = _greedy(candidates, _none(candidates), target, seconds, seconds)
    tried = [_given_back(candidates, counts, target, seconds)]
    for _ in range(_ROUNDS):
        chosen = choose(losses, _alone(candidates, counts, seconds), target - seconds(counts))
        if chosen is None:
            break
        new = np.array([candidates.levels(index)[at] for index, at in enumerate(chosen)])
        if np.array_equal(new, counts):
            break
        counts = new
        mended = _greedy(candidates, counts, target, seconds, seconds)
        tried.append(_given_back(candidates, mended, target, seconds))
    return min(tried, key=lambda one: (loss(one), seconds(one)))


def _alone(candidates: Candidates, counts: Counts, left: Left) -> list[NDArray[np.float64]]:
    """For each group and level: what is left more than now, if that alone changes."""
    now, found = left(counts), []
    for index in range(len(candidates.groups)):
        row = []
        for level in candidates.levels(index):
            tried = counts.copy()
            tried[index] = level
            row.append(left(tried) - now)
        found.append(np.array(row))
    return found


def _greedy(
    candidates: Candidates, counts: Counts, target: float, left: Left, price_in: Left
) -> Counts:
    """From `counts` on, a level at a time where least is lost for what it saves of `price_in`,
    until `left` is at the target or nothing more can go."""
    steps = [candidates.levels(index) for index in range(len(candidates.groups))]
    lost = [candidates.lost(index) for index in range(len(candidates.groups))]
    while left(counts) > target:
        now = price_in(counts)
        best, best_price = None, np.inf
        for index, levels in enumerate(steps):
            for level in levels[levels.index(int(counts[index])) + 1 :][:1]:
                tried = counts.copy()
                tried[index] = level
                saved = now - price_in(tried)
                price = (lost[index][level] - lost[index][counts[index]]) / max(saved, 1e-12)
                if price < best_price:
                    best, best_price = tried, price
        if best is None:
            break
        counts = best
    return counts


def _given_back(candidates: Candidates, counts: Counts, target: float, left: Left) -> Counts:
    """Levels taken back as long as the target holds, what matters most first."""
    while True:
        best, most = None, 0.0
        for index in range(len(candidates.groups)):
            levels, lost = candidates.levels(index), candidates.lost(index)
            at = levels.index(int(counts[index]))
            if at == 0:
                continue
            tried = counts.copy()
            tried[index] = levels[at - 1]
            gained = float(lost[levels[at]] - lost[levels[at - 1]])
            if gained > most and left(tried) <= target:
                best, most = tried, gained
        if best is None:
            return counts
        counts = best


RULES: Mapping[str, Callable[[Candidates, float, Sensitivity], Counts]] = {
    "uniform": _uniform,
    "global": _global,
    "sensitivity": _by_sensitivity,
    "cost": _by_cost,
    "latency": _by_latency,
}


def _none(candidates: Candidates) -> Counts:
    return np.zeros(len(candidates.groups), dtype=np.int64)


def _smallest(
    at: Callable[[int], Counts], n_steps: int, candidates: Candidates, target: float
) -> Counts:
    """The first of the rising counts `at` 0 to `n_steps` that reach the target."""
    low, high = 0, n_steps
    while low < high:
        middle = (low + high) // 2
        if candidates.costs.operations(at(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return at(low)


def _nearest(levels: Sequence[int], wanted: float) -> int:
    return min(levels, key=lambda level: (abs(level - wanted), level))


def _at_most(levels: Sequence[int], count: int) -> int:
    return max(level for level in levels if level <= count)


def _table(candidates: Candidates, index: int, sensitivity: Sensitivity) -> dict[int, float]:
    """Level → how far the outputs move; never less for more that goes."""
    levels = candidates.levels(index)
    chosen = sorted({levels[round(share * (len(levels) - 1))] for share in (0.25, 0.5, 0.75, 1.0)})
    table, worst = {0: 0.0}, 0.0
    for level in chosen:
        if level:
            worst = max(worst, sensitivity(index, level))
            table[level] = worst
    return table
