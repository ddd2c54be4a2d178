"""A model's inputs as its server describes them, and the shapes that a request gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.slo import Workload

VARIABLE = -1
DATATYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
    "BYTES",
)


class SignatureUnusable(ValueError):
    """Metadata that can't be understood, or that the workload doesn't fit."""


@dataclass(frozen=True)
class TensorSpec:
    name: str
    datatype: str
    shape: tuple[int, ...]
    """-1 for a variable axis; a leading -1 is the batch"""

    @property
    def has_batch_axis(self) -> bool:
        return len(self.shape) > 0 and self.shape[0] == VARIABLE

    @property
    def has_variable_length(self) -> bool:
        return VARIABLE in self.shape[1:]

    def concrete(self, rows: int, length: int) -> tuple[int, ...]:
        """The shape with `rows` for the batch and `length` for each other variable axis."""
        axes = [rows] if self.has_batch_axis else list(self.shape[:1])
        return (*axes, *(length if axis == VARIABLE else axis for axis in self.shape[1:]))


@dataclass(frozen=True)
class Signature:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    """as described, of any datatype; none where the server tells of none"""

    @property
    def has_variable_length(self) -> bool:
        return any(spec.has_variable_length for spec in self.inputs)


def read_inputs(described: Any, outputs: Any = ()) -> Signature:
    """The `inputs` and `outputs` of a metadata answer (JSON). Raises SignatureUnusable."""
    return checked(_read_specs("inputs", described), _read_specs("outputs", outputs))


def _read_specs(what: str, described: Any) -> tuple[TensorSpec, ...]:
    try:
        return tuple(
            TensorSpec(str(one["name"]), str(one["datatype"]), tuple(int(n) for n in one["shape"]))
            for one in described
        )
    except (TypeError, KeyError, ValueError) as error:
        raise SignatureUnusable(
            f"metadata: got {what} {described!r:.120}, want a name, datatype and shape for each"
        ) from error


def checked(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec] = ()) -> Signature:
    """Raises SignatureUnusable for no inputs or a datatype that doesn't exist."""
    if not inputs:
        raise SignatureUnusable("metadata: got no inputs, want at least one")
    for spec in inputs:
        if spec.datatype not in DATATYPES:
            raise SignatureUnusable(
                f"metadata: input '{spec.name}': got datatype {spec.datatype}, "
                f"want one of {', '.join(DATATYPES)}"
            )
    return Signature(tuple(inputs), tuple(outputs))


def check_fit(signature: Signature, workload: Workload) -> None:
    """Raises SignatureUnusable where requests of that workload can't be made for the model."""
    for spec in signature.inputs:
        fixed = spec.shape[0] if spec.shape and not spec.has_batch_axis else None
        if workload.rows > 1 and not spec.has_batch_axis and fixed != workload.rows:
            raise SignatureUnusable(
                f"workload.rows: got {workload.rows}, but input '{spec.name}' has the shape "
                f"{list(spec.shape)}, want {fixed if fixed is not None else 1}"
            )
        if workload.encoding == "json" and spec.datatype in ("FP16", "BF16"):
            raise SignatureUnusable(
                f"workload.encoding: got json, but input '{spec.name}' is {spec.datatype}, "
                "which has no JSON form, want binary"
            )


def check_lengths(signature: Signature, workload: Workload) -> None:
    """Raises SignatureUnusable where random inputs of an unknown length would be needed."""
    if signature.has_variable_length and workload.input_lengths is None:
        names = [spec.name for spec in signature.inputs if spec.has_variable_length]
        raise SignatureUnusable(
            f"workload.input_lengths: missing, but {', '.join(names)} have axes of variable "
            "length, want for example {min: 16, max: 128}, or real inputs with --inputs"
        )
