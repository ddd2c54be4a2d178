"""Space: the decisions that make up a network, in the order in which they are taken.

A network is a choice for each decision, an index into its options. What a decision is about may not
exist under earlier ones (a layer beyond the depth chosen): then it is 0. So equal networks have
equal choices. A controller reads the sequence, evolution and predictors the vector. It builds no
network and judges none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.architecture.plan import (
    WITHOUT_INNER_WIDTH,
    EncoderLayerPlan,
    EncoderPlan,
    LayerPlan,
    Plan,
    VisionPlan,
)

Option = str | int | bool | None
Choices = tuple[int, ...]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Decision:
    """One of `options`, which exists where the decision named in `depends_on` chose one of the
    option values beside it."""

    name: str
    options: tuple[Option, ...]
    depends_on: Mapping[str, tuple[Option, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.options or len(set(self.options)) < len(self.options):
            raise ValueError(f"{self.name}: got {self.options}, want at least one, each once")


class Networks(Protocol):
    """What a space is of: its decisions, and the plan that the options chosen make."""

    def decisions(self) -> Iterator[Decision]: ...

    def plan(self, chosen: Mapping[str, Option]) -> Plan: ...


@dataclass(frozen=True)
class ArchitectureSpace:
    """All networks of a kind, with `further` decisions that are about what is done to the network
    and not in its plan, as its precision."""

    networks: Networks
    further: tuple[Decision, ...] = ()

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        return (*self.networks.decisions(), *self.further)

    @property
    def structures(self) -> "ArchitectureSpace":
        """The same networks without the further decisions; it reads this one's choices too."""
        return ArchitectureSpace(self.networks)

    @cached_property
    def n_networks(self) -> int:
        """How many there are; counts past a million may take long in spaces of many conditions."""
        counts: dict[tuple[tuple[str, Option], ...], int] = {(): 1}
        wanted = {name for one in self.decisions for name in one.depends_on}
        for decision in self.decisions:
            following: dict[tuple[tuple[str, Option], ...], int] = {}
            for state, count in counts.items():
                known = dict(state)
                options = decision.options if _exists(decision, known) else (None,)
                for option in options:
                    after = (*state, (decision.name, option)) if decision.name in wanted else state
                    following[after] = following.get(after, 0) + count
            counts = following
        return sum(counts.values())

    def exists(self, index: int, earlier: Sequence[int]) -> bool:
        """Whether decision `index` exists under the choices before it."""
        if not self.decisions[index].depends_on:
            return True
        return _exists(self.decisions[index], self._chosen(earlier))

    def is_open(self, choices: Sequence[int]) -> list[bool]:
        """[decision]: whether it exists there and has more than one option."""
        chosen = self._chosen(choices)
        return [len(one.options) > 1 and _exists(one, chosen) for one in self.decisions]

    def completed(self, choose: Callable[[int, Sequence[int]], int]) -> Choices:
        """The choices that `choose(index, earlier choices)` takes; it is asked only for decisions
        that exist and have more than one option."""
        choices: list[int] = []
        known: dict[str, Option] = {}
        for index, decision in enumerate(self.decisions):
            exists = _exists(decision, known)
            is_open = exists and len(decision.options) > 1
            choices.append(choose(index, choices) if is_open else 0)
            known[decision.name] = decision.options[choices[-1]] if exists else None
        return tuple(choices)

    def canonical(self, choices: Sequence[int]) -> Choices:
        """The choices with 0 for decisions that don't exist. Raises ValueError for an index that
        isn't an option's."""
        if len(choices) != len(self.decisions):
            raise ValueError(f"got {len(choices)} choices, want {len(self.decisions)}")
        for decision, index in zip(self.decisions, choices, strict=True):
            if not 0 <= index < len(decision.options):
                raise ValueError(
                    f"{decision.name}: got option {index}, want 0 to {len(decision.options) - 1}"
                )
        return self.completed(lambda index, _: choices[index])

    def sample(self, rng: np.random.Generator) -> Choices:
        """Each decision drawn evenly among its options."""
        return self.completed(
            lambda index, _: int(rng.integers(len(self.decisions[index].options)))
        )

    def extreme(self, is_largest: bool) -> Choices:
        """The first option of every decision, or the last: spaces list options by rising size."""
        return self.completed(
            lambda index, _: len(self.decisions[index].options) - 1 if is_largest else 0
        )

    def every(self) -> Iterator[Choices]:
        """All networks, each once, in the order of their choices."""
        yield from self._from(())

    def _from(self, earlier: Choices) -> Iterator[Choices]:
        index = len(earlier)
        if index == len(self.decisions):
            yield earlier
            return
        n_options = len(self.decisions[index].options) if self.exists(index, earlier) else 1
        for option in range(n_options):
            yield from self._from((*earlier, option))

    def vector(self, choices: Sequence[int]) -> Vector:
        """[axis]: one-hot for each decision, zeros where it doesn't exist."""
        parts = []
        for index, decision in enumerate(self.decisions):
            part = np.zeros(len(decision.options))
            if self.exists(index, choices[:index]):
                part[choices[index]] = 1.0
            parts.append(part)
        return np.concatenate(parts)

    def plan(self, choices: Sequence[int]) -> Plan:
        """The network's. Raises ValueError where it can't be."""
        return self.networks.plan(self._chosen(choices))

    def option(self, choices: Sequence[int], name: str) -> Option:
        """What the decision of that name chose, None where it doesn't exist."""
        return self._chosen(choices).get(name)

    def _chosen(self, choices: Sequence[int]) -> dict[str, Option]:
        known: dict[str, Option] = {}
        for decision, index in zip(self.decisions, choices, strict=False):
            known[decision.name] = decision.options[index] if _exists(decision, known) else None
        return known


