"""The coordinator: baselines first, then what an earlier study found, then proposals.

The guide proposes, or one of Optuna's samplers, which is used by ask and tell in this one place.
Constraints are soft for both, so what breaks one is filtered by whoever chooses, too. Nothing is
kept of either: given the same seed and the same answers they propose the same again, which is how a
study resumes. Trials come in batches, whose members are proposed before any of them is answered:
what they are depends on the answers before the batch, not on who is done first.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import optuna

from optimizer.recipe import Recipe
from optimizer.search.guide import Guide
from optimizer.search.landscape import Decisions, Landscape, baselines, grid, walk
from optimizer.search.samplers import new_study
from optimizer.space import Categorical, Distribution, Value
from optimizer.variant import Kind

MAX_DUPLICATES = 50
"""Proposals in a row that were tried already, after which the space counts as exhausted."""


@dataclass(frozen=True)
class Answer:
    """What came of a trial: the value to minimize, and constraints, kept where at most 0, relative
    to their limits; those of which nothing is known are missing.

    A trial that came to nothing has no value; where a step couldn't be built, `failed_id` is the
    id of what it would have made, and no recipe that begins with the same steps is proposed again.
    """

    value: float | None = None
    constraints: Mapping[str, float] | None = None
    failed_id: str = ""


@dataclass(frozen=True, eq=False)
class Trial:
    """A recipe to try. `decisions.failure` is set where it couldn't even be built that far."""

    number: int
    decisions: Decisions
    is_baseline: bool
    handle: Any
    """Optuna's trial."""

    @property
    def recipe(self) -> Recipe:
        return self.decisions.recipe


