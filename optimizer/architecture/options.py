"""What a spec says of the search for another architecture: its space, and how it is searched."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from loadtest.document import Strict
from loadtest.slo import PositiveFloat
from optimizer.spec_values import FunctionName, Weights, listed

Sizes = Annotated[
    tuple[Annotated[int, Field(ge=1, le=65_536)], ...],
    BeforeValidator(listed),
    Field(min_length=1, max_length=64),
]
"""By rising size: the last is the largest."""
Flags = Annotated[tuple[bool, ...], BeforeValidator(listed), Field(min_length=1, max_length=2)]
ControllerName = Literal["reinforce", "ppo", "predictor"]
PrecisionName = Literal["fp32", "int8"]
_ODD = "want odd sizes of kernels"


class StageSpec(Strict):
    """One stage of a vision network: see `optimizer.architecture.space.StageChoices`."""

    depths: Sizes
    widths: Sizes
    blocks: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] = ("conv",)
    kernels: Sizes = (3,)
    expansions: Sizes = (1,)
    squeezes: Flags = (False,)
    shortcuts: Flags = (True,)
    stride: int = Field(default=1, ge=1, le=8)

    @model_validator(mode="after")
    def _values_can_be(self) -> Self:
        if any(size % 2 == 0 for size in self.kernels):
            raise ValueError(f"{_ODD}, got {', '.join(map(str, self.kernels))}")
        _check_rising(self, ("depths", "widths", "kernels", "expansions", "blocks", "squeezes"))
        _check_distinct(self, ("shortcuts",))
        return self


class VisionSpaceSpec(Strict):
    """Convolutional networks for the model's images: see `optimizer.architecture.plan`."""

    kind: Literal["vision"]
    stems: Sizes
    """Channels of the first convolution."""
    stages: Annotated[
        tuple[StageSpec, ...], BeforeValidator(listed), Field(min_length=1, max_length=16)
    ]
    resolutions: Sizes | None = None
    """Pixels a side that images are scaled to; without it they stay as they are."""

    @model_validator(mode="after")
    def _values_can_be(self) -> Self:
        _check_rising(self, ("stems", "resolutions"))
        return self


class EncoderSpaceSpec(Strict):
    """Transformer encoders for the model's tokens: see `optimizer.architecture.plan`."""

    kind: Literal["encoder"]
    n_tokens: int = Field(ge=2, le=10_000_000)
    """Of the vocabulary."""
    max_length: int = Field(ge=1, le=65_536)
    head_width: int = Field(default=32, ge=1, le=1024)
    depths: Sizes
    widths: Sizes
    heads: Sizes
    inners: Sizes
    """Widths inside of feed-forward parts."""

    @model_validator(mode="after")
    def _values_can_be(self) -> Self:
        _check_rising(self, ("depths", "widths", "heads", "inners"))
        return self


SpaceSpec = Annotated[VisionSpaceSpec | EncoderSpaceSpec, Field(discriminator="kind")]


class InitialSpec(Strict):
    """A trained network with the layers of the space's largest."""

    factory: FunctionName
    weights: Weights


def _kind_of_initial(given: object) -> str:
    return "model" if isinstance(given, str) else "network"


Initial = Annotated[
    Annotated[Literal["model"], Tag("model")] | Annotated[InitialSpec, Tag("network")],
    Discriminator(_kind_of_initial),
]
"""The model itself, or another network."""


class ArchitectureSpec(Strict):
    """Another network in the model's place: see docs/techniques.md."""

    space: SpaceSpec
    blocks: dict[str, FunctionName] = Field(default_factory=dict)
    """The user's own by name: functions of (LayerPlan, in-channels) that give a module."""
    speedups: Annotated[
        tuple[PositiveFloat, ...], BeforeValidator(listed), Field(min_length=1, max_length=16)
    ] = (2.0,)
    """How many times as fast as the model the network is to be, by the table of layers. Each is a
    search of its own, on the same supernet."""
    weights: Literal["shared", "own"] = "shared"
    """`shared`: of a supernet that is trained once; `own`: each network trained from scratch."""
    initial: Initial | None = None
    """What the supernet begins as: the model, or another trained network, whose layers are those
    of the space's largest network in the same order. Without it weights are drawn at random."""
    epochs: PositiveFloat = 20.0
    """Passes over train of the supernet, or of a network that comes to the last round."""
    learning_rate: PositiveFloat = 0.1
    """The peak; the default is for weights drawn at random."""
    evaluations: int = Field(default=60, ge=2, le=100_000)
    """Networks that the controller, and each of its controls, looks at."""
    controllers: Annotated[
        tuple[ControllerName, ...], BeforeValidator(listed), Field(min_length=1)
    ] = ("reinforce",)
    precisions: Annotated[
        tuple[PrecisionName, ...], BeforeValidator(listed), Field(min_length=1)
    ] = ("fp32",)
    """That networks are looked at in: of several, the search chooses the precision with the
    network, or a recipe fixes one of them."""
    screen: Literal["none", "naswot", "synflow"] = "none"
    """What rates untrained networks: the lower half of those proposed isn't looked at."""

    @model_validator(mode="after")
    def _values_fit_each_other(self) -> Self:
        _check_rising(self, ("speedups", "controllers", "precisions"))
        if self.initial is not None and self.weights != "shared":
            raise ValueError(
                f"want weights: shared with initial, which a supernet begins as, got {self.weights}"
            )
        return self


def _check_distinct(spec: Strict, names: tuple[str, ...]) -> None:
    """Raises ValueError for a value that comes twice."""
    for name in names:
        values = getattr(spec, name)
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"want every value once in {name}")


def _check_rising(spec: Strict, names: tuple[str, ...]) -> None:
    """Raises ValueError for a value that comes twice, and for numbers that don't rise."""
    _check_distinct(spec, names)
    for name in names:
        values = getattr(spec, name)
        if values is None:
            continue
        numbers = [value for value in values if not isinstance(value, str)]
        if numbers != sorted(numbers):
            raise ValueError(f"want rising values in {name}, got {', '.join(map(str, values))}")
