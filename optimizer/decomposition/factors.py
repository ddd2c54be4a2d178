"""Factors: the weights of a chain, and the ranks that a rule gives a weight tensor.

tensorly does the algebra, on NumPy in float64. It knows weights and forms, not modules.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.decomposition.bounds import consistent
from optimizer.decomposition.ranks import RankRule

Array = NDArray[np.float64]
_N_ITERATIONS = 100
_TOLERANCE = 1e-7
"""Change of the relative error at which the iterations end."""
_DAMPING = 1e-6
"""Added to a second moment, relative to its mean: directions that the samples don't have must
not be divided by 0."""
_LARGEST = float(np.finfo(np.float32).max)


def ranks_of(form: str, weight: Array, rule: RankRule, moment: Array | None = None) -> list[int]:
    """The ranks that the rule gives a weight [out, in, y, x], or a matrix [out, in, 1, 1], lowered
    where they can't be together (`optimizer.decomposition.bounds`).

    Of a CP decomposition it is the larger of Tucker's two, as no unfolding has it. Energy is that
    of the outputs where inputs' second `moment` [in, in] is given. Raises LinAlgError where the
    algebra fails.
    """
    if moment is None or rule.by != "energy":
        unfoldings = _unfoldings(form, weight)
    else:
        unfoldings = [weight.reshape(weight.shape[:2]) @ _root(moment)[0]]
    ranks = [rule.rank(unfolding) for unfolding in unfoldings]
    return consistent(form, weight.shape, [max(ranks)] if form == "cp" else ranks)


def _unfoldings(form: str, weight: Array) -> list[Array]:
    """The matrices that ranks are read from."""
    n_out, n_in, height, _ = weight.shape
    if form in ("tucker", "cp"):
        return [weight.transpose(1, 0, 2, 3).reshape(n_in, -1), weight.reshape(n_out, -1)]
    if form == "tensor_train":
        order = weight.transpose(1, 2, 3, 0)  # [in, y, x, out]
        sides = ((n_in, -1), (n_in * height, -1), (-1, n_out))
        return [order.reshape(side) for side in sides]
    return [weight.reshape(n_out, n_in)]


def factors_of(
    form: str, weight: Array, ranks: Sequence[int], seed: int, moment: Array | None = None
) -> list[Array]:
    """The weights of the chain's links, [out, in / groups, y, x] each, in order.

    A second `moment` [in, in] of the inputs goes with `weighted_svd` alone, which is plain without.
    Raises LinAlgError where the fit fails or its factors are no numbers of float32.
    """
    with np.errstate(all="ignore"):  # what comes of it is looked at here
        if form in ("svd", "weighted_svd"):
            pair = svd(weight.reshape(weight.shape[:2]), ranks[0], moment)
            factors = [one[:, :, None, None] for one in pair]
        else:
            factors = _FACTORS[form](weight, ranks, seed)
        if not all(np.abs(one).max() <= _LARGEST for one in factors):
            raise np.linalg.LinAlgError("the fit's factors aren't finite")
    return factors


def svd(weight: Array, rank: int, moment: Array | None = None) -> tuple[Array, Array]:
    """`first` [rank, in] and `second` [out, rank] whose product is nearest to `weight` [out, in].

    Nearest by the Frobenius norm; with inputs' second `moment` E[x x'] [in, in], by the expected
    squared error of the outputs: the truncated SVD of the weight times the moment's root (Chen et
    al. 2021, "DRONE: Data-aware Low-rank Compression for Large NLP Models", theorem 1).
    """
    root, inverse = _root(moment) if moment is not None else (None, None)
    u, s, v = np.linalg.svd(weight if root is None else weight @ root, full_matrices=False)
    scale = np.sqrt(s[:rank])
    first, second = scale[:, None] * v[:rank], u[:, :rank] * scale
    return (first if inverse is None else first @ inverse), second


def _root(moment: Array) -> tuple[Array, Array]:
    """The symmetric square root of the damped moment, and its inverse."""
    if not np.isfinite(moment).all():
        raise np.linalg.LinAlgError("the second moment of its inputs isn't finite")
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    damped = np.maximum(values, 0) + _DAMPING * max(float(values.mean()), np.finfo(float).tiny)
    root = np.sqrt(damped)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _tucker(weight: Array, ranks: Sequence[int], seed: int) -> list[Array]:
    """Higher-order orthogonal iteration on the two axes of channels (Kim et al. 2016)."""
    n_in, n_out = ranks
    with _numpy_backend():
        from tensorly.decomposition import partial_tucker

        (core, (out, into)), _ = partial_tucker(
            weight, rank=[n_out, n_in], modes=[0, 1], init="svd",
            n_iter_max=_N_ITERATIONS, tol=_TOLERANCE, random_state=seed,
        )  # fmt: skip
    return [into.T[:, :, None, None], core, out[:, :, None, None]]


def _cp(weight: Array, ranks: Sequence[int], seed: int) -> list[Array]:
    """Alternating least squares (Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks
    Using Fine-tuned CP-Decomposition"); each link gets an equal part of a component's norm."""
    (rank,) = ranks
    if rank >= weight.size // max(weight.shape):
        out, into, y, x = _exact_components(weight)
        return [into.T[:, :, None, None], y.T[:, None, :, None], x.T[:, None, None, :],
                out[:, :, None, None]]  # fmt: skip
    with _numpy_backend(), warnings.catch_warnings():
        from tensorly.decomposition import parafac

        # A rank above a side is meant: what the side's SVD lacks is drawn at random.
        warnings.filterwarnings("ignore", "Trying to compute SVD with n_eigenvecs", UserWarning)

        weights, factors = parafac(
            weight, rank, init="svd", n_iter_max=_N_ITERATIONS, tol=_TOLERANCE,
            normalize_factors=True, random_state=seed,
        )  # fmt: skip
    out, into, y, x = (factor * np.abs(weights) ** 0.25 for factor in factors)
    out = out * np.sign(weights)
    return [into.T[:, :, None, None], y.T[:, None, :, None], x.T[:, None, None, :],
            out[:, :, None, None]]  # fmt: skip


def _exact_components(weight: Array) -> list[Array]:
    """At the largest rank: a component for each fibre along the longest axis, unit vectors
    elsewhere. Least squares would only come near it."""
    longest = int(np.argmax(weight.shape))
    rest = [axis for axis in range(weight.ndim) if axis != longest]
    places = np.indices([weight.shape[axis] for axis in rest]).reshape(len(rest), -1)
    factors = {longest: np.moveaxis(weight, longest, 0).reshape(weight.shape[longest], -1)}
    for axis, place in zip(rest, places, strict=True):
        factors[axis] = np.eye(weight.shape[axis])[:, place]
    return [factors[axis] for axis in range(weight.ndim)]


def _tensor_train(weight: Array, ranks: Sequence[int], _seed: int) -> list[Array]:
    """TT-SVD (Oseledets 2011) of the kernel as [in, y, x, out]; nothing in it is random."""
    with _numpy_backend():
        from tensorly.decomposition import tensor_train

        cores = tensor_train(weight.transpose(1, 2, 3, 0), rank=[1, *ranks, 1])
    first, y, x, last = (np.asarray(core) for core in cores)  # [before, side, after] each
    return [
        first[0].T[:, :, None, None],
        y.transpose(2, 0, 1)[:, :, :, None],
        x.transpose(2, 0, 1)[:, :, None, :],
        last[:, :, 0].T[:, :, None, None],
    ]


_FACTORS: Mapping[str, Callable[[Array, Sequence[int], int], list[Array]]] = {
    "tucker": _tucker,
    "cp": _cp,
    "tensor_train": _tensor_train,
}


def _numpy_backend() -> Any:
    """tensorly's backend is one for the process; the user's code may have set another."""
    import tensorly

    return tensorly.backend_context("numpy")
