"""Decomposition: ranks, alone and together, and chains, which are exact at full rank."""

import copy
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import nn

from optimizer.decomposition.bounds import consistent
from optimizer.decomposition.evbmf import evbmf_rank
from optimizer.decomposition.factors import factors_of, ranks_of, svd
from optimizer.decomposition.forms import (
    CONVOLUTIONS,
    Layer,
    chain,
    convolution_geometry,
    linear_geometry,
    links_of,
    max_ranks,
)
from optimizer.decomposition.ranks import RankRule, energy_rank

Matrix = NDArray[np.float64]

# --- ranks


def low_rank(rank: int, noise: float, shape: tuple[int, int] = (30, 80)) -> Matrix:
    rng = np.random.default_rng(rank)
    signal = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    return signal + noise * rng.normal(size=shape)


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (40, 40)])
def test_evbmf_finds_the_rank_when_signal_stands_out_from_noise(
    rank: int, noise: float, shape: tuple[int, int]
) -> None:
    assert evbmf_rank(low_rank(rank, noise, shape)) == rank


def test_evbmf_finds_nothing_when_there_is_only_noise() -> None:
    assert evbmf_rank(low_rank(0, 1.0)) == 0
    assert evbmf_rank(np.zeros((3, 4))) == 0


@pytest.mark.parametrize("noise", [0.3, 2.0, 5.0, 9.0])
def test_evbmf_equals_the_published_algorithm_when_that_is_written_plainly(noise: float) -> None:
    rng = np.random.default_rng(3)
    spectrum = np.geomspace(12, 0.5, 30)  # no gap between signal and noise
    u, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    v, _ = np.linalg.qr(rng.normal(size=(80, 30)))
    matrix = (u * spectrum * 8) @ v.T + noise * rng.normal(size=(30, 80))
    assert evbmf_rank(matrix) == plain_evbmf(matrix)
    assert 0 <= evbmf_rank(matrix) <= 30


def plain_evbmf(matrix: Matrix) -> int:
    """Nakajima et al. 2013, corollary 1 and section 4, sum by sum."""
    n_short, n_long = sorted(matrix.shape)
    singular = np.linalg.svd(matrix, compute_uv=False)
    alpha = n_short / n_long
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)

    def tau(x: float) -> float:
        return 0.5 * (x - (1 + alpha) + math.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha))

    def psi(x: float) -> float:
        value = x - math.log(x)
        if x > x_bar:
            t = tau(x)
            value += math.log(t + 1) + alpha * math.log(t / alpha + 1) - t
        return value

    def omega(variance: float) -> float:
        return sum(psi(s**2 / (n_long * variance)) for s in singular)

    most = min(math.ceil(n_short / (1 + alpha)) - 1, n_short - 1)
    low = max(singular[most] ** 2 / (n_long * x_bar), np.mean(singular[most:] ** 2) / n_long)
    high = float(np.sum(singular**2)) / (n_short * n_long)
    variance = minimize_scalar(omega, bounds=(low, high), method="bounded").x
    return sum(s > math.sqrt(n_long * variance * x_bar) for s in singular)


def test_evbmf_refuses_what_isnt_finite() -> None:
    with pytest.raises(ValueError, match="NaN"):
        evbmf_rank(np.full((2, 2), np.nan))


