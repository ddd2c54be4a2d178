"""Example inputs and variable axes, with which torch models are exported."""

from typing import TYPE_CHECKING

from optimizer.model_source import Signature

if TYPE_CHECKING:
    import torch

_BATCH = 2
"""Not 1: torch.export takes sizes 0 and 1 for constants (pytorch PR 170264)."""
_LENGTH = 16
"""Of every other variable axis."""


def example_inputs(signature: Signature) -> "tuple[torch.Tensor, ...]":
    """Zeros for each input, in its order."""
    import torch

    types = {"BOOL": torch.bool, "FP16": torch.float16, "FP32": torch.float32,
             "FP64": torch.float64, "UINT8": torch.uint8, "INT8": torch.int8,
             "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64}  # fmt: skip
    return tuple(
        torch.zeros(
            (_BATCH, *(_LENGTH if axis == -1 else axis for axis in tensor.shape)),
            dtype=types[tensor.datatype],
        )
        for tensor in signature.inputs
    )


def dynamic_shapes(signature: Signature) -> "tuple[dict[int, torch.export.Dim], ...]":
    """For each input the axes that vary: the batch, and those that the signature has as -1."""
    import torch

    batch = torch.export.Dim("batch")
    return tuple(
        {0: batch}
        | {
            # Named by the axis, so that inputs of one length (ids, mask) share it.
            axis + 1: torch.export.Dim(f"length_{axis + 1}")
            for axis, size in enumerate(tensor.shape)
            if size == -1
        }
        for tensor in signature.inputs
    )
