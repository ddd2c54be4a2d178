"""Depth: which blocks can be bypassed, by which argument of their call, and in what form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from optimizer.pruning.depth import (
    Bypass,
    Form,
    blocks_of,
    bypass,
    importance,
    least_important,
    why_not_without,
)
from optimizer.pruning.graph import InputShape
from tests.optimizer.networks import TOPOLOGIES, built, case, inputs_of

WIDTH = 6
TOKENS = (InputShape("FP32", (5, WIDTH)),)


# --- networks of blocks of all kinds


def branch() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))


class Block(nn.Module):
    """Residual, unless a subclass says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.gate = branch(), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> Any:
        return hidden + self.branch(hidden)


class Stack(nn.Module):
    """Three blocks, each called by `call` with the block, the stream and a memory."""

    def __init__(self, block: Callable[[], nn.Module], call: Callable[..., Any]) -> None:
        super().__init__()
        self.stem, self.memory = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, x = self.memory(x), self.stem(x)
        for block in self.blocks:
            x = self.call(block, x, memory)
        return self.head(x.mean(1))


class MemoryFirst(Block):
    def forward(self, memory: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x) * torch.sigmoid(self.gate(memory))


class Attended(Block):
    """Gives a tuple of its output, weights and what it was given beside."""

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> Any:
        return x + self.branch(x), torch.softmax(self.gate(x), -1), memory


class Named(Block):
    def forward(self, hidden: torch.Tensor) -> Any:
        return {"weights": self.gate(hidden), "hidden": hidden + self.branch(hidden)}


class InPlace(Block):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        made = self.branch(hidden)
        made += hidden
        return functional.relu(made, inplace=True)


class Highway(Block):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        share = torch.sigmoid(self.gate(hidden))
        return share * hidden + (1 - share) * self.branch(hidden)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer(x)[0])


class Contracted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.dropout(torch.einsum("nld,de->nle", x, self.weight)))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.norm(x))


class Gated(Block):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.sigmoid(self.gate(hidden))


class SkipOfAnother(Block):
    """Adds what it makes of one argument to another."""

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.branch(x)) + memory


class BothAdded(Block):
    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return x + memory + self.branch(x) * self.gate(memory)


class Encoding(nn.Module):
    """torch's own encoder, which reads a part of its first layer, behind a projection."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, norm_first=True)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.stem(x))


class Pair(nn.Module):
    """Needs one block of its two, whichever."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not any(isinstance(block, Block) for block in self.blocks):
            raise RuntimeError("no block left")
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class Repeated(nn.Module):
    """Two blocks, one after the other, twice."""

    def __init__(self) -> None:
        super().__init__()
        first, second = Block(), Block()
        self.stem, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList([first, second] * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def plainly(block: nn.Module, x: torch.Tensor, _memory: torch.Tensor) -> Any:
    return block(x)


def with_both(block: nn.Module, x: torch.Tensor, memory: torch.Tensor) -> Any:
    return block(x, memory)


def by_name(block: nn.Module, x: torch.Tensor, _memory: torch.Tensor) -> Any:
    return block(hidden=x)


def memory_first(block: nn.Module, x: torch.Tensor, memory: torch.Tensor) -> Any:
    return block(memory, x)


def unpacked(block: nn.Module, x: torch.Tensor, memory: torch.Tensor) -> Any:
    x, _, memory = block(x, memory=memory)
    return x * memory.mean()


def by_key(block: nn.Module, x: torch.Tensor, _memory: torch.Tensor) -> Any:
    return block(x)["hidden"]


def with_weights(block: nn.Module, x: torch.Tensor, memory: torch.Tensor) -> Any:
    x, weights, _ = block(x, memory)
    return x * weights


# --- which can be bypassed


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet", ("2.0", "2.2")),
        ("resnet_option_a", ("2.0", "2.2")),
        ("efficientnet", ("3",)),
        ("vit", ("blocks.0", "blocks.1")),
        ("bert", ("layers.0", "layers.1")),
        ("vgg", ()),
        ("densenet", ()),
    ],
)
def test_blocks_are_those_that_hand_on_their_input_when_shapes_stay(
    name: str, blocks: tuple[str, ...]
) -> None:
    assert tuple(blocks_of(case(name).module(), TOPOLOGIES[name].inputs)) == blocks