def test_energy_rank_is_the_fewest_components_that_hold_it() -> None:
    matrix = np.diag([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [energy_rank(matrix, share) for share in (0.5, 0.65, 13 / 14, 0.95, 1.0)] == [
        1, 2, 2, 3, 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        pytest.param(RankRule("share", 0.5), 10, id="half of them"),
        pytest.param(RankRule("share", 0.5, 8), 8, id="the nearest multiple"),
        pytest.param(RankRule("share", 0.01, 8), 8, id="at least one multiple"),
        pytest.param(RankRule("share", 1.0, 8), 20, id="at most the largest rank"),
        pytest.param(RankRule("evbmf", round_to=4), 4, id="EVBMF's 5, rounded"),
    ],
)
def test_rank_is_rounded_within_what_there_is(rule: RankRule, rank: int) -> None:
    assert rule.rank(low_rank(5, 0.1, (20, 50))) == rank


@pytest.mark.parametrize("amount", [0.0, -0.5, 1.5])
def test_rank_rule_refuses_a_share_outside_of_0_to_1(amount: float) -> None:
    with pytest.raises(ValueError, match="want above 0 and at most 1"):
        RankRule("share", amount)


# --- chains


def filled(layer: Layer, form: str, ranks: list[int], moment: Matrix | None = None) -> nn.Module:
    """The layer's chain with its weights."""
    weight = layer.weight.detach().double().numpy()
    weight = weight if weight.ndim == 4 else weight[:, :, None, None]
    parts = chain(layer, "layer", form, ranks)
    for part, factor in zip(parts, factors_of(form, weight, ranks, 0, moment), strict=True):
        assert isinstance(part, nn.Conv2d | nn.Linear)
        part.weight.data.copy_(torch.from_numpy(factor).reshape(part.weight.shape))
    return parts


KERNELS = (
    pytest.param(nn.Conv2d(6, 5, 3, padding=1), id="plain"),
    pytest.param(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1)), id="not square"),
    pytest.param(nn.Conv2d(4, 5, 3, padding="same", bias=False), id="padding same, no bias"),
    pytest.param(nn.Conv2d(4, 5, 3, padding=2, dilation=2, padding_mode="reflect"), id="reflect"),
    pytest.param(nn.Conv2d(3, 4, (1, 3), stride=2), id="flat kernel with a stride"),
)


@pytest.mark.parametrize("conv", KERNELS)
@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_convolution_is_the_same_when_its_ranks_are_full(conv: nn.Conv2d, form: str) -> None:
    ranks = list(max_ranks(convolution_geometry(conv, (1, 1), (1, 1)), form))
    images = torch.randn(2, conv.in_channels, 9, 8, generator=torch.manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            filled(conv, form, ranks)(images), conv(images), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("form", ["svd", "weighted_svd"])
@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Linear(4, 6, bias=False), nn.Conv2d(6, 4, 1, 2, 1)]
)
def test_matrix_is_the_same_when_its_rank_is_full(layer: Layer, form: str) -> None:
    n_in = layer.weight.shape[1]
    rng = np.random.default_rng(0)
    moment = np.diag(rng.uniform(0, 2, n_in)) if form == "weighted_svd" else None
    shape = (2, n_in, 5, 5) if isinstance(layer, nn.Conv2d) else (2, 3, n_in)
    inputs = torch.randn(*shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        made = filled(layer, form, [min(layer.weight.shape[:2])], moment)(inputs)
        torch.testing.assert_close(made, layer(inputs), atol=1e-4, rtol=0)


def test_cp_finds_the_components_when_the_kernel_is_made_of_them() -> None:
    rng = np.random.default_rng(0)
    weight = np.einsum("or,ir,yr,xr->oiyx", *(rng.normal(size=(n, 2)) for n in (6, 5, 3, 3)))
    into, y, x, out = factors_of("cp", weight, [2], seed=0)
    again = np.einsum(
        "ri,ry,rx,or->oiyx", into[:, :, 0, 0], y[:, 0, :, 0], x[:, 0, 0, :], out[:, :, 0, 0]
    )
    np.testing.assert_allclose(again, weight, atol=1e-4)


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_factors_are_equal_when_they_are_made_again(form: str) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 5, 3, 3))
    ranks = {"tucker": [3, 2], "cp": [7], "tensor_train": [3, 4, 2]}[form]
    for one, other in zip(
        factors_of(form, weight, ranks, 1), factors_of(form, weight, ranks, 1), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_weighted_svd_beats_the_plain_one_by_the_error_of_outputs() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 12)) * np.geomspace(5, 0.05, 12)  # few directions matter
    weight = rng.normal(size=(10, 12)) / np.geomspace(5, 0.05, 12)
    moment = inputs.T @ inputs / len(inputs)

    def error(first: Matrix, second: Matrix) -> float:
        return float(np.square(inputs @ (weight - second @ first).T).mean())

    weighted, plain = error(*svd(weight, 4, moment)), error(*svd(weight, 4))
    # Eckart and Young: of the outputs' own spectrum just the tail is lost.
    tail = np.linalg.svd(inputs @ weight.T, compute_uv=False)[4:]
    assert weighted == pytest.approx(np.square(tail).sum() / (400 * 10), rel=1e-3)
    assert weighted < 0.7 * plain


def test_ranks_of_a_weighted_matrix_count_the_energy_of_outputs() -> None:
    weight = np.eye(4)[:, :, None, None]
    rule = RankRule("energy", 0.9)
    assert ranks_of("svd", weight, rule) == [4]
    assert ranks_of("weighted_svd", weight, rule, np.diag([100.0, 1.0, 1.0, 1.0])) == [1]


