"""Decomposition: which layers can be replaced, and which the technique replaces."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.decomposition.forms import CONVOLUTIONS
from optimizer.decomposition.moments import second_moments
from optimizer.decomposition.sites import Sites, sites_of
from optimizer.model_source import source_digest
from optimizer.parity import load_runner
from optimizer.space import defaults
from optimizer.spec import ModuleSource
from optimizer.techniques.decomposition import Decomposition
from optimizer.torch_variant import load_torch, read_plan
from optimizer.variant import TorchModel, TorchVariant
from tests.optimizer.torch_bench import TorchBench, make_torch_bench

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


class Reading(nn.Module):
    """Layers of which more is asked than a call, and one that is only called."""

    def __init__(self, wants_a_layer: bool = False) -> None:
        super().__init__()
        self.plain, self.read, self.past = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.known = [self.past]
        self.wanted = nn.Linear(8, 8)
        self.wants_a_layer = wants_a_layer

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self.plain(rows).to(self.read.weight.dtype)
        if getattr(self.plain, "scale", None) is not None:
            raise RuntimeError("no layer has one")
        if self.wants_a_layer and not isinstance(self.wanted, nn.Linear):
            raise TypeError("want a Linear")
        return self.wanted(self.known[0](self.read(rows)))


def test_sites_are_refused_when_the_model_asks_more_of_a_layer_than_a_call() -> None:
    module = Reading().eval()
    layers = dict(module.named_children())
    sites = sites_of(module, [torch.zeros(2, 8)])
    assert [site.name for site in sites.found] == ["plain", "wanted"]
    assert sites.refused == {
        "read": "the model reads its weight past the call",
        "past": "the model calls it past its name",
    }
    assert dict(module.named_children()) == layers


def test_sites_are_tried_alone_when_the_model_fails_without_them_all() -> None:
    sites = sites_of(Reading(wants_a_layer=True).eval(), [torch.zeros(2, 8)])
    assert [site.name for site in sites.found] == ["plain"]
    assert sites.refused["wanted"] == "the model fails without it (TypeError: want a Linear)"


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


def given(module: nn.Module, bench: TorchBench) -> TorchModel:
    """A model that is an object of Python, of the bench's inputs and outputs."""
    source = ModuleSource(module.eval(), bench.torch.source.inputs, bench.torch.source.outputs)
    return TorchModel(source, source_digest(source))


def convolutions(*, zeros: bool = False, nan: bool = False) -> nn.Sequential:
    """Two that can be replaced; the second with hardly a channel that isn't zero, or with NaN."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 4),
        )  # fmt: skip
    weight = module[2].weight.data
    if zeros:
        weight[:15], weight[:, :15] = 0, 0
    if nan:
        weight[0, 0, 0, 0] = math.nan
    return module


def applied(
    model: TorchModel, bench: TorchBench, directory: Path, **parameters: str
) -> TorchVariant:
    technique = Decomposition()
    chosen = defaults(technique.space(model, bench.context), **{"rank_by": "share", **parameters})
    return technique.apply(model, chosen, bench.context, directory)


def test_layer_is_left_and_named_when_its_fit_fails(bench: TorchBench, tmp_path: Path) -> None:
    model = given(convolutions(zeros=True), bench)
    made = applied(model, bench, tmp_path, form="cp")
    assert list(read_plan(made).steps[0].operations) == ["1"]
    (note,) = made.notes
    assert note == "1 of 4 layers decomposed; the fit of 1 failed (2: Singular matrix)"


def test_decomposition_fails_by_name_when_every_fit_fails(
    bench: TorchBench, tmp_path: Path
) -> None:
    module = convolutions(zeros=True)
    module[1] = copy.deepcopy(module[2])
    model = given(module, bench)
    with pytest.raises(ValueError, match=r"no layer can be decomposed \(1: Singular matrix; 2: "):
        applied(model, bench, tmp_path, form="cp")


@pytest.mark.parametrize("rank_by", ["evbmf", "energy", "share"])
@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_decomposition_names_the_layer_when_its_weights_are_not_finite(
    form: str, rank_by: str, bench: TorchBench, tmp_path: Path
) -> None:
    model = given(convolutions(nan=True), bench)
    with pytest.raises(ValueError, match="2: got weights with NaN or infinity, want finite ones"):
        applied(model, bench, tmp_path, form=form, rank_by=rank_by)


def test_decomposition_leaves_the_state_of_random_numbers_when_it_makes_and_loads(
    bench: TorchBench, tmp_path: Path
) -> None:
    model = given(convolutions(), bench)
    before = torch.random.get_rng_state()
    made = applied(model, bench, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    load_torch(made)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_chains_stay_frozen_when_a_variant_is_loaded(bench: TorchBench, tmp_path: Path) -> None:
    module = convolutions()
    module[1].requires_grad_(False)
    loaded = load_torch(applied(given(module, bench), bench, tmp_path))
    frozen = {name.split(".")[0] for name, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {"1"}


class Choosy(nn.Module):
    """Its second layer can't be a chain, which shows only when it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutions()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layers[2], nn.Sequential):
            raise RuntimeError("no chain here")
        return self.layers(images)


def test_decomposition_names_the_layer_when_the_model_fails_with_its_chain(
    bench: TorchBench, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"^layers.2: the model fails with a chain .*RuntimeError: no chain here"
    ):
        applied(given(Choosy(), bench), bench, tmp_path)


class ReadingDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutions()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.to(self.layers[2].weight.dtype))


def test_layer_is_left_when_the_model_reads_its_weight(bench: TorchBench, tmp_path: Path) -> None:
    made = applied(given(ReadingDtype(), bench), bench, tmp_path)
    assert list(read_plan(made).steps[0].operations) == ["layers.1"]
    load_runner(made, 8)(bench.inputs)


def test_decomposition_is_offered_when_any_form_gets_cheaper(tmp_path: Path) -> None:
    """Tucker's at 8 of 8 channels isn't."""
    network = (
        "nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))"
    )
    small = make_torch_bench(tmp_path, network)
    assert Decomposition().check(small.torch, small.context) is None
    (tmp_path / "made").mkdir()
    made = applied(small.torch, small, tmp_path / "made", form="cp")
    assert list(read_plan(made).steps[0].operations) == ["1"]
