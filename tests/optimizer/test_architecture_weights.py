"""Networks that share weights, what untrained ones tell, and how long they take."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from optimizer.architecture.latency import LatencyModel, Unmeasured, blocks_in
from optimizer.architecture.networks import build
from optimizer.architecture.proxies import naswot, synflow
from optimizer.architecture.space import (
    ArchitectureSpace,
    EncoderNetworks,
    StageChoices,
    VisionNetworks,
)
from optimizer.architecture.supernet import Sandwich, Supernet
from optimizer.blocks import blocks_of
from optimizer.search.block_table import Correction, Pair, correction, trust
from optimizer.training.batches import Batch
from optimizer.training.distillation import Distillation, Mixture
from optimizer.training.recalibration import recalibrate
from optimizer.training.teacher import answering

VISION = ArchitectureSpace(
    VisionNetworks(
        (1, 8, 8),
        3,
        (4, 8),
        (
            StageChoices(
                (1, 2), (8, 12), ("conv", "mbconv", "basic"), (3, 5), (1, 2), (False, True)
            ),
            StageChoices((1, 2), (8, 16), ("depthwise", "fused_mbconv"), stride=2),
        ),
    )
)
ENCODERS = ArchitectureSpace(EncoderNetworks(30, 16, 6, 4, (1, 3), (8, 16), (1, 2), (16, 32)))
ANSWER = answering(["logits"], "logits")


def inputs_of(space, n=6):
    if space is VISION:
        return (torch.randn((n, 1, 8, 8)),)
    ids = torch.randint(0, 30, (n, 7))
    return ids, torch.ones_like(ids)


@pytest.fixture
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("space", [VISION, ENCODERS], ids=["images", "texts"])
def test_network_of_the_supernet_equals_the_stand_alone_one(space):
    supernet = Supernet(space)
    rng = np.random.default_rng(0)
    given = inputs_of(space)
    for choices in [space.sample(rng) for _ in range(12)]:
        alone = supernet.extract(choices).train()
        torch.testing.assert_close(supernet.network(choices)(*given), alone(*given))


@pytest.mark.usefixtures("seeded")
def test_network_of_the_supernet_sends_its_gradients_there():
    supernet = Supernet(VISION)
    choices = VISION.sample(np.random.default_rng(0))
    given = inputs_of(VISION)
    alone = supernet.extract(choices).train()
    alone(*given).square().sum().backward()
    supernet.network(choices)(*given).square().sum().backward()
    for name, weight in alone.named_parameters():
        whole = supernet.weights[name.replace(".", "/")].grad
        assert weight.grad is not None
        assert whole is not None
        # All of it lies in the network's part: the rest of the supernet's isn't touched.
        assert float(whole.square().sum()) == pytest.approx(
            float(weight.grad.square().sum()), rel=1e-4, abs=1e-10
        )


@pytest.mark.usefixtures("seeded")
def test_kernels_share_their_middle():
    supernet = Supernet(VISION)
    name = "stages.0.0_conv.body.0.weight"
    small, large = supernet.part(name, (8, 4, 3, 3)), supernet.part(name, (8, 4, 5, 5))
    assert torch.equal(small, large[:, :, 1:4, 1:4])


@pytest.mark.usefixtures("seeded")
def test_part_refuses_more_than_there_is():
    with pytest.raises(
        ValueError, match=r"classifier.weight: got \[3, 99\], want at most \[3, 16\]"
    ):
        Supernet(VISION).part("classifier.weight", (3, 99))


@pytest.mark.usefixtures("seeded")
def test_sandwich_is_the_sum_over_its_networks():
    supernet = Supernet(VISION)
    batch = Batch(np.arange(6), inputs_of(VISION), torch.tensor([0, 1, 2, 0, 1, 2]))
    taught = Distillation(Mixture(alpha=1.0), ANSWER, None)
    loss = Sandwich(taught, ANSWER, n_random=0)(supernet, batch)
    largest = supernet.network(VISION.extreme(is_largest=True))(*batch.inputs)
    smallest = supernet.network(VISION.extreme(is_largest=False))(*batch.inputs)
    labelled = torch.nn.functional.cross_entropy(largest, batch.labels)
    wanted, given = largest.softmax(1), smallest.log_softmax(1)
    divergence = (wanted * (wanted.log() - given)).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float((labelled + divergence).detach()), rel=1e-5)


def test_sandwich_refuses_fewer_than_no_networks():
    with pytest.raises(ValueError, match="n_random: got -1, want 0 or more"):
        Sandwich(Distillation(Mixture(alpha=1.0), ANSWER, None), ANSWER, n_random=-1)


@pytest.mark.usefixtures("seeded")
def test_every_network_learns_when_the_supernet_does():
    """Three classes by where the image is bright: after some steps networks that were never
    trained themselves tell them apart."""
    labels = torch.arange(96) % 3
    images = 0.5 * torch.randn((96, 1, 8, 8))
    for place in range(3):
        images[labels == place, :, 2 * place : 2 * place + 3] += 2
    supernet = Supernet(VISION)
    loss = Sandwich(Distillation(Mixture(alpha=1.0), ANSWER, None), ANSWER)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    batch = Batch(np.arange(96), (images,), labels)
    for _ in range(40):
        optimizer.zero_grad()
        loss(supernet, batch).backward()
        torch.nn.utils.clip_grad_norm_(supernet.parameters(), 5.0)
        optimizer.step()
    rng = np.random.default_rng(5)
    right = []
    for choices in [VISION.sample(rng) for _ in range(8)]:
        network = supernet.extract(choices)
        recalibrate(network, [batch])
        with torch.no_grad():
            right.append(float((network(images).argmax(1) == labels).float().mean()))
    assert np.mean(right) > 0.8


# --- proxies


@pytest.mark.usefixtures("seeded")
def test_naswot_equals_the_determinant_of_alike_units():
    network = build(VISION.plan(VISION.extreme(is_largest=False)))
    (images,) = inputs_of(VISION)
    codes = []
    for part in network.modules():
        if isinstance(part, torch.nn.ReLU):
            part.register_forward_hook(lambda _p, _i, out: codes.append((out > 0).flatten(1)))
    score = naswot(network, (images,))
    on = torch.cat(codes, dim=1).numpy()
    kernel = np.array([[(one == other).sum() for other in on] for one in on], dtype=float)
    kernel += 1e-5 * on.shape[1] * np.eye(len(on))
    assert score == pytest.approx(np.linalg.slogdet(kernel)[1], rel=1e-6)


def test_naswot_says_nothing_of_networks_without_relus():
    assert naswot(torch.nn.Linear(4, 2), (torch.zeros(3, 4),)) == float("-inf")


def test_synflow_equals_the_product_of_magnitudes_in_a_chain():
    """In a chain of single weights R is their product, and so is each weight's share."""
    chain = torch.nn.Sequential(
        torch.nn.Linear(1, 1, bias=False), torch.nn.ReLU(), torch.nn.Linear(1, 1, bias=False)
    )
    with torch.no_grad():
        chain[0].weight.fill_(-2.0)
        chain[2].weight.fill_(3.0)
    assert synflow(chain, (torch.zeros(4, 1),)) == pytest.approx(np.log(2 * 6.0))
    assert float(chain[0].weight.detach()) == -2.0


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("proxy", [naswot, synflow])
def test_proxy_leaves_the_network_as_it_was(proxy):
    network = build(VISION.plan(VISION.extreme(is_largest=True))).eval()
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    proxy(network, inputs_of(VISION))
    assert not network.training
    for name, weight in network.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.dtype == torch.float32


