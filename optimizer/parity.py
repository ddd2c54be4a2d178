"""Parity: two forms of a model that should compute the same do, at every batch size.

A dynamic batch is where exporters and engines go wrong in silence, so it is tried at 1, 2, 3 and
the largest. Where a form is lossy (bf16, int8) its values may differ from the base's, and
accuracy judges them; then a batch must at least give what its rows give one by one.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from optimizer.errors import ParityMismatch, TechniqueFailed
from optimizer.measuring import Measurer
from optimizer.model_source import read_signature
from optimizer.timing import Contender
from optimizer.torch_source import named_outputs
from optimizer.torch_variant import load_torch
from optimizer.variant import EngineModel, Model, OnnxModel, StoredTorch, TorchModel
from serve.engines import EngineSpec, load_engine
from serve.tensor import Array

PROTOCOL_VERSION = 1
Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]

# Largest difference, relative to the largest absolute value of the tensor, by precision. They
# leave room for sums in another order and for a value at a rounding boundary that falls to the
# other side and takes others with it. docs/experiments.md has what was measured: 3e-7 for fp32
# across exporters and engines, and no difference at all between a batch and its rows.
TOLERANCES: Mapping[str, float] = {"fp32": 2e-4, "fp16": 1e-2, "bf16": 2e-2, "int8": 5e-2,
                                   "int4": 5e-2}  # fmt: skip
_SMALLEST = 1e-6
"""The tolerance of an output that is zero everywhere."""


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The sizes that are tried: 1, 2, 3 and the largest."""
    return tuple(sorted({size for size in (1, 2, 3, max_batch_size) if size <= max_batch_size}))


def check_parity(
    child: Model, parent: Model, inputs: Mapping[str, Array], max_batch_size: int
) -> None:
    """Compare the child with what it was made from, or, where the step is lossy, with itself, in
    this process.

    `inputs` hold at least `max_batch_size` samples. Raises ParityMismatch.
    """
    runner = load_runner(child, max_batch_size)
    if is_exact(child, parent):
        reference: Runner = load_runner(parent, max_batch_size)
    else:
        reference = one_by_one(runner)
    what, tolerance = what_is_compared(child, parent), TOLERANCES[child.precision]
    compare(what, runner, reference, inputs, max_batch_size, tolerance)


def check_engine_parity(
    measurer: Measurer,
    child: EngineModel,
    parent: Model,
    inputs: Mapping[str, Array],
    max_batch_size: int,
) -> None:
    """As `check_parity`, but the child runs where the measurer does; the parent's outputs are
    computed here, since what it is doesn't depend on the target."""
    sizes = batch_sizes(max_batch_size)
    batches = [_first(inputs, size) for size in sizes]
    rows = [{n: a[row : row + 1] for n, a in batches[-1].items()} for row in range(sizes[-1])]
    exact = is_exact(child, parent)
    spec = child.served(1, 1, fixed_sizes(child.spec.name, sizes))
    asked = batches if exact else [*batches, *rows]
    given = list(measurer.outputs(Contender(child.directory, spec), asked))
    if exact:
        wanted = list(map(load_runner(parent, max_batch_size), batches))
    else:
        wanted = [_joined(given[len(batches) :][:size]) for size in sizes]
    what, tolerance = what_is_compared(child, parent), TOLERANCES[child.precision]
    for size, want, got in zip(sizes, wanted, given, strict=False):
        compare_batch(what, size, want, got, tolerance)


def is_exact(child: Model, parent: Model) -> bool:
    """Whether the child should compute what its parent does, but for the order of sums."""
    return child.precision == parent.precision == "fp32"


def what_is_compared(child: Model, parent: Model) -> str:
    if is_exact(child, parent):
        return f"the {child.kind} model against the {parent.kind} model it comes from"
    return f"the {child.precision} model's batch against its rows one by one"


def check_outputs(
    technique: str,
    child: Model,
    parent: Model,
    inputs: Mapping[str, Array],
    max_batch_size: int,
) -> None:
    """Where a technique changes values by design: at every batch size the child has to give
    what the parent gives, in name and shape, and finite. Raises TechniqueFailed."""
    child_runs, parent_runs = (
        load_runner(child, max_batch_size),
        load_runner(parent, max_batch_size),
    )
    for size in batch_sizes(max_batch_size):
        batch = {name: array[:size] for name, array in inputs.items()}
        wanted, given = parent_runs(batch), child_runs(batch)
        for name, want in wanted.items():
            got = given[name]
            if got.shape != want.shape:
                raise TechniqueFailed(
                    technique,
                    f"output {name} has the shape {list(got.shape)} at batch size {size}, "
                    f"want {list(want.shape)} as before",
                )
            n_bad = int(np.count_nonzero(~np.isfinite(got)))
            if n_bad:
                raise TechniqueFailed(
                    technique,
                    f"output {name} has {n_bad} of {got.size} values NaN or infinite at batch "
                    f"size {size}",
                )


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
        batch = _first(inputs, size)
        compare_batch(what, size, reference(batch), runner(batch), tolerance)


def compare_batch(
    what: str,
    batch_size: int,
    wanted: Mapping[str, Array],
    given: Mapping[str, Array],
    tolerance: float,
) -> None:
    """Compare two outputs for the same batch. Raises ParityMismatch."""
    for name, want in wanted.items():
        got = given[name]
        allowed = max(tolerance * float(np.abs(want).max(initial=0.0)), _SMALLEST)
        if got.shape == want.shape:
            differences = np.abs(np.subtract(got, want, dtype=np.float64))
            difference = float(differences.max(initial=0.0))
        else:
            difference = math.inf
        if not difference <= allowed:  # NaN too
            raise ParityMismatch(f"{what}, output {name}", batch_size, difference, allowed)


def one_by_one(runner: Runner) -> Runner:
    """Runs each row as a batch of 1."""

    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        n_rows = len(next(iter(batch.values())))
        return _joined(
            [
                runner({name: array[row : row + 1] for name, array in batch.items()})
                for row in range(n_rows)
            ]
        )

    return run


def load_runner(model: Model, max_batch_size: int) -> Runner:
    """The model ready to run, whatever its kind, on one thread."""
    if isinstance(model, TorchModel):
        return _torch_runner(model)
    assert not isinstance(model, StoredTorch), "the builder binds what the store gives"
    if isinstance(model, OnnxModel):
        spec = EngineSpec("onnxruntime", model.file, model.precision)
        return load_engine(model.directory, spec).run
    sizes = fixed_sizes(model.spec.name, batch_sizes(max_batch_size))
    return load_engine(model.directory, model.served(1, 1, sizes)).run


def fixed_sizes(engine: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes to compile for: none where the engine takes any."""
    return tuple(sizes) if engine == "openvino" else ()


def _torch_runner(model: TorchModel) -> Runner:
    import torch

    module, signature = load_torch(model), read_signature(model.source)

    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        arguments = [
            torch.from_numpy(np.ascontiguousarray(batch[name])) for name in signature.input_names
        ]
        with torch.inference_mode():
            outputs = named_outputs(module(*arguments), signature.output_names)
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run


def _first(inputs: Mapping[str, Array], size: int) -> dict[str, Array]:
    return {name: array[:size] for name, array in inputs.items()}


def _joined(rows: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
