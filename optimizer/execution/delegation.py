"""The builder of a coordinator: it knows recipes, ids and the store, and has others build.

So the process that searches runs no technique, no user's code and no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimizer.blocks import Block
from optimizer.builder import Builder
from optimizer.errors import ParityMismatch, TechniqueFailed, TechniqueNotApplicable
from optimizer.execution import Executor
from optimizer.execution.calls import blocks_from, option_from, recipe_to, timed_blocks_from
from optimizer.recipe import Recipe
from optimizer.search.landscape import Option
from optimizer.store import StoredVariant
from optimizer.techniques import Sampled, Timed


@dataclass(frozen=True, eq=False, kw_only=True)
class DelegatingBuilder(Builder):
    """As `Builder`, with its work done by `executor`."""

    executor: Executor

    def build(self, recipe: Recipe) -> StoredVariant:
        failed = self.failed_id(recipe)
        if failed:
            raise self.failures[failed]
        ids = self.ids(recipe)
        found = self.find(ids[-1])
        if found is not None:
            return found
        try:
            self.executor.build("build", {"recipe": recipe_to(recipe)})
        except (TechniqueNotApplicable, TechniqueFailed, ParityMismatch) as error:
            # What the store doesn't have is where it failed.
            missing = next((one for one in ids if self.store.find(one) is None), ids[-1])
            self.failures[missing] = error
            raise
        built = self.find(ids[-1])
        assert built is not None, "a worker answers when the variant is in the store"
        return built

    def blocks(self, recipe: Recipe) -> Mapping[Block, int] | None:
        try:
            return blocks_from(self.executor.build("blocks", {"recipe": recipe_to(recipe)}))
        except TechniqueFailed:  # building it for good will tell what is wrong
            return None

    def timed_blocks(self, name: str) -> Sequence[Block]:
        if not isinstance(self.techniques[name], Timed):
            return ()
        return timed_blocks_from(self.executor.build("timed_blocks", {"technique": name}))

    def timed_networks(self, name: str, max_s: float) -> Sequence[tuple[str, StoredVariant]]:
        if not isinstance(self.techniques[name], Sampled):
            return ()
        answered = self.executor.build("timed_networks", {"technique": name, "max_s": max_s})
        found = [(key, self.find(variant_id)) for key, variant_id in answered]
        return [(key, one) for key, one in found if one is not None]

    def _option(self, name: str, skeleton: Recipe) -> Option | None:
        arguments = {"technique": name, "recipe": recipe_to(skeleton)}
        answered = self.executor.build("option", arguments)
        if "refusal" in answered:
            self.refusals[name] = answered["refusal"]
        self.refusals.update(answered.get("refusals", {}))
        return option_from(answered, self.techniques[name].traits)