@pytest.mark.parametrize(
    ("form", "ranks", "message"),
    [
        pytest.param("tucker", [4, 9], r"layer: got the rank 9, want 1 to 8", id="above"),
        pytest.param("tucker", [0, 4], r"layer: got the rank 0, want 1 to 4", id="below"),
        pytest.param("cp", [4, 4], "layer: got 2 ranks, cp has 1", id="too many"),
        pytest.param("tensor_train", [4, 99, 4], "want 1 to 12", id="in the middle"),
        pytest.param(
            "tensor_train",
            [2, 12, 4],
            r"layer: got the rank 12 among \[2, 12, 4\], want at most 6 beside the others",
            id="above what the rank before it spans",
        ),
        pytest.param(
            "tensor_train",
            [4, 8, 2],
            r"got the rank 8 among \[4, 8, 2\], want at most 6",
            id="above what the rank behind it spans",
        ),
        pytest.param(
            "tensor_train",
            [4, 1, 4],
            r"got the rank 4 among \[4, 1, 4\], want at most 3",
            id="above what the middle spans",
        ),
    ],
)
def test_chain_refuses_ranks_that_cant_be(form: str, ranks: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain(nn.Conv2d(4, 8, 3), "layer", form, ranks)


def test_cost_counts_the_links_where_each_of_them_runs() -> None:
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    geometry = convolution_geometry(conv, (10, 10), (5, 5))
    assert (geometry.cost.macs, geometry.cost.weights) == (4 * 8 * 9 * 25, 4 * 8 * 9)
    tucker = geometry.cost_of(links_of("layer", geometry, "tucker", [2, 3]))
    assert tucker.macs == 4 * 2 * 100 + 2 * 3 * 9 * 25 + 3 * 8 * 25
    assert tucker.weights == 4 * 2 + 2 * 3 * 9 + 3 * 8
    cp = geometry.cost_of(links_of("layer", geometry, "cp", [5]))
    assert cp.macs == 4 * 5 * 100 + 5 * 3 * 50 + 5 * 3 * 25 + 5 * 8 * 25
    linear = linear_geometry(nn.Linear(6, 5), 7)
    assert linear.cost_of(links_of("layer", linear, "svd", [2])).macs == 7 * (6 * 2 + 2 * 5)


def test_chain_refuses_ranks_of_tucker_that_the_kernel_cant_join() -> None:
    with pytest.raises(ValueError, match=r"got the rank 30 among \[8, 30\], want at most 24 "):
        chain(nn.Conv2d(16, 40, (1, 3)), "layer", "tucker", [8, 30])


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("tensor_train", (4, 3, 2, 2)),
        ("tensor_train", (2, 5, 1, 3)),
        ("tucker", (5, 2, 1, 2)),
        ("tucker", (2, 7, 2, 1)),
    ],
)
def test_consistent_ranks_are_the_largest_when_all_below_are_tried(
    form: str, shape: tuple[int, ...]
) -> None:
    """Ranks can be together if a factorization of drawn weights has them: its unfoldings are
    looked at one by one."""
    for ranks in itertools.product(range(1, 7), repeat=3 if form == "tensor_train" else 2):
        below = itertools.product(*(range(1, rank + 1) for rank in ranks))
        possible = [one for one in below if can_be(form, shape, one)]
        found = consistent(form, shape, ranks)
        assert tuple(found) in possible
        assert all(np.all(np.array(one) <= found) for one in possible)


def can_be(form: str, shape: Sequence[int], ranks: Sequence[int]) -> bool:
    """Whether a tensor of that shape can have exactly these ranks: each unfolding of one that is
    drawn with them."""
    rng = np.random.default_rng(0)
    n_out, n_in, height, width = shape
    if form == "tucker":
        first, last = ranks
        core = rng.normal(size=(last, first, height, width))
        into, out = rng.normal(size=(first, n_in)), rng.normal(size=(last, n_out))
        weight = np.einsum("bayx,ai,bo->oiyx", core, into, out)
        unfoldings = [weight.transpose(1, 0, 2, 3).reshape(n_in, -1), weight.reshape(n_out, -1)]
    else:
        sides = [n_in, height, width, n_out]
        around = [1, *ranks, 1]
        cores = [rng.normal(size=(around[k], sides[k], around[k + 1])) for k in range(4)]
        weight = np.einsum("aib,byc,cxd,doe->iyxo", *cores)
        unfoldings = [weight.reshape(math.prod(sides[:k]), -1) for k in (1, 2, 3)]
    return [int(np.linalg.matrix_rank(one)) for one in unfoldings] == list(ranks)