class Coordinator:
    """Proposes trials and takes their answers."""

    def __init__(
        self,
        landscape: Landscape,
        starts_from: Kind,
        identify: Callable[[Recipe], Sequence[str]],
        seed: int,
        sampler: str = "gp",
        first: Sequence[Mapping[str, Value]] = (),
    ) -> None:
        """`identify` gives the ids of what a recipe's steps make, in order. `sampler` is one of
        `samplers.SAMPLERS`. `first` are decisions by name that are tried after the baselines, such
        as those that did well before."""
        self._landscape = landscape
        self._starts_from = starts_from
        self._identify = identify
        self._sampler = sampler
        self._first = first
        self._study = new_study(sampler, seed)
        self._guide = Guide(landscape, starts_from, seed) if sampler == "gp" else None
        self._constraints: set[str] = set()
        self._answers: dict[str, Answer] = {}
        self._failed: set[str] = set()
        self._open: dict[str, list[Any]] = {}
        """Trials that aren't told yet → Optuna's trials that were found to be the same."""
        self._n_trials = 0

    def trials(self, goes_on: Callable[[], bool] = lambda: True) -> Iterator[Trial]:
        """As `batches` of one."""
        for [trial] in self.batches(lambda: 1, goes_on):
            yield trial

    def batches(
        self, size: Callable[[], int], goes_on: Callable[[], bool] = lambda: True
    ) -> Iterator[Sequence[Trial]]:
        """The trials, up to `size` at once, at least one; all of a batch must be told, in their
        order, before the next is drawn. No proposal is in a batch with baselines: it is to know
        them all. Ends when the space is exhausted, and after the baselines when `goes_on` says no:
        to draw a proposal may mean to build what its last choices depend on, which takes
        minutes."""
        for phase in (self._baselines(), self._while(goes_on, self._proposals())):
            while batch := list(islice(phase, max(1, size()))):
                yield batch

    def _baselines(self) -> Iterator[Trial]:
        for decisions in baselines(self._landscape, self._starts_from):
            yield from self._enqueued(decisions.values, is_baseline=True)

    def _while(self, goes_on: Callable[[], bool], trials: Iterator[Trial]) -> Iterator[Trial]:
        while goes_on() and (trial := next(trials, None)) is not None:
            yield trial

    def _proposals(self) -> Iterator[Trial]:
        for values in self._first:
            yield from self._enqueued(values)
        if self._sampler == "grid":
            for decisions in grid(self._landscape, self._starts_from):
                yield from self._enqueued(decisions.values)
        elif self._guide is not None:
            yield from self._guided(self._guide)
        else:
            yield from self._proposed()

    def tell(self, trial: Trial, answer: Answer) -> None:
        key = self._key(trial.decisions)
        self._answers[key] = answer
        if answer.failed_id:
            self._failed.add(answer.failed_id)
        self._constraints |= set(answer.constraints or ())
        if self._guide is not None:
            is_built = not answer.failed_id
            self._guide.tell(
                trial.decisions.values, answer.value, answer.constraints or {}, is_built
            )
        for handle in (trial.handle, *self._open.pop(key, ())):
            self._tell(handle, answer)

    def _guided(self, guide: Guide) -> Iterator[Trial]:
        """The guide's proposals, as long as it finds any that weren't tried."""
        n_trials = -1
        while n_trials < self._n_trials:
            n_trials = self._n_trials
            found = guide.proposal(self._is_taken)
            if found is not None:
                yield from self._enqueued(found.values)

    def _proposed(self) -> Iterator[Trial]:
        n_duplicates = 0
        while n_duplicates < MAX_DUPLICATES:
            trial = self._ask(is_baseline=False)
            n_duplicates = 0 if trial is not None else n_duplicates + 1
            if trial is not None:
                yield trial

    def _enqueued(self, values: Mapping[str, Value], is_baseline: bool = False) -> Iterator[Trial]:
        self._study.enqueue_trial(dict(values))
        trial = self._ask(is_baseline)
        if trial is not None:
            yield trial

    def _ask(self, is_baseline: bool) -> Trial | None:
        """The next trial, or None where its recipe was tried, or is under way: then Optuna gets
        the same answer."""
        handle = self._study.ask()
        decisions = walk(self._landscape, self._starts_from, _by_optuna(handle))
        known = self._known(decisions)
        if known is not None:
            self._tell(handle, known)
            return None
        key = self._key(decisions)
        if key in self._open:
            self._open[key].append(handle)
            return None
        self._open[key] = []
        if self._guide is not None:
            self._guide.begin(decisions.values)
        self._n_trials += 1
        return Trial(self._n_trials, decisions, is_baseline, handle)

    def _is_taken(self, decisions: Decisions) -> bool:
        return self._known(decisions) is not None or self._key(decisions) in self._open

    def _known(self, decisions: Decisions) -> Answer | None:
        if not self._failed.isdisjoint(self._identify(decisions.recipe)):
            return Answer()
        return self._answers.get(self._key(decisions))

    def _key(self, decisions: Decisions) -> str:
        failure = f" {decisions.failure}" if decisions.failure else ""
        return " ".join(self._identify(decisions.recipe)[-1:]) + failure

    def _tell(self, handle: Any, answer: Answer) -> None:
        for name in sorted(self._constraints if answer.constraints is not None else ()):
            # Optuna wants every one; what isn't known counts as kept.
            handle.set_constraint(name, (answer.constraints or {}).get(name, -1.0))
        if answer.value is None or not math.isfinite(answer.value):
            self._study.tell(handle, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(handle, answer.value)


def _by_optuna(handle: Any) -> Callable[[str, Distribution], Value]:
    def choose(name: str, distribution: Distribution) -> Value:
        chosen: Value
        if isinstance(distribution, Categorical):
            chosen = handle.suggest_categorical(name, distribution.choices)
        elif distribution.whole:
            chosen = handle.suggest_int(
                name,
                int(distribution.low),
                int(distribution.high),
                step=distribution.step,
                log=distribution.logarithmic,
            )
        else:
            chosen = handle.suggest_float(
                name, distribution.low, distribution.high, log=distribution.logarithmic
            )
        return chosen

    return choose
