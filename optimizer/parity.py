"""Parity: two forms of a model that should compute the same do, at every batch size.

A dynamic batch is where exporters and engines go wrong in silence, so it is tried at 1, 2, 3 and
the largest. Where a form is lossy (bf16, int8) its values may differ from the base's, and
accuracy judges them; then a batch must at least give what its rows give one by one.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from optimizer.errors import ParityMismatch
from optimizer.model_source import load_torch
from optimizer.variant import EngineModel, Model, OnnxModel, TorchModel
from serve.engines import EngineSpec, load_engine
from serve.tensor import Array

PROTOCOL_VERSION = 1
Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]

# Largest difference, relative to the largest absolute value of the tensor, by precision. They
# leave room for sums in another order and for a value at a rounding boundary that falls to the
# other side and takes others with it. docs/experiments.md has what was measured: 3e-7 for fp32
# across exporters and engines, and no difference at all between a batch and its rows.
TOLERANCES: Mapping[str, float] = {"fp32": 2e-4, "fp16": 1e-2, "bf16": 2e-2, "int8": 5e-2}
_SMALLEST = 1e-6
"""The tolerance of an output that is zero everywhere."""


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The sizes that are tried: 1, 2, 3 and the largest."""
    return tuple(sorted({size for size in (1, 2, 3, max_batch_size) if size <= max_batch_size}))


def check_parity(
    child: Model, parent: Model, inputs: Mapping[str, Array], max_batch_size: int
) -> None:
    """Compare the child with what it was made from, or, where the step is lossy, with itself.

    `inputs` hold at least `max_batch_size` samples. Raises ParityMismatch.
    """
    runner = load_runner(child, max_batch_size)
    if child.precision == parent.precision == "fp32":
        what = f"the {child.kind} model against the {parent.kind} model it comes from"
        reference: Runner = load_runner(parent, max_batch_size)
    else:
        what = f"the {child.precision} model's batch against its rows one by one"
        reference = one_by_one(runner)
    compare(what, runner, reference, inputs, max_batch_size, TOLERANCES[child.precision])


def compare(
    what: str,
    runner: Runner,
    reference: Runner,
    inputs: Mapping[str, Array],
    max_batch_size: int,
    tolerance: float,
) -> None:
    """Compare the outputs of two runners at every batch size. Raises ParityMismatch."""
    for size in batch_sizes(max_batch_size):
        batch = {name: array[:size] for name, array in inputs.items()}
        wanted, given = reference(batch), runner(batch)
        for name, want in wanted.items():
            got = given[name]
            allowed = max(tolerance * float(np.abs(want).max(initial=0.0)), _SMALLEST)
            if got.shape == want.shape:
                differences = np.abs(np.subtract(got, want, dtype=np.float64))
                difference = float(differences.max(initial=0.0))
            else:
                difference = math.inf
            if not difference <= allowed:  # NaN too
                raise ParityMismatch(f"{what}, output {name}", size, difference, allowed)


def one_by_one(runner: Runner) -> Runner:
    """Runs each row as a batch of 1."""

    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        n_rows = len(next(iter(batch.values())))
        rows = [
            runner({name: array[row : row + 1] for name, array in batch.items()})
            for row in range(n_rows)
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    return run


def load_runner(model: Model, max_batch_size: int) -> Runner:
    """The model ready to run, whatever its kind, on one thread."""
    if isinstance(model, TorchModel):
        return _torch_runner(model)
    if isinstance(model, OnnxModel):
        spec = EngineSpec("onnxruntime", model.file, model.precision)
        return load_engine(model.directory, spec).run
    assert isinstance(model, EngineModel)
    sizes = fixed_sizes(model.spec.name, batch_sizes(max_batch_size))
    return load_engine(model.directory, model.served(1, 1, sizes)).run


def fixed_sizes(engine: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes to compile for: none where the engine takes any."""
    return tuple(sizes) if engine == "openvino" else ()


def _torch_runner(model: TorchModel) -> Runner:
    import torch

    module = load_torch(model.source)
    names = [tensor.name for tensor in model.source.inputs]
    outputs = [tensor.name for tensor in model.source.outputs]

    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        arguments = [torch.from_numpy(np.ascontiguousarray(batch[name])) for name in names]
        with torch.inference_mode():
            result = module(*arguments)
        tensors = result if isinstance(result, tuple | list) else (result,)
        return {name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=True)}

    return run
