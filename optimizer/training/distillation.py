"""Distillation: the loss of a student that learns from labels, from a teacher, or from both.

alpha x CE + (1 - alpha) x what the answers differ by, and for some losses what features or
relations differ by. It is one loss that the loop can be given; it knows no optimizer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from optimizer.training import losses
from optimizer.training.batches import Batch
from optimizer.training.features import Places
from optimizer.training.teacher import Answering, Answers, Teacher

Kind = Literal["classes", "embedding", "values"]
LOSSES = ("answers", "dist", "attention", "feature", "hidden", "relational")
"""What answers differ by; for classes correlations in its place; or that and a further term."""
NEED_FEATURES = frozenset({"attention", "feature", "hidden"})
# Weights of the further terms, as Tian et al. 2020 ("Contrastive Representation Distillation",
# appendix) use them for attention, and Park et al. 2019 for distances; features are measured
# relative to the teacher's here, so theirs is 1.
_WEIGHTS = {"attention": 1000.0, "feature": 1.0, "hidden": 1.0, "relational": 25.0}


@dataclass(frozen=True)
class Mixture:
    """What is mixed. Answers differ by KL for `classes`, by the cosine for an `embedding`, by
    their squares for other `values`; `loss` is one of `LOSSES`, `dist` for classes alone. Without
    labels `alpha` is 0; at 1 only labels and further terms count. `temperature` is that of the
    softmax."""

    kind: Kind = "classes"
    loss: str = "answers"
    alpha: float = 0.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"got alpha {self.alpha}, want 0 to 1")
        if self.loss not in LOSSES or (self.loss == "dist" and self.kind != "classes"):
            allowed = [one for one in LOSSES if one != "dist" or self.kind == "classes"]
            raise ValueError(f"got the loss {self.loss} for {self.kind}, want {', '.join(allowed)}")
        if not self.temperature > 0:
            raise ValueError(f"got temperature {self.temperature}, want above 0")

    @property
    def needs_teacher(self) -> bool:
        return self.alpha < 1 or self.loss in _WEIGHTS


class Distillation:
    """The loss of a batch, with the projections that it learns beside the student."""

    def __init__(
        self,
        mixture: Mixture,
        answer: Answering,
        teacher: Teacher | None,
        places: Places | None = None,
    ) -> None:
        """Without a `teacher` only labels count; `places` are for losses that need features."""
        if mixture.needs_teacher and teacher is None:
            raise ValueError(f"got alpha {mixture.alpha} without a teacher, want 1")
        if mixture.loss in NEED_FEATURES and places is None:
            raise ValueError(f"got no places of features, {mixture.loss} needs them")
        self._mixture = mixture
        self._answer = answer
        self._teacher = teacher
        self._places = places.student if places and mixture.loss in NEED_FEATURES else ()
        projected = places.channels if places and mixture.loss == "feature" else ()
        self._projections = nn.ModuleList(
            nn.Conv2d(own, wanted, 1, bias=False) for own, wanted in projected
        )

    def parameters(self) -> Iterable[nn.Parameter]:
        """Learned beside the student's."""
        return self._projections.parameters()

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Raises ValueError where labels are missing or shapes don't fit."""
        return self.of(self._answer(module, batch, self._places), batch)

    def of(self, student: Answers, batch: Batch) -> torch.Tensor:
        """The loss of a student's answers to the batch."""
        mixture = self._mixture
        total = torch.zeros(())
        if mixture.alpha > 0:
            total = total + mixture.alpha * _labelled(student.output, batch.labels)
        if self._teacher is None or not mixture.needs_teacher:
            return total
        teacher = self._teacher.answers(batch)
        _check_shapes(student.output, teacher.output)
        if mixture.alpha < 1:
            total = total + (1 - mixture.alpha) * difference(
                mixture, student.output, teacher.output
            )
        if mixture.loss in _WEIGHTS:
            total = total + _WEIGHTS[mixture.loss] * self._further(student, teacher, batch)
        return total

    def _further(self, student: Answers, teacher: Answers, batch: Batch) -> torch.Tensor:
        if self._mixture.loss == "relational":
            return losses.relations(student.output, teacher.output)
        pairs = list(zip(student.features, teacher.features, strict=True))
        if self._mixture.loss == "attention":
            terms = [losses.attention(own, wanted) for own, wanted in pairs]
        elif self._mixture.loss == "hidden":
            terms = [
                losses.hint(batch.unpadded(_tokens(own)), batch.unpadded(_tokens(wanted)))
                for own, wanted in pairs
            ]
        else:
            terms = [
                losses.hint(batch.unpadded(_tokens(project(own))), batch.unpadded(_tokens(wanted)))
                for project, (own, wanted) in zip(self._projections, pairs, strict=True)
            ]
        return torch.stack(terms).mean()


def _tokens(features: torch.Tensor) -> torch.Tensor:
    """[n, length, channel] of a map of one column, as tokens' features come; others as they
    are."""
    return features.squeeze(-1).transpose(1, 2) if features.shape[-1] == 1 else features


def difference(mixture: Mixture, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """What the outputs differ by, as the mixture has it."""
    if mixture.kind == "embedding":
        return losses.directions(student, teacher)
    if mixture.kind == "values":
        return losses.hint(student, teacher)
    if mixture.loss == "dist":
        return losses.correlations(student, teacher, mixture.temperature)
    return losses.soft_targets(student, teacher, mixture.temperature)


def _labelled(output: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    if labels is None:
        raise ValueError("got data without labels, and alpha above 0 needs them: want alpha 0")
    n_classes = output.shape[1]
    wrong = labels[(labels < 0) | (labels >= n_classes)]
    if len(wrong):
        raise ValueError(f"got the label {int(wrong[0])}, want 0 to {n_classes - 1}, a class each")
    return functional.cross_entropy(output, labels)


def _check_shapes(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape != teacher.shape:
        own, wanted = _shown(student.shape[1:]), _shown(teacher.shape[1:])
        raise ValueError(
            f"the student gives {own} values a sample, the teacher {wanted}: want the same classes "
            "or axes"
        )


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"
