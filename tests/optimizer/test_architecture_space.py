"""Spaces of networks: choices, plans, and the torch modules built from them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from optimizer.architecture.networks import BLOCKS, build
from optimizer.architecture.plan import (
    EncoderLayerPlan,
    EncoderPlan,
    LayerPlan,
    VisionPlan,
    plan_digest,
    plan_json,
    plan_of_json,
)
from optimizer.architecture.space import (
    ArchitectureSpace,
    Decision,
    EncoderNetworks,
    StageChoices,
    VisionNetworks,
)

SPACE = ArchitectureSpace(
    VisionNetworks(
        (1, 8, 8),
        10,
        (4, 8),
        (
            StageChoices((1, 2), (8, 16), ("conv", "mbconv"), (3, 5), (1, 2), (False, True)),
            StageChoices((1, 2), (8, 16), ("conv",), shortcuts=(True, False), stride=2),
        ),
    )
)
ENCODERS = ArchitectureSpace(EncoderNetworks(50, 16, 6, 4, (1, 2), (8, 16), (1, 2), (16, 32)))


def test_space_counts_its_networks_each_once():
    every = list(SPACE.every())
    assert len(every) == len(set(every)) == SPACE.n_networks


@pytest.mark.parametrize("space", [SPACE, ENCODERS], ids=["images", "texts"])
def test_space_has_no_two_choices_of_equal_networks(space):
    plans = [plan_digest(space.plan(choices)) for choices in space.every()]
    assert len(plans) == len(set(plans))


@pytest.mark.parametrize("space", [SPACE, ENCODERS], ids=["images", "texts"])
def test_sample_is_a_network_of_the_space(space):
    rng = np.random.default_rng(0)
    every = set(space.every())
    drawn = {space.sample(rng) for _ in range(50)}
    assert drawn <= every
    assert len(drawn) > 10


def test_canonical_forgets_what_does_not_exist():
    names = [decision.name for decision in SPACE.decisions]
    shallow = list(SPACE.extreme(is_largest=False))
    beyond = list(shallow)
    beyond[names.index("stage0.layer1.kernel")] = 1
    assert SPACE.canonical(beyond) == tuple(shallow)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ((0,), "got 1 choices, want"),
        ((9, *SPACE.extreme(is_largest=False)[1:]), "resolution: got option 9, want 0 to 0"),
    ],
    ids=["too few", "no such option"],
)
def test_canonical_refuses_what_is_no_network(choices, said):
    with pytest.raises(ValueError, match=said):
        SPACE.canonical(choices)


def test_vector_is_one_hot_for_decisions_that_exist():
    for choices in list(SPACE.every())[::37]:
        vector = SPACE.vector(choices)
        n_existing = sum(
            SPACE.exists(index, choices[:index]) for index in range(len(SPACE.decisions))
        )
        assert vector.sum() == n_existing
        assert set(np.unique(vector)) <= {0.0, 1.0}


def test_vectors_of_different_networks_differ():
    vectors = {tuple(SPACE.vector(choices)) for choices in SPACE.every()}
    assert len(vectors) == SPACE.n_networks


def test_further_decisions_leave_the_plan_as_it_is():
    joint = ArchitectureSpace(SPACE.networks, (Decision("precision", ("fp32", "int8")),))
    low, high = joint.extreme(is_largest=False), (*joint.extreme(is_largest=False)[:-1], 1)
    assert joint.n_networks == 2 * SPACE.n_networks
    assert joint.plan(low) == joint.plan(high)
    assert joint.option(high, "precision") == "int8"


def test_decision_refuses_an_option_that_comes_twice():
    with pytest.raises(ValueError, match="width: got \\(8, 8\\), want at least one, each once"):
        Decision("width", (8, 8))


@pytest.mark.parametrize("space", [SPACE, ENCODERS], ids=["images", "texts"])
def test_plan_survives_json_with_its_digest(space):
    for choices in list(space.every())[::53]:
        plan = space.plan(choices)
        again = plan_of_json(json.loads(json.dumps(plan_json(plan))))
        assert again == plan
        assert plan_digest(again) == plan_digest(plan)


def test_digests_stay_what_they_were():
    vision = VisionPlan((1, 8, 8), 10, 4, ((LayerPlan("conv", 8),),))
    encoder = EncoderPlan(50, 16, 6, 8, 4, (EncoderLayerPlan(2, 16),))
    assert plan_digest(vision).startswith(VISION_DIGEST)
    assert plan_digest(encoder).startswith(ENCODER_DIGEST)


VISION_DIGEST = "bf816a223061"
ENCODER_DIGEST = "53df3d71dc86"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"kind": "graph"}, "kind: got 'graph', want vision or encoder"),
        ({"kind": "vision"}, "not an architecture"),
        ([], "not an architecture"),
        ({**plan_json(SPACE.plan(SPACE.extreme(is_largest=False))), "colour": 1}, "colour"),
    ],
    ids=["another kind", "fields missing", "a list", "a field too many"],
)
def test_plan_refuses_json_that_is_none(content, said):
    with pytest.raises(ValueError, match=said):
        plan_of_json(content)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("kernel", 4, "kernel: got 4, want an odd size"),
        ("width", 0, "width: got 0, want at least 1"),
        ("expansion", 0, "expansion: got 0, want at least 1"),
    ],
    ids=["even kernel", "no channels", "no inner channels"],
)
def test_layer_plan_refuses_what_can_not_be(field, value, said):
    with pytest.raises(ValueError, match=said):
        LayerPlan(**{"block": "conv", "width": 8, field: value})


@pytest.mark.parametrize("block", sorted(BLOCKS))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("squeezes", [False, True], ids=["plain", "squeezed"])
def test_blocks_give_width_and_stride(block, stride, squeezes):
    layer = LayerPlan(block, 6, 5, stride, 2, squeezes)
    network = build(VisionPlan((3, 8, 8), 4, 6, ((layer,),))).eval()
    x = network.stem(torch.zeros(2, 3, 8, 8))
    (stage,) = network.stages
    (made,) = stage.values()
    assert made(x).shape == (2, 6, 8 // stride, 8 // stride)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_shortcut_adds_the_input_only_where_shapes_allow():
    def output(shortcut: bool, width: int) -> torch.Tensor:
        torch.manual_seed(0)
        stages = ((LayerPlan("conv", width, shortcut=shortcut),),)
        network = build(VisionPlan((1, 8, 8), 4, 8, stages)).eval()
        return network(torch.ones(1, 1, 8, 8))

    assert not torch.equal(output(True, 8), output(False, 8))
    assert torch.equal(output(True, 16), output(False, 16))


def test_resolution_scales_what_comes_in():
    plan = VisionPlan((1, 8, 8), 4, 4, ((LayerPlan("conv", 4),),), resolution=4)
    seen = []
    network = build(plan).eval()
    network.stem.register_forward_hook(lambda _part, given, _out: seen.append(given[0].shape))
    network(torch.zeros(1, 1, 8, 8))
    assert seen == [(1, 1, 4, 4)]


def test_encoder_ignores_padding():
    torch.manual_seed(0)
    network = build(ENCODERS.plan(ENCODERS.extreme(is_largest=True))).eval()
    ids = torch.tensor([[5, 7, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(network(ids, mask), network(ids[:, :3], mask[:, :3]))


class Doubled(nn.Module):
    def __init__(self, plan: LayerPlan, n_in: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(n_in, plan.width, 3, plan.stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.convolution(x)


def broken(_plan: LayerPlan, _n_in: int) -> nn.Module:
    raise RuntimeError("no such thing")


def test_build_takes_blocks_of_the_user():
    plan = VisionPlan((1, 8, 8), 4, 4, ((LayerPlan("mine:Doubled", 8),),))
    assert build(plan, {"mine:Doubled": Doubled}).eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({}, "stage 0, layer 0: got the block 'mine', want one of"),
        ({"mine": broken}, "the block 'mine' can't be built: RuntimeError: no such thing"),
        ({"mine": lambda plan, n_in: 3}, "the block 'mine' gave a int, want an nn.Module"),
    ],
    ids=["unknown", "raises", "gives something else"],
)
def test_build_refuses_a_block_by_its_name(blocks, said):
    plan = VisionPlan((1, 8, 8), 4, 4, ((LayerPlan("mine", 8),),))
    with pytest.raises(ValueError, match=said):
        build(plan, blocks)
