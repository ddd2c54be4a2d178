"""Padding: requests of unequal lengths in one batch, and their answers cut back to their own.

An axis that varies from request to request (the tokens of a text) is filled up to a *bucket*, one
of a few lengths, so that requests of different lengths share a run and engines see few shapes.
The model ignores what was filled in by its mask. It knows arrays, not queues or engines.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from serve.errors import InvalidRequest
from serve.tensor import Array, TensorSpec


@dataclass(frozen=True)
class PaddedInput:
    """An input of the engine whose `axis` (not 0, the batch) is filled up with `value`."""

    tensor: str
    axis: int = 1
    value: int | float = 0


@dataclass(frozen=True)
class CutOutput:
    """An output whose `axis` has the padded length and is cut back to the request's own."""

    tensor: str
    axis: int = 1


@dataclass(frozen=True)
class Padding:
    """All `inputs` of a request have one length on their axes, filled up to the next of `buckets`
    (rising, from 1). `mask` is one of them, 1 for what is real and 0 (its `value`) for what was
    filled in; the server makes it where a request leaves it out."""

    inputs: tuple[PaddedInput, ...]
    buckets: tuple[int, ...]
    outputs: tuple[CutOutput, ...] = ()
    mask: str | None = None

    @property
    def max_length(self) -> int:
        return self.buckets[-1]

    def length_of(self, inputs: Mapping[str, Array]) -> int:
        """The request's own length (the mask may be missing). Raises InvalidRequest where its
        tensors disagree about it, or where it is beyond the largest bucket."""
        given = [one for one in self.inputs if one.tensor in inputs]
        lengths = {one.tensor: inputs[one.tensor].shape[one.axis] for one in given}
        first = given[0]
        length: int = lengths[first.tensor]
        if any(other != length for other in lengths.values()):
            raise InvalidRequest("inputs.shape", lengths, "equal lengths")
        if length > self.max_length:
            raise InvalidRequest(
                f"inputs.{first.tensor}.shape",
                list(inputs[first.tensor].shape),
                f"a length of at most {self.max_length} on axis {first.axis}",
            )
        return length

    def bucket_of(self, length: int) -> int:
        """The smallest bucket that holds `length`, which is at most the largest one."""
        return self.buckets[bisect.bisect_left(self.buckets, length)]

    def assemble(self, parts: Sequence[Mapping[str, Array]], length: int) -> dict[str, Array]:
        """The parts behind each other on axis 0, their padded axes filled up to `length`."""
        padded = {one.tensor: one for one in self.inputs}
        return {
            name: _filled([part[name] for part in parts], padded[name], length)
            if name in padded
            else np.concatenate([part[name] for part in parts])
            for name in parts[0]
        }

    def cut(self, outputs: Mapping[str, Array], length: int) -> dict[str, Array]:
        """A request's rows of the batch's outputs, cut back to its length. Views."""
        axes = {one.tensor: one.axis for one in self.outputs}
        return {
            name: array[(slice(None),) * axes[name] + (slice(length),)] if name in axes else array
            for name, array in outputs.items()
        }

    def problem(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> tuple[str, str] | None:
        """What doesn't fit a signature: the field and what is wrong with it, or None."""
        if not self.inputs:
            return "padding.inputs", "got none, want the inputs that are padded"
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)):
            return "padding.buckets", f"got {list(self.buckets)}, want rising lengths"
        if self.buckets[0] < 1:
            return "padding.buckets", f"got {list(self.buckets)}, want lengths of at least 1"
        if self.mask is not None and self.mask not in {one.tensor for one in self.inputs[1:]}:
            return "padding.mask", f"got {self.mask!r}, want one of padding.inputs but the first"
        return (
            _misfit("padding.inputs", self.inputs, inputs)
            or _misfit("padding.outputs", self.outputs, outputs)
            or self._open_axis(inputs)
            or self._mask_misfit(inputs)
        )

    def _open_axis(self, inputs: Sequence[TensorSpec]) -> tuple[str, str] | None:
        """Requests of one bucket must be alike in all but their padded lengths."""
        padded = {one.tensor: one.axis for one in self.inputs}
        for spec in inputs:
            known = {0, padded.get(spec.name, 0)}
            if any(size == -1 for axis, size in enumerate(spec.shape) if axis not in known):
                return "padding.inputs", (
                    f"got shape {list(spec.shape)} of {spec.name!r}, want no axis that varies but "
                    "the batch and the padded one"
                )
        return None

    def _mask_misfit(self, inputs: Sequence[TensorSpec]) -> tuple[str, str] | None:
        if self.mask is None:
            return None
        mask = next(one for one in self.inputs if one.tensor == self.mask)
        rank = next(len(spec.shape) for spec in inputs if spec.name == self.mask)
        if (rank, mask.axis, mask.value) != (2, 1, 0):
            return "padding.mask", (
                f"got {rank} dimensions, axis {mask.axis} and value {mask.value} of {self.mask!r}, "
                "want 2, 1 and 0"
            )
        return None


def _misfit(
    field: str, axes: Sequence[PaddedInput | CutOutput], specs: Sequence[TensorSpec]
) -> tuple[str, str] | None:
    known = {spec.name: spec for spec in specs}
    for one in axes:
        spec = known.get(one.tensor)
        if spec is None:
            return field, f"got tensor {one.tensor!r}, want one of {', '.join(known)}"
        if not 1 <= one.axis < len(spec.shape) or spec.shape[one.axis] != -1:
            return field, (
                f"got axis {one.axis} of {one.tensor!r}, want one that is -1 in "
                f"{list(spec.shape)}, other than 0"
            )
    return None


def _filled(arrays: Sequence[Array], axis: PaddedInput, length: int) -> Array:
    rows = sum(len(array) for array in arrays)
    shape = list(arrays[0].shape)
    shape[0], shape[axis.axis] = rows, length
    dtype = arrays[0].dtype
    filled = np.full(shape, b"" if dtype.kind == "O" else axis.value, dtype)
    start = 0
    for array in arrays:
        place = [slice(None)] * array.ndim
        place[0] = slice(start, start + len(array))
        place[axis.axis] = slice(array.shape[axis.axis])
        filled[tuple(place)] = array
        start += len(array)
    return filled
