"""The teacher: a network that answers and never learns.

It is in eval mode, sees the very batches that the student sees, and keeps its answers where these
don't change. What is learned from them is the loss's matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from optimizer.torch_source import named_outputs
from optimizer.training.batches import Batch
from optimizer.training.features import captured

MAX_KEPT_BYTES = 256 * 1024**2
"""Of answers; more are computed again each time."""


@dataclass(frozen=True, eq=False)
class Answers:
    """`output` [n, class or axis]; `features` [n, channel, y, x] at the places asked for."""

    output: torch.Tensor
    features: tuple[torch.Tensor, ...] = ()


Answering = Callable[[nn.Module, Batch, Sequence[str]], Answers]
"""Runs a module on a batch, with features at the modules of these names."""


def answering(output_names: Sequence[str], output: str) -> Answering:
    """Of models with these outputs, of which `output` is learned."""

    def answer(module: nn.Module, batch: Batch, places: Sequence[str]) -> Answers:
        with captured(module, places) as found:
            outputs = named_outputs(module(*batch.inputs), output_names)
        return Answers(outputs[output].float(), tuple(found[place].float() for place in places))

    return answer


class Teacher:
    """`module` must be nobody else's: it is put in eval mode and its gradients are off."""

    def __init__(
        self,
        module: nn.Module,
        answer: Answering,
        places: Sequence[str] = (),
        n_rows: int = 0,
    ) -> None:
        """`n_rows` of the split whose rows are always seen in the same view, so that answers can
        be kept; 0 where augmentation changes them. Features aren't kept."""
        self.module = module.eval().requires_grad_(False)
        self._answer = answer
        self._places = tuple(places)
        self._n_rows = 0 if places else n_rows
        self._kept: torch.Tensor | None = None
        self._is_known = torch.zeros(self._n_rows, dtype=torch.bool)

    def answers(self, batch: Batch) -> Answers:
        """Without gradients."""
        rows = torch.from_numpy(batch.rows)
        if self._kept is not None and bool(self._is_known[rows].all()):
            return Answers(self._kept[rows])
        with torch.no_grad():
            answers = self._answer(self.module, batch, self._places)
        self._keep(rows, answers.output)
        return answers

    def _keep(self, rows: torch.Tensor, output: torch.Tensor) -> None:
        n_bytes = self._n_rows * output[0].numel() * output.element_size()
        if not 0 < n_bytes <= MAX_KEPT_BYTES:
            return
        if self._kept is None:
            self._kept = torch.zeros((self._n_rows, *output.shape[1:]))
        self._kept[rows] = output
        self._is_known[rows] = True
