"""Losses: what a student's answers cost, given labels or a teacher's answers.

Pure functions of tensors, each the mean over a batch. What is taken from which module, and how
losses are added up, is `optimizer.training.distillation`'s matter.
"""

import torch
from torch.nn import functional

_SMALL = 1e-8


def soft_targets(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(teacher || student) of the softmax of logits [n, class] / T (Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network", section 2)."""
    given = functional.log_softmax(student / temperature, dim=1)
    wanted = functional.log_softmax(teacher / temperature, dim=1)
    divergence = functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def correlations(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² times what Pearson's correlations of the softmax lack to 1: those over the classes of a
    sample, and those over the samples of a class (Huang et al. 2022, "Knowledge Distillation from
    A Stronger Teacher", equations 8 to 10, with beta and gamma 1)."""
    given = functional.softmax(student / temperature, dim=1)
    wanted = functional.softmax(teacher / temperature, dim=1)
    between_classes = 1 - _pearson(given, wanted).mean()
    between_samples = 1 - _pearson(given.T, wanted.T).mean()
    return (between_classes + between_samples) * temperature**2


def attention(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the maps of activation, each of length 1, of features
    [n, channel, y, x] (Zagoruyko and Komodakis 2017, "Paying More Attention to Attention",
    equation 2, with mean squares over channels and over positions, as their code has it)."""
    return functional.mse_loss(_map(student), _map(teacher))


def hint(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of features, the student's after its projection, relative to the
    teacher's mean square (Romero et al. 2015, "FitNets", equation 3); of layers of one width
    without a projection (Jiao et al. 2020, "TinyBERT", equation 8)."""
    return functional.mse_loss(student, teacher) / (teacher.square().mean() + _SMALL)


def relations(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber distance of the pairwise distances, each in units of their mean, between samples'
    [n, axis] (Park et al. 2019, "Relational Knowledge Distillation", equations 4 to 6); the
    axes may differ. 0 for a single sample."""
    if len(student) < 2:
        return student.sum() * 0
    return functional.smooth_l1_loss(_distances(student), _distances(teacher))


def directions(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """What the cosine of embeddings [n, axis] lacks to 1."""
    return 1 - functional.cosine_similarity(student, teacher, dim=1, eps=_SMALL).mean()


def _pearson(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    one = one - one.mean(dim=1, keepdim=True)
    other = other - other.mean(dim=1, keepdim=True)
    return functional.cosine_similarity(one, other, dim=1, eps=_SMALL)


def _map(features: torch.Tensor) -> torch.Tensor:
    return functional.normalize(features.square().mean(dim=1).flatten(1), dim=1, eps=_SMALL)


def _distances(points: torch.Tensor) -> torch.Tensor:
    """[n, n], over their mean off the diagonal. In fp32: products of bf16 would leave little of the
    difference of near points."""
    with torch.autocast(points.device.type, enabled=False):
        return _mutual(points.float() - points.float().mean(dim=0))


def _mutual(points: torch.Tensor) -> torch.Tensor:
    lengths = points.square().sum(dim=1)
    squares = lengths[:, None] + lengths[None, :] - 2 * points @ points.T
    # A root's slope at 0 is infinite, and rounding may leave less than 0.
    apart = 1 - torch.eye(len(points))
    distances = squares.clamp(min=_SMALL).sqrt() * apart
    return distances / (distances.sum() / apart.sum())
