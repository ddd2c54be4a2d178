"""Inference requests and responses as every layer below the transports sees them."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from serve.errors import InvalidRequest, NotSupported
from serve.tensor import Tensor

# Raises InvalidRequest where an input of that name, datatype and shape can't be the model's.
InputCheck = Callable[[str, str, Sequence[int]], None]
Parameter = bool | int | float | str
Parameters = Mapping[str, Parameter]


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference. `deadline_s` is absolute on the monotonic clock, None for no deadline.

    `outputs` names the tensors to return, in order; None means all of them. `classification` has,
    for outputs wanted as their best classes, how many of them. `tenant` separates clients that
    must not share answers.
    """

    model: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] | None = None
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    deadline_s: float | None = None
    classification: Mapping[str, int] = field(default_factory=dict)
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class InferResponse:
    model: str
    version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Parameters = field(default_factory=dict)


# Parameters of Triton's extensions that would change the answer: ignoring them would be wrong.
_UNSUPPORTED = ("sequence_id", "sequence_start", "sequence_end")


def refuse_unsupported(parameters: Container[str]) -> None:
    """Raise NotSupported for parameters of a request that this server can't honour."""
    for name in _UNSUPPORTED:
        if name in parameters:
            raise NotSupported(f"parameters.{name}: sequences are not supported")


def earliest_deadline(
    parameters: Parameters, arrival_s: float, timeout_s: float | None
) -> float | None:
    """The deadline of a request that arrived at `arrival_s`: the earlier of the transport's
    `timeout_s` and the parameter `timeout`, microseconds of which 0 means none."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise InvalidRequest("parameters.timeout", value, "microseconds as a whole number from 0")
    timeouts = [timeout for timeout in (timeout_s, value * 1e-6 or None) if timeout is not None]
    return arrival_s + min(timeouts) if timeouts else None
