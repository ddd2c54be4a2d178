"""A model version ready to answer: its checks of requests, what the batcher runs of them, and the
tensors of their answers. It knows neither how it was loaded nor who asks.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from loadtest.slo import Slo
from serve.artifact import Manifest
from serve.batch_policy import Entry
from serve.batcher import Batcher, Work
from serve.classification import classify
from serve.engines import Engine
from serve.errors import InvalidRequest
from serve.messages import InferRequest
from serve.padding import Padding
from serve.tensor import NUMPY_DTYPES, Array, Tensor, TensorSpec
from serve.transform import Transform


class Model:
    """One loaded version. Made by `serve.loading`; `close` ends it after what it admitted.

    `signature` is the client's side: that of the engine, but for what the manifest's transform
    makes. `n_leases` counts the requests that are at work with it, kept by the service.
    """

    def __init__(
        self,
        manifest: Manifest,
        directory: Path,
        engines: list[Engine],
        batcher: Batcher,
        slo: Slo | None,
        transform: Transform | None = None,
        labels: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.manifest = manifest
        self.directory = directory
        self.engine_signature = engines[0].signature
        self.signature = transform.signature if transform else manifest.signature
        self.batcher = batcher
        self.slo = slo
        self.transform = transform
        self.n_leases = 0
        self._engines = engines
        self._labels = labels or {}
        self._inputs = {spec.name: spec for spec in self.signature.inputs}
        self._outputs = {spec.name: spec for spec in self.signature.outputs}
        self._optional = {manifest.padding.mask} if manifest.padding else set()
        self._shapes_vary = any(-1 in spec.shape[1:] for spec in self.engine_signature.inputs)

    @property
    def platform(self) -> str:
        return f"{self.manifest.engine.name}_{Path(self.manifest.engine.file).suffix[1:]}"

    @property
    def max_batch_size(self) -> int:
        """0 where the model has no batch dimension."""
        return self.manifest.batching.max_batch_size

    def labels(self, output: str) -> tuple[str, ...]:
        """The names of an output's classes; empty where it has none."""
        given = self._labels.get(output, ())
        return given or (self.transform.labels(output) if self.transform else ())

    def checked_inputs(self, request: InferRequest) -> dict[str, Array]:
        """The request's arrays by input, in the signature's order.

        Raises InvalidRequest, which names the field, what was given and what is allowed.
        """
        self._check_outputs(request)
        given: dict[str, Array] = {}
        for tensor in request.inputs:
            spec = self._inputs.get(tensor.name)
            if spec is None:
                raise InvalidRequest(
                    "inputs.name", tensor.name, f"one of {', '.join(self._inputs)}"
                )
            if tensor.name in given:
                raise InvalidRequest("inputs.name", tensor.name, "each input once")
            _check_fit(tensor.name, tensor.datatype, tensor.shape, spec)
            given[tensor.name] = tensor.array
        missing = [n for n in self._inputs if n not in given and n not in self._optional]
        if missing:
            raise InvalidRequest("inputs", list(given), f"also {', '.join(missing)}")
        return {name: given[name] for name in self._inputs if name in given}

    def check_declared(self, name: str, datatype: str, shape: Sequence[int]) -> None:
        """Raise InvalidRequest where an input of that name, datatype and shape can't be one of the
        model's: before its data, however large, are decoded."""
        spec = self._inputs.get(name)
        if spec is None:
            raise InvalidRequest("inputs.name", name, f"one of {', '.join(self._inputs)}")
        _check_fit(name, datatype, tuple(shape), spec)
        if self.max_batch_size:
            self._check_rows(name, shape)

    def n_rows(self, inputs: Mapping[str, Array]) -> int:
        """Rows of a request: the length of its batch dimension, 1 where there is none."""
        if not self.max_batch_size:
            return 1
        first = next(iter(inputs))
        n_rows: int = inputs[first].shape[0]
        for array in inputs.values():
            if array.shape[0] != n_rows:
                rows = {name: other.shape[0] for name, other in inputs.items()}
                raise InvalidRequest("inputs.shape", rows, "equal batch dimensions")
        self._check_rows(first, inputs[first].shape)
        return n_rows

    def entries(
        self, inputs: Mapping[str, Array], n_rows: int, arrival_s: float, deadline_s: float
    ) -> list[Entry[Work]]:
        """What the batcher runs for a request with the engine's `inputs`: one entry, or several
        where it has more rows than a batch. Raises InvalidRequest where lengths don't fit."""
        threshold_s = self.slo.latency.threshold_s if self.slo else math.inf
        length = 0
        lane: Hashable = None
        padding = self.manifest.padding
        if padding is not None:
            inputs = self._with_mask(padding, inputs, n_rows)
            length = padding.length_of(inputs)
            lane = padding.bucket_of(length)
        elif self._shapes_vary:
            lane = tuple(array.shape[1:] for array in inputs.values())
        return [
            Entry(
                Work(part, rows, None, length),
                rows,
                arrival_s,
                target_s=arrival_s + threshold_s,
                deadline_s=deadline_s,
                lane=lane,
            )
            for part, rows in _pieces(inputs, n_rows, self.max_batch_size or 1)
        ]

    def tensors(self, request: InferRequest, arrays: Mapping[str, Array]) -> tuple[Tensor, ...]:
        """The requested output tensors, in the order asked for, or their best classes."""
        names = tuple(self._outputs) if request.outputs is None else request.outputs
        return tuple(self._tensor(name, request, arrays[name]) for name in names)

    def close(self, finish: bool = True) -> None:
        """End it, after what it admitted or, without `finish`, after what runs."""
        self.batcher.close(finish)
        for engine in self._engines:
            engine.close()

    def _tensor(self, name: str, request: InferRequest, array: Array) -> Tensor:
        k = request.classification.get(name)
        if k is None:
            return Tensor(name, self._outputs[name].datatype, array)
        classes = classify(name, array, k, self.labels(name), batched=self.max_batch_size > 0)
        return Tensor(name, "BYTES", classes)

    def _with_mask(
        self, padding: Padding, inputs: Mapping[str, Array], n_rows: int
    ) -> Mapping[str, Array]:
        """`inputs` with the mask that says that all of them is real, where the request has none."""
        if padding.mask is None or padding.mask in inputs:
            return inputs
        length = padding.length_of(inputs)
        spec = next(s for s in self.engine_signature.inputs if s.name == padding.mask)
        mask = np.ones((n_rows, length), NUMPY_DTYPES[spec.datatype])
        return {**inputs, padding.mask: mask}

    def _check_rows(self, name: str, shape: Sequence[int]) -> None:
        limit = self.max_batch_size
        if self.manifest.batching.oversize == "split":
            limit *= self.manifest.batching.max_queue_size
        if not 1 <= shape[0] <= limit:
            raise InvalidRequest(f"inputs.{name}.shape", list(shape), f"a batch of 1 to {limit}")

    def _check_outputs(self, request: InferRequest) -> None:
        for name in request.outputs or ():
            if name not in self._outputs:
                raise InvalidRequest("outputs.name", name, f"one of {', '.join(self._outputs)}")
        if request.outputs is not None and len(set(request.outputs)) != len(request.outputs):
            raise InvalidRequest("outputs", list(request.outputs), "each output once")


def _check_fit(name: str, datatype: str, shape: tuple[int, ...], spec: TensorSpec) -> None:
    if datatype != spec.datatype:
        raise InvalidRequest(f"inputs.{name}.datatype", datatype, spec.datatype)
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, got) for got, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(f"inputs.{name}.shape", list(shape), f"{list(spec.shape)}, -1 for any")


def _pieces(
    inputs: Mapping[str, Array], n_rows: int, limit: int
) -> list[tuple[Mapping[str, Array], int]]:
    """The inputs in pieces of at most `limit` rows, with the rows of each."""
    if n_rows <= limit:
        return [(inputs, n_rows)]
    return [
        (
            {name: array[start : start + limit] for name, array in inputs.items()},
            min(limit, n_rows - start),
        )
        for start in range(0, n_rows, limit)
    ]
