"""Judging: what a network of a space is worth, on a part of train that no weight has seen.

Neither validation nor test is looked at: they are for the variants that come of the search.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from optimizer.quantization.histogram import NotFinite
from optimizer.quantization.qdq import Arithmetic
from optimizer.torch_source import named_outputs
from optimizer.training.batches import Batch, Batches, Rows
from optimizer.training.fake_quantization import fake_quantized
from optimizer.training.recalibration import recalibrate

MAX_HELD_OUT = 2000
_SHARE = 10
"""One sample in so many is held out."""
N_RECALIBRATED = 512
N_OBSERVED = 256
"""Samples that an int8 network's ranges of activations are taken from."""
_BATCH = 128


@dataclass(frozen=True, eq=False)
class Part(Batches):
    """Some rows of a split, counted from 0."""

    of: Batches
    chosen: Rows

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, rows: Rows) -> Batch:
        """With the rows' numbers in the whole split."""
        return self.of.read(self.chosen[rows])


def parted(data: Batches, seed: int) -> tuple[Part, Part]:
    """What is learned from, and what is held out: a tenth, at most 2,000. Raises ValueError for
    fewer than two samples."""
    n = len(data)
    if n < 2:
        raise ValueError(f"got {n} training samples, want at least 2")
    order = np.random.default_rng([seed, n]).permutation(n)
    n_held = min(max(1, n // _SHARE), MAX_HELD_OUT)
    names = data.input_names
    return (
        Part(data.split, names, data, order[n_held:]),
        Part(data.split, names, data, order[:n_held]),
    )


@dataclass(frozen=True, eq=False)
class Judge:
    """`base` is the model whose place it is about; `learns` what its output is: classes, an
    embedding, or values."""

    base: nn.Module
    learned: Part
    held_out: Part
    output_names: tuple[str, ...]
    output: str
    learns: str

    def __call__(self, network: nn.Module, rounding: Arithmetic | None = None) -> float:
        """Between 0 and 1, more is better: the share of labels that are right; without labels that
        of samples whose class is the base's, the mean cosine to its embeddings (from 0), or the
        share of its values' variance that is explained (from 0). Batch normalization's statistics
        are taken anew first; else the network is left as it is.

        With `rounding` it is what the network comes to in 8 bits by that, fake-quantized after it;
        0 for one whose activations aren't finite."""
        rows = np.arange(len(self.learned))[:N_RECALIBRATED]
        recalibrate(network, self.learned.each(rows, _BATCH, whole=True))
        if rounding is None:
            return self._quality(self._outputs(network))
        observed = self.learned.each(rows[:N_OBSERVED], _BATCH)
        try:
            with fake_quantized(network, observed, rounding):
                return self._quality(self._outputs(network))
        except NotFinite:
            return 0.0

    def _quality(self, given: torch.Tensor) -> float:
        """Of outputs [sample, ...] for what is held out."""
        if self.learns == "classes":
            labels = self._labels
            wanted = self._base_outputs.argmax(1) if labels is None else labels
            return float((given.argmax(1) == wanted).double().mean())
        if self.learns == "embedding":
            cosines = functional.cosine_similarity(given, self._base_outputs)
            return max(0.0, float(cosines.double().mean()))
        error = (given - self._base_outputs).square().mean() / self._base_outputs.var()
        return max(0.0, 1 - float(error))

    @cached_property
    def _batches(self) -> list[Batch]:
        return list(self.held_out.each(np.arange(len(self.held_out)), _BATCH))

    @cached_property
    def _labels(self) -> torch.Tensor | None:
        labels = [batch.labels for batch in self._batches]
        known = [one for one in labels if one is not None]
        return torch.cat(known) if len(known) == len(labels) else None

    @cached_property
    def _base_outputs(self) -> torch.Tensor:
        return self._outputs(self.base)

    def _outputs(self, network: nn.Module) -> torch.Tensor:
        network.eval()
        with torch.inference_mode():
            found = [
                named_outputs(network(*batch.inputs), self.output_names)[self.output]
                for batch in self._batches
            ]
        return torch.cat(found).clone()


Judging = Callable[[nn.Module], float]
