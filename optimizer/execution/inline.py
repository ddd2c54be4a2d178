"""The executor in this process: for models and techniques that exist nowhere else, and tests.

Building holds the machine's cores as any building does; an engine or a technique that crashes
takes the study with it.
"""

from dataclasses import dataclass
from functools import cached_property

from optimizer.builder import Builder
from optimizer.execution import Json
from optimizer.execution.calls import answer
from optimizer.execution.setup import Surroundings
from optimizer.measuring import Measurer
from optimizer.measuring.cores import building
from optimizer.store import Store
from optimizer.telling import Seldom, Tell, untold

TELL_EVERY_S = 1.0


@dataclass(eq=False)
class InlineExecutor:
    """Builds in `store`, which its caller has open."""

    surroundings: Surroundings
    store: Store
    measurer: Measurer
    tell: Tell = untold

    def start(self) -> None:
        """Raises SpecInvalid where model or data can't be used."""
        self.surroundings.check()

    def build(self, call: str, arguments: Json) -> Json:
        with building():
            return answer(self._builder, call, arguments)

    def close(self) -> None:
        """Nothing to end."""

    @cached_property
    def _builder(self) -> Builder:
        return self.surroundings.builder(self.store, Seldom(self.tell, TELL_EVERY_S))
