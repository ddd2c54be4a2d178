"""The builder: recipes to variants, each step built once and kept in the store.

It folds techniques over a recipe's prefix: what the store has isn't built again. A step counts
only once its parity was checked. It doesn't time or judge anything.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from optimizer.errors import OptimizerError, TechniqueFailed, TechniqueNotApplicable
from optimizer.parity import check_parity
from optimizer.recipe import Choice, Recipe, steps_with_ids
from optimizer.search.landscape import Option
from optimizer.space import check_parameters
from optimizer.store import Store, StoredVariant
from optimizer.techniques import Context, Technique
from optimizer.variant import Kind, Model
from serve.artifact import Step
from serve.tensor import Array


@dataclass(frozen=True, eq=False)
class Builder:
    """`inputs` are samples for the parity checks, at least the largest batch of them."""

    store: Store
    base: Model
    techniques: Mapping[str, Technique]
    context: Context
    inputs: Mapping[str, Array]
    clock: Callable[[], float] = time.monotonic
    refusals: dict[str, str] = field(default_factory=dict)
    """Technique → why its check refused a model that it could take by kind; grows with use."""

    def variant_id(self, recipe: Recipe) -> str:
        """The id of what the recipe makes, without making it."""
        steps = self._steps(recipe)
        return steps[-1][1] if steps else self.base.digest

    def steps(self, recipe: Recipe) -> tuple[Step, ...]:
        """The recipe as a manifest records it."""
        return tuple(step for step, _ in self._steps(recipe))

    def label(self, recipe: Recipe) -> str:
        """The recipe in a few words."""
        words = [
            self.techniques[choice.traits.name].describe(choice.parameters)
            for choice in recipe.choices
        ]
        return ", ".join(filter(None, words)) or "untouched"

    def build(self, recipe: Recipe) -> StoredVariant:
        """What the recipe makes, from the store as far as it is there.

        The recipe must not be empty. Raises TechniqueNotApplicable, TechniqueFailed or
        ParityMismatch.
        """
        model, parent_id = self.base, self.base.digest
        for choice, (step, variant_id) in zip(recipe.choices, self._steps(recipe), strict=True):
            variant = self.store.find(variant_id) or self._build(
                choice, model, parent_id, step, variant_id
            )
            model, parent_id = variant.model, variant.id
        return variant

    def options(self, recipe: Recipe) -> Sequence[Option]:
        """The techniques that can come after the recipe: the search's landscape."""
        takers = self._takers(recipe)
        if not takers:
            return ()
        model = self._model(recipe)
        options = []
        for technique in takers:
            reason = self._reason_against(technique, model)
            if reason is None:
                options.append(Option(technique.traits, technique.space(model, self.context)))
            else:
                self.refusals[technique.traits.name] = reason
        return options

    def _steps(self, recipe: Recipe) -> tuple[tuple[Step, str], ...]:
        calibration = self.context.calibration.digest
        return steps_with_ids(recipe, self.base.digest, self.context.seed, calibration)

    def _takers(self, recipe: Recipe) -> list[Technique]:
        return [one for one in self.techniques.values() if recipe.can_take(one.traits)]

    def _model(self, recipe: Recipe) -> Model:
        return self.build(recipe).model if recipe.choices else self.base

    def _reason_against(self, technique: Technique, model: Model) -> str | None:
        with blamed(technique.traits.name):
            return technique.check(model, self.context)

    def _build(
        self, choice: Choice, model: Model, parent_id: str, step: Step, variant_id: str
    ) -> StoredVariant:
        technique = self.techniques[choice.traits.name]
        reason = self._reason_against(technique, model)
        if reason is not None:
            raise TechniqueNotApplicable(choice.traits.name, reason)
        with self.store.workshop() as directory, blamed(choice.traits.name):
            check_parameters(technique.space(model, self.context), choice.parameters)
            start = self.clock()
            made = technique.apply(model, choice.parameters, self.context, directory)
            build_s = self.clock() - start
            # What is lossy or depends on the machine is checked in the engine that will run it.
            if made.kind is not Kind.ENGINE and made.precision == model.precision:
                check_parity(made, model, self.inputs, self.context.max_batch_size)
            data_digest = self.context.calibration.digest
            return self.store.add(
                StoredVariant(variant_id, parent_id, step, data_digest, made, build_s)
            )


@contextmanager
def blamed(technique: str) -> Iterator[None]:
    """Whatever a technique raises is its failure, and by its name: the study goes on."""
    try:
        yield
    except OptimizerError:
        raise
    except Exception as error:
        raise TechniqueFailed(technique, error) from error