def _exists(decision: Decision, known: Mapping[str, Option]) -> bool:
    return all(known.get(name) in values for name, values in decision.depends_on.items())


@dataclass(frozen=True)
class StageChoices:
    """What a stage of a vision network may be, options by rising size. Block, depth and width are
    the stage's, the rest each layer's own. The first layer has the stage's stride."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[str, ...] = ("conv",)
    kernels: tuple[int, ...] = (3,)
    expansions: tuple[int, ...] = (1,)
    squeezes: tuple[bool, ...] = (False,)
    shortcuts: tuple[bool, ...] = (True,)
    stride: int = 1

    def __post_init__(self) -> None:
        if min(self.depths) < 1:
            raise ValueError(f"depths: got {min(self.depths)}, want at least 1")


@dataclass(frozen=True)
class VisionNetworks:
    """Convolutional networks for images; see `VisionPlan`."""

    image: tuple[int, int, int]
    n_outputs: int
    stems: tuple[int, ...]
    stages: tuple[StageChoices, ...]
    resolutions: tuple[int | None, ...] = (None,)

    def decisions(self) -> Iterator[Decision]:
        yield Decision("resolution", self.resolutions)
        yield Decision("stem", self.stems)
        for number, stage in enumerate(self.stages):
            yield Decision(f"stage{number}.block", stage.blocks)
            yield Decision(f"stage{number}.depth", stage.depths)
            yield Decision(f"stage{number}.width", stage.widths)
            for position in range(max(stage.depths)):
                yield from _of_layer(number, position, stage)

    def plan(self, chosen: Mapping[str, Option]) -> VisionPlan:
        resolution, stem = chosen["resolution"], chosen["stem"]
        assert resolution is None or isinstance(resolution, int)
        assert isinstance(stem, int)
        stages = tuple(
            tuple(
                _layer(number, position, stage, chosen)
                for position in range(_number(chosen[f"stage{number}.depth"]))
            )
            for number, stage in enumerate(self.stages)
        )
        return VisionPlan(self.image, self.n_outputs, stem, stages, resolution)


def _of_layer(number: int, position: int, stage: StageChoices) -> Iterator[Decision]:
    """The decisions of the layer at that position of the stage, where they make a difference."""
    own = f"stage{number}.layer{position}"
    exists = _deeper(f"stage{number}.depth", stage.depths, position)
    blocks = tuple(block for block in stage.blocks if block not in WITHOUT_INNER_WIDTH)
    inner = exists if blocks == stage.blocks else {**exists, f"stage{number}.block": blocks}
    yield Decision(f"{own}.kernel", stage.kernels, exists)
    if blocks:
        yield Decision(f"{own}.expansion", stage.expansions, inner)
        yield Decision(f"{own}.squeezes", stage.squeezes, inner)
    if position > 0:  # the first one's input mostly has other channels, or its stride is above 1
        yield Decision(f"{own}.shortcut", stage.shortcuts, exists)


def _deeper(name: str, depths: tuple[int, ...], position: int) -> Mapping[str, tuple[Option, ...]]:
    """The condition that the depth reaches beyond the position, empty where each does."""
    kept = tuple(depth for depth in depths if depth > position)
    return {} if kept == depths else {name: kept}


def _layer(
    number: int, position: int, stage: StageChoices, chosen: Mapping[str, Option]
) -> LayerPlan:
    own = f"stage{number}.layer{position}"
    expansion = chosen.get(f"{own}.expansion")
    return LayerPlan(
        block=str(chosen[f"stage{number}.block"]),
        width=_number(chosen[f"stage{number}.width"]),
        kernel=_number(chosen[f"{own}.kernel"]),
        stride=stage.stride if position == 0 else 1,
        expansion=1 if expansion is None else _number(expansion),
        squeezes=bool(chosen.get(f"{own}.squeezes")),
        shortcut=bool(chosen.get(f"{own}.shortcut", True in stage.shortcuts)),
    )


@dataclass(frozen=True)
class EncoderNetworks:
    """Transformer encoders for texts; see `EncoderPlan`. Heads and inner width are each layer's."""

    n_tokens: int
    max_length: int
    n_outputs: int
    head_width: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    inners: tuple[int, ...]

    def decisions(self) -> Iterator[Decision]:
        yield Decision("depth", self.depths)
        yield Decision("width", self.widths)
        for position in range(max(self.depths)):
            exists = _deeper("depth", self.depths, position)
            yield Decision(f"layer{position}.heads", self.heads, exists)
            yield Decision(f"layer{position}.inner", self.inners, exists)

    def plan(self, chosen: Mapping[str, Option]) -> EncoderPlan:
        layers = tuple(
            EncoderLayerPlan(
                _number(chosen[f"layer{position}.heads"]), _number(chosen[f"layer{position}.inner"])
            )
            for position in range(_number(chosen["depth"]))
        )
        width = _number(chosen["width"])
        return EncoderPlan(
            self.n_tokens, self.max_length, self.n_outputs, width, self.head_width, layers
        )


def _number(option: Option) -> int:
    assert isinstance(option, int)
    return option
