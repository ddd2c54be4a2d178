"""Tiny torch programs as artifacts, written as the optimizer does."""

import warnings
from pathlib import Path

import numpy as np
import torch

from serve.engines import Signature
from serve.engines.torch_archive import write_signature
from serve.tensor import TensorSpec

SIGNATURE = Signature(
    (TensorSpec("a", "FP32", (-1, 4)), TensorSpec("b", "INT64", (-1, 4))),
    (TensorSpec("sum", "FP32", (-1, 4)), TensorSpec("same", "FP32", (-1, 4))),
)


class Pair(torch.nn.Module):
    """A product with weights, and an input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(16.0).reshape(4, 4) / 16)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a @ self.weight + b, a


def by_hand(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) @ (np.arange(16.0).reshape(4, 4) / 16) + b


def write_program(directory: Path, example: tuple[torch.Tensor, ...] | None = None) -> Path:
    """`model.pt2` and its signature; `example` inputs are stored with it, as pickles."""
    batch = torch.export.Dim("batch")
    given = (torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        program = torch.export.export(Pair(), given, dynamic_shapes=({0: batch}, {0: batch}))
        program.example_inputs = None if example is None else (example, {})
        torch.export.save(program, directory / "model.pt2")
    write_signature(directory, SIGNATURE)
    return directory / "model.pt2"
