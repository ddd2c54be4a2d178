"""A supernet that begins as a trained network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from optimizer.architecture.inheriting import Unlike, inherit, largest_like
from optimizer.architecture.making import Place, space_of
from optimizer.architecture.networks import build
from optimizer.architecture.options import ArchitectureSpec, InitialSpec
from optimizer.architecture.plan import LayerPlan, VisionPlan
from optimizer.architecture.supernet import Supernet
from optimizer.importable import Importable
from optimizer.pruning.graph import InputShape, trace
from optimizer.pruning.groups import network_of
from optimizer.pruning.importance import Samples, score
from optimizer.space import defaults
from optimizer.spec import TrainingSpec
from optimizer.techniques import Context
from optimizer.techniques.supernet import SupernetTraining
from optimizer.torch_source import load_source
from optimizer.torch_variant import load_torch
from tests.optimizer.test_architecture_technique import seconds
from tests.optimizer.torch_bench import TorchBench, make_torch_bench

SPACE: dict[str, Any] = {
    "kind": "vision",
    "stems": [4, 8],
    "stages": [
        {"depths": [1, 2], "widths": [4, 8], "blocks": ["basic"], "expansions": [1, 2]},
        {"depths": [1], "widths": [8, 16], "blocks": ["depthwise", "mbconv"], "stride": 2},
    ],
}
INPUTS = [InputShape("FP32", (1, 8, 8))]
# The largest of `ALIKE`, under names of its own.
NETWORK = (
    "nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), "
    "nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.{activation}(), "
    "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))"
)
ALIKE = {
    "kind": "vision",
    "stems": [4, 8],
    "stages": [{"depths": [1], "widths": [8, 16], "stride": 2}],
}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def empty(**given: Any) -> Supernet:
    return Supernet(
        space_of(ArchitectureSpec(space=SPACE, **given), Place((1, 8, 8), 4)).structures
    )


def trained(supernet: Supernet) -> nn.Module:
    """The largest with mbconv, with statistics and scales as after a training."""
    network = supernet.built(supernet.space.extreme(is_largest=True)).train()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 1:
                weight.copy_(torch.rand_like(weight) + 0.5)
        for _ in range(20):
            network(torch.randn(32, 1, 8, 8))
    return network.eval()


class Renamed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone = network

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.backbone(image)}


def test_largest_network_computes_what_the_trained_one_does():
    supernet, example = empty(), (torch.randn(4, 1, 8, 8),)
    network = trained(supernet)
    note = inherit(supernet, Renamed(network), INPUTS, example)
    assert "begins as a trained network" in note
    largest = supernet.network(supernet.space.extreme(is_largest=True))
    # Either normalizes by the batch, as the supernet's networks have no statistics.
    torch.testing.assert_close(largest(*example), network.train()(*example), rtol=1e-4, atol=1e-4)


def test_units_of_every_group_are_sorted_by_importance():
    supernet, example = empty(), (torch.randn(4, 1, 8, 8),)
    network = trained(supernet)

    def importances(module: nn.Module) -> list[list[float]]:
        groups = network_of(trace(module, INPUTS)).groups
        return [list(one) for one in score("l1", module, groups, Samples(example, None, 0))]

    before = importances(network)
    assert any(one != sorted(one, reverse=True) for one in before)
    inherit(supernet, network, INPUTS, example)
    after = importances(supernet.extract(supernet.space.extreme(is_largest=True)))
    assert all(one == sorted(one, reverse=True) for one in after)
    for one, other in zip(before, after, strict=True):
        assert sorted(one) == pytest.approx(sorted(other), rel=1e-5)


def test_trained_network_itself_is_left_as_it_was():
    supernet = empty()
    network = trained(supernet)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    inherit(supernet, network, INPUTS, (torch.randn(4, 1, 8, 8),))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_of_other_kinds_of_blocks_stay_as_drawn():
    supernet = empty()
    drawn = {name: one.detach().clone() for name, one in supernet.weights.items()}
    inherit(supernet, trained(supernet), INPUTS, (torch.randn(4, 1, 8, 8),))
    same = {name for name, one in supernet.weights.items() if torch.equal(one, drawn[name])}
    assert same == {name for name in drawn if "depthwise" in name}


def test_smaller_network_is_refused_by_the_tensor_where_it_differs():
    supernet = empty()
    plan = supernet.space.plan(supernet.space.extreme(is_largest=False))
    with pytest.raises(
        Unlike,
        match=r"its stem.0.weight is \[4, 1, 3, 3\], where the space's "
        r"stem.0.weight is \[8, 1, 3, 3\]",
    ):
        largest_like(supernet, build(plan).eval(), (torch.randn(2, 1, 8, 8),))


def test_network_with_more_layers_is_refused():
    supernet = empty()
    longer = nn.Sequential(trained(supernet), nn.Linear(4, 4)).eval()
    with pytest.raises(
        Unlike, match=r"its 1.weight is \[4, 4\], where the space's none is missing"
    ):
        largest_like(supernet, longer, (torch.randn(2, 1, 8, 8),))


class Doubled(Renamed):
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": 2 * self.backbone(image)}


def test_network_of_the_same_shapes_that_computes_something_else_is_refused():
    supernet = empty()
    with pytest.raises(Unlike, match=r"answers differ by .*, want at most"):
        largest_like(supernet, Doubled(trained(supernet)), (torch.randn(2, 1, 8, 8),))


class _Branching(nn.Module):
    """No trace has both branches."""

    def __init__(self, plan: LayerPlan, n_in: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(n_in, plan.width, 3, plan.stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x if x.sum() > 0 else -x)


def test_network_that_cant_be_traced_is_inherited_unsorted():
    stages = [{"depths": [1], "widths": [4, 8], "blocks": ["branching"], "stride": 2}]
    given = {"kind": "vision", "stems": [4], "stages": stages}
    branching = Importable(__name__, "_Branching", Path(__file__).parent)
    spec = ArchitectureSpec(space=given).model_copy(update={"blocks": {"branching": branching}})
    space = space_of(spec, Place((1, 8, 8), 4)).structures
    supernet = Supernet(space, {"branching": _Branching})
    network = trained(supernet)
    note = inherit(supernet, network, INPUTS, (torch.randn(2, 1, 8, 8),))
    assert "aren't sorted by importance: VisionNetwork can't be traced" in note
    name = "stages.0.0_branching.body.convolution.weight"
    assert torch.equal(supernet.part(name, (8, 4, 3, 3)), network.get_parameter(name))


def test_no_shortcuts_means_none_around_the_first_layer_either():
    stage = {"depths": [1], "widths": [8], "shortcuts": [False]}
    space = space_of(
        ArchitectureSpec(space={"kind": "vision", "stems": [8], "stages": [stage]}),
        Place((1, 8, 8), 4),
    )
    plan = space.plan(space.extreme(is_largest=True))
    assert isinstance(plan, VisionPlan)
    assert not plan.stages[0][0].shortcut


def test_networks_of_their_own_begin_as_nothing():
    with pytest.raises(ValidationError, match="want weights: shared with initial"):
        ArchitectureSpec(space=SPACE, weights="own", initial="model")


# --- the technique


def bench_of(directory: Path, activation: str) -> TorchBench:
    return make_torch_bench(directory, NETWORK.format(activation=activation))


def context(bench: TorchBench) -> Context:
    training = TrainingSpec(batch_size=16, alphas=(0.5,))
    return replace(bench.context, training=training, block_seconds=seconds)


def test_supernet_begins_as_the_model(tmp_path):
    bench = bench_of(tmp_path, "ReLU")
    at = context(bench)
    spec = ArchitectureSpec(space=ALIKE, initial="model", epochs=0.25, learning_rate=1e-9)
    technique = SupernetTraining(spec)
    assert technique.check(bench.torch, at) is None
    parameters = defaults(technique.space(bench.torch, at))
    assert parameters["initial"] == "model"
    (tmp_path / "made").mkdir()
    made = technique.apply(bench.torch, parameters, at, tmp_path / "made")
    assert any(note.startswith("begins as a trained network, ") for note in made.notes)
    supernet, model = load_torch(made), load_source(bench.torch.source)
    assert isinstance(supernet, Supernet)
    image = torch.randn(16, 1, 8, 8)
    largest = supernet.network(supernet.space.extreme(is_largest=True))
    torch.testing.assert_close(largest(image), model.train()(image), rtol=1e-3, atol=1e-3)


def test_model_that_is_no_network_of_the_space_is_refused_before_training(tmp_path):
    bench = bench_of(tmp_path, "Tanh")
    technique = SupernetTraining(ArchitectureSpec(space=ALIKE, initial="model"))
    reason = technique.check(bench.torch, context(bench))
    assert reason is not None
    assert "architecture.initial is no largest network of the space: answers differ" in reason


def test_given_network_is_in_the_variants_id_and_refused_where_it_doesnt_fit(tmp_path):
    bench = bench_of(tmp_path, "ReLU")
    at = context(bench)

    def technique(function: str) -> SupernetTraining:
        factory = Importable("other", function, tmp_path)
        initial = InitialSpec.model_construct(factory=factory, weights=tmp_path / "w.safetensors")
        spec = ArchitectureSpec(space=ALIKE).model_copy(update={"initial": initial})
        return SupernetTraining(spec)

    (tmp_path / "other.py").write_text(
        f"from torch import nn\n\ndef build():\n    return {NETWORK.format(activation='ReLU')}\n\n"
        "def narrow():\n    return nn.Linear(3, 3)\n\ndef number():\n    return 3\n"
    )
    state = load_source(bench.torch.source).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    first = technique("build")
    assert first.check(bench.torch, at) is None
    before = defaults(first.space(bench.torch, at))["initial"]
    save_file({**state, "8.bias": state["8.bias"] + 1}, tmp_path / "w.safetensors")
    assert defaults(technique("build").space(bench.torch, at))["initial"] != before
    for function, wanted in (
        ("narrow", "architecture.initial: other:narrow doesn't fit"),
        ("number", "architecture.initial: other:number returned int"),
        ("absent", "architecture.initial: other:absent failed: AttributeError"),
    ):
        reason = technique(function).check(bench.torch, at)
        assert reason is not None
        assert wanted in reason