@pytest.mark.parametrize(
    ("form", "conv", "rule", "ranks"),
    [
        pytest.param(
            "tensor_train", nn.Conv2d(16, 16, 3), RankRule("share", 0.625, 8), [8, 24, 8],
            id="a tensor train's, rounded apart",
        ),
        pytest.param(
            "tucker", nn.Conv2d(20, 64, (1, 3)), RankRule("share", 0.55, 8), [8, 24],
            id="Tucker's of a flat kernel",
        ),
    ],
)  # fmt: skip
def test_ranks_are_lowered_when_they_cant_be_together(
    form: str, conv: nn.Conv2d, rule: RankRule, ranks: list[int]
) -> None:
    weight = conv.weight.detach().double().numpy()
    assert ranks_of(form, weight, rule) == ranks
    filled(conv, form, ranks)


def test_ranks_of_evbmf_make_a_chain_when_signal_is_uneven() -> None:
    """The middle has more of it than its neighbours span."""
    conv = nn.Conv2d(64, 64, 3)
    rng = np.random.default_rng(1)
    cores = [rng.normal(size=size) for size in ((64, 8), (8, 3, 32), (32, 3, 24), (24, 64))]
    weight = np.einsum("ia,ayb,bxc,co->oiyx", *cores)
    conv.weight.data.copy_(torch.from_numpy(weight))
    assert consistent("tensor_train", weight.shape, [8, 32, 24]) == [8, 24, 24]
    for rule in (RankRule("evbmf", 1.0, 8), RankRule("energy", 0.9, 8)):
        filled(conv, "tensor_train", ranks_of("tensor_train", weight, rule))


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_factors_are_finite_or_refused_when_channels_are_zeros(form: str) -> None:
    weight = np.random.default_rng(0).normal(size=(16, 16, 3, 3))
    weight[:12], weight[:, :12] = 0, 0
    ranks = {"tucker": [8, 8], "tensor_train": [8, 16, 8], "cp": [8]}[form]
    if form == "cp":
        with pytest.raises(np.linalg.LinAlgError):
            factors_of(form, weight, ranks, 0)
    else:
        assert all(np.isfinite(one).all() for one in factors_of(form, weight, ranks, 0))


@pytest.mark.parametrize("form", ["tucker", "tensor_train"])
def test_factors_of_zeros_are_finite_and_make_zeros(form: str) -> None:
    ranks = {"tucker": [8, 8], "tensor_train": [8, 16, 8]}[form]
    factors = factors_of(form, np.zeros((16, 16, 3, 3)), ranks, 0)
    assert all(np.isfinite(one).all() for one in factors)
    assert not all(one.any() for one in factors)


def test_fit_fails_when_the_moment_of_inputs_is_not_finite() -> None:
    weight, moment = np.eye(4)[:, :, None, None], np.full((4, 4), np.inf)
    for make in (
        lambda: factors_of("weighted_svd", weight, [2], 0, moment),
        lambda: ranks_of("weighted_svd", weight, RankRule("energy", 0.9), moment),
    ):
        with pytest.raises(np.linalg.LinAlgError, match="second moment of its inputs"):
            make()


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3), nn.Linear(8, 8)])
def test_chain_is_frozen_when_its_layer_is_and_draws_nothing(
    layer: Layer, is_trained: bool
) -> None:
    layer = copy.deepcopy(layer).double()
    layer.weight.requires_grad_(is_trained)
    before = torch.random.get_rng_state()
    form, ranks = ("tucker", [2, 3]) if isinstance(layer, nn.Conv2d) else ("svd", [2])
    parts = chain(layer, "layer", form, ranks)
    assert torch.equal(torch.random.get_rng_state(), before)
    last = parts[-1]
    assert last.bias is layer.bias
    assert [p.requires_grad for name, p in parts.named_parameters() if "weight" in name] == [
        is_trained
    ] * len(parts)
    assert all(
        p.dtype == torch.float64 and not p.any()
        for name, p in parts.named_parameters()
        if "weight" in name
    )
