"""The coordinator: baselines first, then Optuna's proposals, each recipe once.

Optuna is used by ask and tell in this one place. Its constraints are soft, so what breaks one is
filtered by whoever chooses, too. Nothing is kept of the sampler: given the same seed and the same
answers it proposes the same again, which is how a study resumes.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from optimizer.recipe import Recipe
from optimizer.search.landscape import Decisions, Landscape, baselines, walk
from optimizer.space import Categorical, Distribution, Value
from optimizer.variant import Kind

MAX_DUPLICATES = 50
"""Proposals in a row that were tried already, after which the space counts as exhausted."""


@dataclass(frozen=True)
class Answer:
    """What came of a trial: the value to minimize, and constraints, kept where at most 0. A trial
    that ended early has no value."""

    value: float | None = None
    constraints: Mapping[str, float] | None = None


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
        identify: Callable[[Recipe], str],
        seed: int,
    ) -> None:
        """`identify` gives the id of the variant that a recipe makes."""
        self._landscape = landscape
        self._starts_from = starts_from
        self._identify = identify
        self._study = _new_study(seed)
        self._answers: dict[str, Answer] = {}
        self._n_trials = 0

    def trials(self) -> Iterator[Trial]:
        """The trials, one after the other; each must be told before the next is drawn. Ends when
        the space is exhausted."""
        for decisions in baselines(self._landscape, self._starts_from):
            self._study.enqueue_trial(dict(decisions.values))
            trial = self._ask(is_baseline=True)
            if trial is not None:
                yield trial
        n_duplicates = 0
        while n_duplicates < MAX_DUPLICATES:
            trial = self._ask(is_baseline=False)
            n_duplicates = 0 if trial is not None else n_duplicates + 1
            if trial is not None:
                yield trial

    def tell(self, trial: Trial, answer: Answer) -> None:
        self._answers[self._key(trial.decisions)] = answer
        self._tell(trial.handle, answer)

    def _ask(self, is_baseline: bool) -> Trial | None:
        """The next trial, or None where its recipe was tried: then Optuna gets the same answer."""
        handle = self._study.ask()
        decisions = walk(self._landscape, self._starts_from, _by_optuna(handle))
        known = self._answers.get(self._key(decisions))
        if known is not None:
            self._tell(handle, known)
            return None
        self._n_trials += 1
        return Trial(self._n_trials, decisions, is_baseline, handle)

    def _key(self, decisions: Decisions) -> str:
        failure = f" {decisions.failure}" if decisions.failure else ""
        return self._identify(decisions.recipe) + failure

    def _tell(self, handle: Any, answer: Answer) -> None:
        for name, value in (answer.constraints or {}).items():
            handle.set_constraint(name, value)
        if answer.value is None or not math.isfinite(answer.value):
            self._study.tell(handle, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(handle, answer.value)


def _new_study(seed: int) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # `group` splits a conditional space into parts that are always sampled together.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, group=True)
    return optuna.create_study(sampler=sampler, direction="minimize")


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
