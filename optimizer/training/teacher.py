"""The teacher: a network that answers and never learns.

It is in eval mode, sees the very batches that the student sees, and keeps its answers where these
don't change. What is learned from them is the loss's matter.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from optimizer.torch_source import named_outputs
from optimizer.training.batches import Batch
from optimizer.training.features import captured

MAX_KEPT_BYTES = 256 * 1024**2
"""Of answers; more are computed again each time."""
_TOLERANCE = 1e-3
"""Of the largest answer, by which a folded teacher's may differ."""

_FOLDED: Mapping[type, type] = {
    nn.BatchNorm1d: nn.Conv1d, nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm3d: nn.Conv3d,
}  # fmt: skip


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
    """`module` must be nobody else's: it is put in eval mode and its gradients are off.

    Without features its batch normalizations are folded into the convolutions before them, where
    it can be traced and then answers the same: that is a third of a ResNet-56's time."""

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
        self._is_settled = False
        self._is_contiguous = False
        self._kept: torch.Tensor | None = None
        self._is_known = torch.zeros(self._n_rows, dtype=torch.bool)

    def answers(self, batch: Batch) -> Answers:
        """Without gradients."""
        rows = torch.from_numpy(batch.rows)
        if self._kept is not None and bool(self._is_known[rows].all()):
            return Answers(self._kept[rows])
        with torch.no_grad():
            answers = self._answered(batch) if self._is_settled else self._settled(batch)
        self._keep(rows, answers.output)
        return answers

    def _settled(self, batch: Batch) -> Answers:
        """The answers to the first batch, by which it finds out whether it takes inputs as the
        student likes them to lie in memory, and whether it can be folded."""
        try:
            answers = self._answered(batch)
        except RuntimeError:
            self._is_contiguous = True
            answers = self._answered(batch)
        self._is_settled = True
        whole = self.module
        if not self._places:
            self.module = _folded(
                whole, lambda one: self._answer(one, self._like(batch), ()).output
            )
        return answers if self.module is whole else self._answered(batch)

    def _answered(self, batch: Batch) -> Answers:
        return self._answer(self.module, self._like(batch), self._places)

    def _like(self, batch: Batch) -> Batch:
        """As it takes it."""
        if not self._is_contiguous:
            return batch
        return replace(batch, inputs=tuple(one.contiguous() for one in batch.inputs))

    def _keep(self, rows: torch.Tensor, output: torch.Tensor) -> None:
        if self._kept is not None and self._kept.shape[1:] != output.shape[1:]:
            self._kept, self._n_rows = None, 0  # as of texts that are as long as their batch
        n_bytes = self._n_rows * output[0].numel() * output.element_size()
        if not 0 < n_bytes <= MAX_KEPT_BYTES:
            return
        if self._kept is None:
            self._kept = torch.zeros((self._n_rows, *output.shape[1:]))
        self._kept[rows] = output
        self._is_known[rows] = True


def _folded(module: nn.Module, answer: Callable[[nn.Module], torch.Tensor]) -> nn.Module:
    """The module without batch normalizations, or as it is where that can't be or shows."""
    if not any(type(part) in _FOLDED for part in module.modules()):
        return module
    try:
        folded = _without_norms(module)
        with torch.autocast("cpu", enabled=False):
            own, wanted = answer(folded), answer(module)
    except Exception:  # noqa: BLE001  traces fail in as many ways as there are models
        return module
    allowed = _TOLERANCE * max(1.0, float(wanted.abs().max()))
    is_alike = own.shape == wanted.shape and float((own - wanted).abs().max()) <= allowed
    return folded if is_alike else module


def _without_norms(module: nn.Module) -> nn.Module:
    """A copy in which each batch normalization right behind a convolution is folded into it.
    Raises whatever tracing does."""
    traced = fx.symbolic_trace(copy.deepcopy(module))
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        norm: Any = traced.get_submodule(str(node.target))
        convolution: Any = traced.get_submodule(str(before.target))
        if _folds(norm, convolution) and len(before.users) == 1:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _folds(norm: nn.Module, convolution: nn.Module) -> bool:
    return _FOLDED.get(type(norm)) is type(convolution)
