"""The builder: recipes to variants, each step built once and kept in the store.

It folds techniques over a recipe's prefix: what the store has isn't built again. A step counts
only once its parity was checked. It doesn't time or judge anything.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from optimizer.blocks import Block, blocks_of
from optimizer.errors import (
    OptimizerError,
    ParityMismatch,
    TechniqueFailed,
    TechniqueNotApplicable,
)
from optimizer.model_source import read_signature
from optimizer.parity import check_outputs, check_parity
from optimizer.recipe import EFFORT, Choice, Recipe, Traits, steps_with_ids
from optimizer.search.landscape import Option, Unbuildable
from optimizer.space import check_parameters
from optimizer.store import Store, StoredVariant
from optimizer.techniques import (
    Context,
    Partial,
    Sampled,
    Technique,
    Timed,
    TimedNetwork,
    Training,
)
from optimizer.torch_variant import bound, load_torch
from optimizer.tracing import span
from optimizer.variant import STRUCTURAL, Kind, Model, Stage, StoredTorch, TorchModel
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
    """Technique, or a part of one → why it was left out for a model that it could take by kind;
    grows with use."""
    failures: dict[str, Unbuildable] = field(default_factory=dict)
    """Variant → why it can't be built; grows with use, so that nothing fails twice."""
    _options: dict[tuple[str, str], Option | None] = field(default_factory=dict)

    def ids(self, recipe: Recipe) -> tuple[str, ...]:
        """The ids of what the recipe's steps make, in order, without making it."""
        return tuple(variant_id for _, variant_id in self._steps(recipe))

    def variant_id(self, recipe: Recipe) -> str:
        """The id of what the recipe makes, without making it."""
        return (self.base.digest, *self.ids(recipe))[-1]

    def failed_id(self, recipe: Recipe) -> str:
        """The id of the recipe's first step that was found not to be buildable; empty if none."""
        return next((one for one in self.ids(recipe) if one in self.failures), "")

    def epochs(self, recipe: Recipe) -> float:
        """Passes over the training split that building the recipe takes, were nothing stored.
        Raises TechniqueFailed."""
        return sum(self._epochs(choice) for choice in recipe.choices if EFFORT in choice.parameters)

    def epochs_first(self, recipe: Recipe) -> dict[str, float]:
        """By variant, the passes of the steps that train as much on every rung: recipes that begin
        with the same steps share them. Raises TechniqueFailed."""
        named = zip(recipe.choices, self.ids(recipe), strict=True)
        return {
            variant_id: self._epochs(choice)
            for choice, variant_id in named
            if choice.trains_first and isinstance(self.techniques[choice.traits.name], Training)
        }

    def steps(self, recipe: Recipe) -> tuple[Step, ...]:
        """The recipe as a manifest records it."""
        return tuple(step for step, _ in self._steps(recipe))

    def label(self, recipe: Recipe) -> str:
        """The recipe in a few words."""
        return ", ".join(filter(None, map(self._words, recipe.choices))) or "untouched"

    def build(self, recipe: Recipe) -> StoredVariant:
        """What the recipe makes, from the store as far as it is there.

        The recipe must not be empty. Raises TechniqueNotApplicable, TechniqueFailed or
        ParityMismatch.
        """
        model, parent_id = self.base, self.base.digest
        for choice, (step, variant_id) in zip(recipe.choices, self._steps(recipe), strict=True):
            if variant_id in self.failures:
                raise self.failures[variant_id]
            try:
                variant = self.find(variant_id) or self._build(
                    choice, model, parent_id, step, variant_id
                )
            except (TechniqueNotApplicable, TechniqueFailed, ParityMismatch) as error:
                self.failures[variant_id] = error
                raise
            model, parent_id = variant.model, variant.id
        return variant

    def find(self, variant_id: str) -> StoredVariant | None:
        """The variant if the store has it; a torch one bound to this study's base."""
        found = self.store.find(variant_id)
        if found is None or not isinstance(found.model, StoredTorch):
            return found
        return replace(found, model=bound(found.model, self.base, self.techniques))

    def options(self, recipe: Recipe) -> Sequence[Option]:
        """The techniques that can come after the recipe: the search's landscape."""
        takers = self._takers(recipe)
        skeleton = recipe.skeleton()
        found = [self.option(technique.traits.name, skeleton) for technique in takers]
        return [option for option in found if option is not None]

    def option(self, name: str, skeleton: Recipe) -> Option | None:
        """The technique with its space for what the skeleton makes; None where it refuses, for
        the reason that is in `refusals` then. Asked once of each."""
        key = (name, self.variant_id(skeleton))
        if key not in self._options:
            self._options[key] = self._option(name, skeleton)
        return self._options[key]

    def blocks(self, recipe: Recipe) -> Mapping[Block, int] | None:
        """How often each block is in the network that the recipe's structural steps make; nothing
        is kept of it. None where it can't be made, isn't torch's, or would have to be trained to
        be known."""
        with ExitStack() as workshops:
            try:
                model = self._outlined(recipe, workshops)
                return None if model is None else self._blocks(model)
            except Exception:  # noqa: BLE001  building it for good will tell what is wrong
                return None

    def timed_blocks(self, name: str) -> Sequence[Block]:
        """The layers of the base that the technique of that name wants to know the times of.
        Raises TechniqueFailed."""
        technique = self.techniques[name]
        if not isinstance(technique, Timed) or technique.traits.accepts is not self.base.kind:
            return ()
        with blamed(name):
            return technique.timed_blocks(self.base, self.context)

    def timed_networks(self, name: str, max_s: float) -> Sequence[tuple[str, StoredVariant]]:
        """Networks that the technique of that name wants timed whole, each with the key of its
        seconds; they are in the store then. None is begun after `max_s`. Raises TechniqueFailed."""
        technique = self.techniques[name]
        if not isinstance(technique, Sampled) or technique.traits.accepts is not self.base.kind:
            return ()
        with blamed(name):
            end_s = self.clock() + max_s
            return [
                (one.key, self._written(one, technique.traits))
                for one in technique.timed_networks(self.base, self.context)
                if self.clock() < end_s
            ]

    def _written(self, network: TimedNetwork, traits: Traits) -> StoredVariant:
        key = f"timed whole {self.base.digest} {network.key}"
        variant_id = hashlib.sha256(key.encode()).hexdigest()
        found = self.store.find(variant_id)
        if found is not None:
            return found
        with self.store.workshop() as directory:
            start = self.clock()
            made = network.write(directory)
            step = Step(traits.name, traits.version, {"network": network.key}, self.context.seed)
            return self.store.add(
                StoredVariant(
                    variant_id, self.base.digest, step, self.context.calibration.digest, made,
                    self.clock() - start,
                )
            )  # fmt: skip

    def _outlined(self, recipe: Recipe, workshops: ExitStack) -> Model | None:
        """What the recipe's structural steps make, without training; None where a step trains
        before them, and the store doesn't have what it made."""
        model: Model = self.base
        for choice, variant_id in zip(recipe.choices, self.ids(recipe), strict=True):
            if choice.traits.stage not in (Stage.SUPERNET, Stage.SPARSIFY, *STRUCTURAL):
                continue
            if choice.trains_first:
                found = self.find(variant_id)
                if found is None:
                    return None
                model = found.model
            else:
                directory = workshops.enter_context(self.store.workshop())
                technique = self.techniques[choice.traits.name]
                model = technique.apply(model, choice.parameters, self.context, directory)
        return model

    def _option(self, name: str, skeleton: Recipe) -> Option | None:
        technique = self.techniques[name]
        model = self._model(skeleton)
        reason = self._reason_against(technique, model)
        if reason is not None:
            self.refusals[name] = reason
            return None
        with blamed(name):
            if isinstance(technique, Partial):
                self.refusals.update(technique.missing(model, self.context))
            return Option(technique.traits, technique.space(model, self.context))

    def _epochs(self, choice: Choice) -> float:
        technique = cast(Training, self.techniques[choice.traits.name])
        with blamed(choice.traits.name):
            return technique.epochs(choice.parameters, self.context)

    def _words(self, choice: Choice) -> str:
        """The technique's own, or its name where it has none for the choice."""
        name = choice.traits.name
        try:
            with blamed(name):
                return self.techniques[name].describe(choice.parameters)
        except TechniqueFailed:
            return name

    def _blocks(self, model: Model) -> Mapping[Block, int] | None:
        import torch

        if not isinstance(model, TorchModel):
            return None
        names = read_signature(model.source).input_names
        example = [torch.from_numpy(np.ascontiguousarray(self.inputs[name][:1])) for name in names]
        return blocks_of(load_torch(model), example)

    def _steps(self, recipe: Recipe) -> tuple[tuple[Step, str], ...]:
        context = self.context
        # Digesting all of train takes a while, and few recipes train.
        trains = any(choice.trains for choice in recipe.choices)
        train = context.train.digest if context.train is not None and trains else ""
        return steps_with_ids(
            recipe, self.base.digest, context.seed, context.calibration.digest, train
        )

    def _takers(self, recipe: Recipe) -> list[Technique]:
        """Nothing is there to recover where no step has changed the network, and nothing to prepare
        for where no technique is of that stage."""
        stages = {one.traits.stage for one in self.techniques.values()}

        def is_of_use(traits: Traits) -> bool:
            if traits.prepares is not None and traits.prepares_when is None:
                return traits.prepares in stages
            return traits.stage is not Stage.RECOVER or recipe.is_structural

        return [
            one
            for one in self.techniques.values()
            if recipe.can_take(one.traits) and is_of_use(one.traits)
        ]

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
        about = {"trimserve.technique": choice.traits.name, "trimserve.variant.id": variant_id}
        with (
            span(f"apply {choice.traits.name}", about),
            self.store.workshop() as directory,
            blamed(choice.traits.name),
        ):
            check_parameters(technique.space(model, self.context), choice.parameters)
            start = self.clock()
            made = technique.apply(model, choice.parameters, self.context, directory)
            build_s = self.clock() - start
            # What is lossy or depends on the machine is checked in the engine that will run it.
            if made.kind is not Kind.ENGINE:
                self._check(choice, made, model)
            data_digest = self.context.calibration.digest
            return self.store.add(
                StoredVariant(variant_id, parent_id, step, data_digest, made, build_s)
            )

    def _check(self, choice: Choice, made: Model, parent: Model) -> None:
        largest = self.context.max_batch_size
        if not choice.traits.preserves:
            check_outputs(choice.traits.name, made, parent, self.inputs, largest)
        elif made.precision == parent.precision:
            check_parity(made, parent, self.inputs, largest)


@contextmanager
def blamed(technique: str) -> Iterator[None]:
    """Whatever a technique raises is its failure, and by its name: the study goes on."""
    try:
        yield
    except OptimizerError:
        raise
    except Exception as error:
        raise TechniqueFailed(technique, error) from error