# --- latency


def test_blocks_in_a_plan_are_those_of_the_network():
    plan = VISION.plan(VISION.extreme(is_largest=True))
    assert blocks_in(plan) == blocks_of(build(plan), (torch.zeros(1, 1, 8, 8),))


def machine(blocks):
    """A made-up engine: time by what a block reads and writes, and something for each network."""
    return 2e-4 + sum(
        count * (1e-8 * np.prod(block.input_shape) * block.n_outputs + 1e-5)
        for block, count in blocks.items()
    )


def test_latency_model_is_right_on_a_made_up_engine():
    rng = np.random.default_rng(0)
    networks = [blocks_in(VISION.plan(VISION.sample(rng))) for _ in range(40)]
    times = {
        (block.key, 8): 0.5 * (machine({block: 1}) - 2e-4)
        for network in networks
        for block in network
    }
    model = LatencyModel(times, 8)
    pairs = [Pair(model(one), machine(one) * rng.uniform(0.97, 1.03)) for one in networks[:20]]
    line = correction(pairs)
    assert line is not None
    corrected = LatencyModel(times, 8, {"fp32": line})
    errors = [abs(corrected(one) / machine(one) - 1) for one in networks[20:]]
    assert max(errors) < 0.03
    judged = trust(pairs)
    assert judged is not None
    assert judged.n_networks == 20
    assert judged.rank_correlation > 0.95
    assert judged.relative_error < 0.05


def test_latency_model_corrects_only_the_precision_that_a_correction_is_for():
    networks = blocks_in(VISION.plan(VISION.extreme(is_largest=False)))
    rounded = Counter({replace(one, precision="int8"): n for one, n in networks.items()})
    times = {(block.key, 8): 1e-3 for block in [*networks, *rounded]}
    model = LatencyModel(times, 8, {"int8": Correction(1e-3, 2.0, 0.0)})
    total = 1e-3 * networks.total()
    assert model(networks) == pytest.approx(total)
    assert model(rounded) == pytest.approx(1e-3 + 2 * total)


def test_latency_model_names_the_block_that_it_lacks():
    with pytest.raises(Unmeasured, match=r"kind='conv'.*not measured at batch 8"):
        LatencyModel({}, 8)(blocks_in(VISION.plan(VISION.extreme(is_largest=False))))


def test_trust_says_nothing_of_too_few_networks():
    assert trust([Pair(1.0, 1.0), Pair(2.0, 2.0)]) is None
