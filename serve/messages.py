"""Inference requests and responses as every layer below the transports sees them."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from serve.errors import InvalidRequest, NotSupported
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


# Parameters of Triton's extensions that would change the answer: ignoring them would be wrong.
_UNSUPPORTED_OF_REQUEST = ("sequence_id", "sequence_start", "sequence_end")
_UNSUPPORTED_OF_OUTPUT = ("classification", "shared_memory_region")


def refuse_unsupported(request: Container[str], outputs: Iterable[Container[str]]) -> None:
    """Raise NotSupported for parameters, of the request and of its outputs, that aren't there."""
    for name in _UNSUPPORTED_OF_REQUEST:
        if name in request:
            raise NotSupported(f"parameters.{name}: sequences are not supported")
    for output in outputs:
        for name in _UNSUPPORTED_OF_OUTPUT:
            if name in output:
                raise NotSupported(f"outputs.parameters.{name} is not supported")


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
