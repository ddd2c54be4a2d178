"""Inference requests and responses as every layer below the transports sees them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.tensor import Tensor

Parameter = bool | int | float | str
Parameters = Mapping[str, Parameter]


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference. `deadline_s` is absolute on the monotonic clock, None for no deadline.

    `outputs` names the tensors to return, in order; None means all of them.
    """

    model: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] | None = None
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class InferResponse:
    model: str
    version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
