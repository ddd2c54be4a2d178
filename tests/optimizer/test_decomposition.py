"""Decomposition: ranks, chains that are exact at full rank, and which layers are replaced."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import nn

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
from optimizer.decomposition.moments import second_moments
from optimizer.decomposition.ranks import RankRule, energy_rank
from optimizer.decomposition.sites import Sites, sites_of
from optimizer.parity import load_runner
from optimizer.space import defaults
from optimizer.techniques.decomposition import Decomposition
from optimizer.torch_variant import load_torch, read_plan
from tests.optimizer.torch_bench import TorchBench, make_torch_bench

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


# --- sites


class Odd(nn.Module):
    """Layers that can't be replaced, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.unused = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.line = nn.Conv1d(8, 8, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.twin(self.tied(self.plain(tokens)))
        tokens, _ = self.attention(tokens, tokens, tokens)
        tokens = self.line(tokens.transpose(1, 2)).transpose(1, 2)
        return self.grouped(tokens.transpose(1, 2).unsqueeze(-1)).sum(dim=(2, 3))


def odd_sites() -> Sites:
    return sites_of(Odd().eval(), [torch.zeros(2, 3, 8)])


def test_sites_are_refused_with_the_reason_when_a_chain_cant_take_their_place() -> None:
    sites = odd_sites()
    assert [site.name for site in sites.found] == ["plain"]
    assert sites.found[0].geometry.output_size == (1, 3)
    assert sites.refused == {
        "grouped": "it is grouped (8 groups), so its kernels are small",
        "unused": "it doesn't run as a layer",
        "tied": "its weights are shared with another layer",
        "twin": "its weights are shared with another layer",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear",
        "line": "it is a Conv1d",
    }


def test_sites_of_a_layer_that_is_the_whole_model_are_none() -> None:
    assert "" in sites_of(nn.Linear(4, 4).eval(), [torch.zeros(1, 4)]).refused


def test_second_moments_are_those_of_the_inputs() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 4, 2)).eval()
    images = torch.randn(6, 3, 2, 2, generator=torch.manual_seed(0))
    sites = sites_of(module, [images[:1]])
    moments = second_moments(module, sites.matrices, [[images[:4]], [images[4:]]])
    pixels = images.double().permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    np.testing.assert_allclose(moments["0"], pixels.T @ pixels / len(pixels), atol=1e-6)
    hidden = module[:2](images).detach().double().numpy()
    np.testing.assert_allclose(moments["2"], hidden.T @ hidden / 6, atol=1e-6)


# --- the technique


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    return make_torch_bench(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize("form", CONVOLUTIONS)
@pytest.mark.parametrize("rank_by", ["evbmf", "share"])
def test_decomposition_replaces_what_gets_cheaper_and_loads_as_it_was_made(
    form: str, rank_by: str, bench: TorchBench, tmp_path: Path
) -> None:
    technique = Decomposition()
    parameters = defaults(technique.space(bench.torch, bench.context), form=form, rank_by=rank_by)
    made = technique.apply(bench.torch, parameters, bench.context, tmp_path)
    (step,) = read_plan(made).steps
    # The first convolution has one channel, the last layer four classes: neither gets cheaper.
    assert list(step.operations) == ["3"]
    assert made.notes == ("1 of 3 layers decomposed",)
    assert isinstance(load_torch(made).get_submodule("3"), nn.Sequential)
    (logits,) = load_runner(made, 8)(bench.inputs).values()
    assert logits.shape == (8, 4)


def test_decomposition_fails_by_name_when_no_layer_gets_cheaper(
    bench: TorchBench, tmp_path: Path
) -> None:
    technique = Decomposition()
    # Weights that were drawn have no small components to leave out.
    parameters = defaults(technique.space(bench.torch, bench.context), rank_by="energy")
    with pytest.raises(ValueError, match="no layer gets cheaper by these ranks"):
        technique.apply(bench.torch, parameters, bench.context, tmp_path)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        pytest.param(
            "nn.Sequential(nn.Flatten(), nn.ReLU())", "no linear layer and no convolution",
            id="no layers",
        ),
        pytest.param(
            "nn.Sequential(nn.Flatten(), nn.Linear(64, 4))", "no layer gets cheaper", id="small"
        ),
    ],
)  # fmt: skip
def test_decomposition_refuses_with_a_reason_when_it_has_nothing_to_do(
    network: str, reason: str, tmp_path: Path
) -> None:
    bench = make_torch_bench(tmp_path, network)
    refused = Decomposition().check(bench.torch, bench.context)
    assert refused is not None
    assert reason in refused


def test_decomposition_cant_be_replayed_on_another_layer(bench: TorchBench) -> None:
    plan = {"1": {"form": "tucker", "ranks": [1, 1]}}
    with pytest.raises(ValueError, match="1: got a BatchNorm2d, want Conv2d or Linear"):
        Decomposition().restructure(load_torch(bench.torch), plan)