@pytest.mark.parametrize(
    ("block", "call", "form"),
    [
        pytest.param(Block, plainly, Form(0), id="called with one argument"),
        pytest.param(Block, by_name, Form("hidden"), id="called by keyword"),
        pytest.param(MemoryFirst, memory_first, Form(1), id="the stream comes second"),
        pytest.param(Attended, unpacked, Form([0, None, "memory"], 0), id="a tuple is unpacked"),
        pytest.param(Named, by_key, Form({"weights": None, "hidden": 0}, "hidden"), id="a dict"),
        pytest.param(InPlace, plainly, Form(0), id="added in place"),
        pytest.param(Highway, plainly, Form(0), id="a gated shortcut"),
    ],
)
def test_bypass_hands_on_the_stream_when_the_block_has_one(
    block: Callable[[], nn.Module], call: Callable[..., Any], form: Form
) -> None:
    module = built(lambda: Stack(block, call))
    blocks = blocks_of(module, TOKENS)
    assert blocks == {f"blocks.{index}": form for index in range(3)}
    assert Form.from_json(form.to_json()) == form
    inputs = inputs_of(TOKENS, 3)

    def skipping(part: nn.Module, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        if part is not reference.blocks[1]:
            return call(part, x, memory)
        return x * memory.mean() if call is unpacked else x

    reference = built(lambda: Stack(block, skipping))
    given = bypass(module, {"blocks.1": form})
    with torch.no_grad():
        torch.testing.assert_close(given(*inputs), reference(*inputs))


@pytest.mark.parametrize(
    ("block", "call"),
    [
        pytest.param(Recurrent, plainly, id="an LSTM"),
        pytest.param(Contracted, plainly, id="an einsum with weights"),
        pytest.param(Normalized, plainly, id="normalization and activation"),
        pytest.param(Gated, plainly, id="a gate alone"),
        pytest.param(SkipOfAnother, with_both, id="the shortcut is another's"),
        pytest.param(BothAdded, with_both, id="two arguments are added to"),
        pytest.param(Attended, with_weights, id="the network needs what else it gives"),
    ],
)
def test_block_stays_when_nothing_can_stand_for_it(
    block: Callable[[], nn.Module], call: Callable[..., Any]
) -> None:
    assert blocks_of(built(lambda: Stack(block, call)), TOKENS) == {}


def test_block_stays_when_the_network_reads_its_parts() -> None:
    module = built(Encoding)
    before = dict(module.named_modules())
    assert tuple(blocks_of(module, TOKENS)) == ("encoder.layers.1", "encoder.layers.2")
    assert dict(module.named_modules()) == before


def test_frozen_encoder_layers_can_be_bypassed_like_others() -> None:
    module = built(Encoding).requires_grad_(False)
    assert tuple(blocks_of(module, TOKENS)) == ("encoder.layers.1", "encoder.layers.2")


def test_blocks_are_refused_with_the_reason_when_the_network_needs_one_of_them() -> None:
    module, inputs = built(Pair), inputs_of(TOKENS, 2)
    blocks = blocks_of(module, TOKENS)
    assert tuple(blocks) == ("blocks.0", "blocks.1")
    assert why_not_without(module, {"blocks.0": blocks["blocks.0"]}, inputs) is None
    assert why_not_without(module, blocks, inputs) == "RuntimeError: no block left"
    assert isinstance(module.blocks[0], Block)


# --- how much they matter


def test_block_matters_less_when_it_changes_less() -> None:
    module = case("vit").module()
    for weights in module.get_submodule("blocks.1").parameters():
        nn.init.zeros_(weights)
    inputs = inputs_of(TOPOLOGIES["vit"].inputs, 6)
    scores = importance(module, {"blocks.0": Form(0), "blocks.1": Form(0)}, inputs)
    assert scores["blocks.1"] == pytest.approx(0, abs=1e-6)
    assert scores["blocks.0"] > 0.01
    assert least_important(scores, 1) == ["blocks.1"]
    with pytest.raises(ValueError, match="got 3 to bypass, want 0 to 2"):
        least_important(scores, 3)
    with pytest.raises(ValueError, match="no block layer9"):
        bypass(module, {"layer9": Form(0)})


@pytest.mark.parametrize(
    ("block", "call"),
    [(MemoryFirst, memory_first), (Block, by_name), (Attended, unpacked), (Named, by_key)],
)
def test_importance_compares_the_stream_with_what_the_block_adds_it_to(
    block: Callable[[], nn.Module], call: Callable[..., Any]
) -> None:
    module = built(lambda: Stack(block, call))
    with torch.no_grad():
        for weights in module.blocks[1].branch[3].parameters():
            weights.zero_()
    scores = importance(module, blocks_of(module, TOKENS), inputs_of(TOKENS, 40))
    assert scores["blocks.1"] == pytest.approx(0, abs=1e-6)
    assert min(scores["blocks.0"], scores["blocks.2"]) > 1e-3


def test_importance_is_the_mean_over_calls_when_a_block_has_two_places() -> None:
    module = built(Repeated)
    x = inputs_of(TOKENS, 8)
    scores = importance(module, blocks_of(module, TOKENS), x)
    with torch.no_grad():
        stream, cosines = module.stem(*x), []
        for block in module.blocks:
            made = block(stream)
            cosines.append(functional.cosine_similarity(stream.flatten(1), made.flatten(1)).mean())
            stream = made
    want = 1 - float(cosines[0] + cosines[2]) / 2
    assert scores["blocks.0"] == pytest.approx(want, abs=1e-5)
    assert scores["blocks.0"] == scores["blocks.2"]


# --- what stands for them


@pytest.mark.parametrize(("name", "block"), [("resnet", "2.2"), ("bert", "layers.0")])
def test_bypassed_network_computes_what_its_other_blocks_do(name: str, block: str) -> None:
    one = case(name)
    inputs = inputs_of(TOPOLOGIES[name].inputs, 6)

    class Skipped(nn.Module):
        def forward(self, x: torch.Tensor, *_others: torch.Tensor) -> torch.Tensor:
            return x

    reference = one.module()
    reference.set_submodule(block, Skipped())
    given = bypass(one.module(), {block: Form(0)})
    with torch.no_grad():
        want, got = reference(*inputs), given(*inputs)
    torch.testing.assert_close(got, want)
    assert not any(key.startswith(f"{block}.") for key in given.state_dict())


def test_bypass_gives_the_container_that_the_block_did() -> None:
    x, mask = torch.zeros(1), torch.ones(1)
    assert Bypass(Form([0], 0))(x, None) == (x,)
    assert Bypass(Form(0))(x, attention=None) is x
    assert Bypass(Form([None, "x"], 1))(mask, x=x) == (None, x)
    assert Bypass(Form({"hidden": 1, "mask": 0}, "hidden"))(mask, x) == {"hidden": x, "mask": mask}
