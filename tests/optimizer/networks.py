"""Small networks of the topologies that users bring, for tests of what changes their structure.

A few channels each, in eval mode, with random weights and statistics as if trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from optimizer.pruning.graph import InputShape, named_tensors, trace
from optimizer.pruning.groups import Group, Network, network_of
from optimizer.pruning.surgery import (
    MODULE,
    TRACE,
    difference,
    masked_outputs,
    operate,
    operations_of,
)

IMAGE = InputShape("FP32", (3, 8, 8))
N_CLASSES = 4


def conv(n_in: int, n_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(n_out),
    )


def head(n_in: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, N_CLASSES))


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(6 * 16, 10), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(10, N_CLASSES),
    )  # fmt: skip


class Basic(nn.Module):
    """A residual block; its shortcut is a projection where the shape changes, or option A."""

    def __init__(self, n_in: int, n_out: int, stride: int, padded: bool = False) -> None:
        super().__init__()
        self.first, self.second = conv(n_in, n_out, 3, stride), conv(n_out, n_out)
        self.stride, self.n_new, self.padded = stride, n_out - n_in, padded
        needed = stride != 1 and not padded
        self.shortcut = conv(n_in, n_out, 1, stride) if needed else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.second(functional.relu(self.first(x)))
        if self.padded and self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.n_new // 2, self.n_new - self.n_new // 2))
        out += self.shortcut(x)
        return functional.relu(out)


def resnet(padded: bool = False) -> nn.Module:
    blocks = nn.Sequential(Basic(8, 8, 1), Basic(8, 16, 2, padded), Basic(16, 16, 1))
    return nn.Sequential(conv(3, 8), nn.ReLU(), blocks, head(16))


def resnet_option_a() -> nn.Module:
    return resnet(padded=True)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, n: int, n_inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(n, n_inner, 1), nn.Conv2d(n_inner, n, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(inner))


class Plain(nn.Conv2d):
    """A class of one's own, as libraries have them."""


class Inverted(nn.Module):
    """MobileNet's and EfficientNet's block: expand, depthwise, gate, project."""

    def __init__(self, n_in: int, n_out: int, n_inner: int) -> None:
        super().__init__()
        self.expand = conv(n_in, n_inner, 1)
        depthwise = Plain(n_inner, n_inner, 3, 1, 1, groups=n_inner)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(n_inner))
        self.gate, self.project = Gate(n_inner, 4), conv(n_inner, n_out, 1)
        self.is_residual = n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = functional.silu(self.expand(x))
        out = self.project(self.gate(functional.silu(self.depthwise(out))))
        return x + out if self.is_residual else out


def efficientnet() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.SiLU(), Inverted(6, 8, 12), Inverted(8, 8, 16), head(8))


def resnext() -> nn.Module:
    """A grouped convolution: 4 groups of 2 channels."""
    return nn.Sequential(
        conv(3, 8, 1), nn.ReLU(), conv(8, 8, 3, 1, 4), nn.ReLU(), conv(8, 6, 1), nn.ReLU(), head(6)
    )


class Dense(nn.Module):
    """DenseNet: each layer sees all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * n) for n in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * n, 4, 3, padding=1) for n in range(2))
        self.head = head(14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=False):
            features.append(layer(functional.relu(norm(torch.cat(features, 1)))))
        return self.head(functional.relu(self.norms[2](torch.cat(features, 1))))


class Shuffle(nn.Module):
    """ShuffleNet: half of the channels pass, and all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = conv(3, 8), conv(4, 4), head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passed, changed = functional.relu(self.stem(x)).chunk(2, 1)
        both = torch.cat([passed, functional.relu(self.branch(changed))], 1)
        n, channels, height, width = both.shape
        both = both.view(n, 2, channels // 2, height, width).transpose(1, 2)
        return self.head(both.reshape(n, channels, height, width))


def decoder() -> nn.Module:
    """Transposed convolution and group normalization: 4 groups of 2 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), head(6),
    )  # fmt: skip


class Attention(nn.Module):
    """As in a ViT: one projection for queries, keys and values, widths written in."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_heads = n_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Encoder(nn.Module):
    def __init__(self, width: int, n_heads: int, n_inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, n_heads)
        self.feed = nn.Sequential(nn.Linear(width, n_inner), nn.GELU(), nn.Linear(n_inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        return x + self.feed(self.second(x))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 5, 12))
        self.blocks = nn.Sequential(Encoder(12, 3, 10), Encoder(12, 3, 10))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class BertLayer(nn.Module):
    """Post-norm, with separate projections and products written out."""

    def __init__(self, width: int, n_heads: int, n_inner: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, n_inner), nn.Linear(n_inner, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.n_heads = n_heads

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], self.n_heads, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask, dim=-1)
        mixed = (weights @ v).transpose(1, 2).contiguous().view(x.shape)
        x = self.first(x + self.dense(mixed))
        return self.second(x + self.down(functional.gelu(self.up(x))))


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(32, 8)
        self.layers = nn.ModuleList(BertLayer(8, 2, 12) for _ in range(2))
        self.register_buffer("positions", torch.arange(32), persistent=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(ids) + self.places(self.positions[: ids.shape[1]])
        added = (mask == 0)[:, None, None, :].to(x.dtype) * -1e4
        for layer in self.layers:
            x = layer(x, added)
        wide = (mask > 0)[..., None].to(x.dtype)
        return {"embedding": (x * wide).sum(1) / wide.sum(1).clamp(min=1e-9), "tokens": x}


class Torch(nn.Module):
    """torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(1))


class Tied(nn.Module):
    """Two layers with one weight, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.down = nn.Linear(8, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.first(functional.relu(self.up(x))))
        return self.down(functional.relu(self.second(x)))


class Sorted(nn.Module):
    """Its channels are sorted, which no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).sort(dim=-1).values)


@dataclass(frozen=True)
class Topology:
    build: Callable[[], nn.Module]
    inputs: tuple[InputShape, ...]
    groups: Mapping[str, int]
    """Name → units that can go, counted by hand."""
    form: str
    """What computes it once all groups are narrower."""


TOPOLOGIES: Mapping[str, Topology] = {
    "vgg": Topology(vgg, (IMAGE,), {"0": 8, "4": 6, "7": 10}, "module"),
    "resnet": Topology(
        resnet,
        (IMAGE,),
        {"0.0": 8, "2.0.first.0": 8, "2.1.first.0": 16, "2.1.second.0": 16, "2.2.first.0": 16},
        "module",
    ),
    "resnet_option_a": Topology(
        resnet_option_a,
        (IMAGE,),
        {"0.0": 8, "2.0.first.0": 8, "2.1.first.0": 16, "2.1.second.0": 8, "2.2.first.0": 16},
        "trace",
    ),
    "efficientnet": Topology(
        efficientnet,
        (IMAGE,),
        {"0.0": 6, "2.expand.0": 12, "2.gate.reduce": 4, "2.project.0": 8, "3.expand.0": 16,
         "3.gate.reduce": 4},
        "module",
    ),
    "resnext": Topology(resnext, (IMAGE,), {"0.0": 4, "4.0": 6}, "module"),
    "densenet": Topology(Dense, (IMAGE,), {"stem": 6, "convs.0": 4, "convs.1": 4}, "module"),
    "shuffle": Topology(Shuffle, (IMAGE,), {"stem.0": 4}, "module"),
    "decoder": Topology(decoder, (IMAGE,), {"0": 4, "3": 6}, "module"),
    "vit": Topology(
        Vit,
        (IMAGE,),
        {"blocks.0.attention.qkv": 3, "blocks.0.feed.0": 10, "blocks.1.attention.qkv": 3,
         "blocks.1.feed.0": 10},
        "trace",
    ),
    "bert": Topology(
        Bert,
        (InputShape("INT64", (-1,)), InputShape("INT64", (-1,))),
        {"layers.0.query": 2, "layers.0.up": 12, "layers.1.query": 2, "layers.1.up": 12},
        "trace",
    ),
    "torch's encoder": Topology(
        Torch,
        (InputShape("FP32", (5, 8)),),
        {"layer.self_attn.in_proj_weight": 2, "layer.linear1": 12},
        "trace",
    ),
    "tied": Topology(Tied, (InputShape("FP32", (5,)),), {"up": 8}, "module"),
}  # fmt: skip


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """The network as if trained: no statistic is 0 or 1, no bias 0."""
    torch.manual_seed(0)
    module = build()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                low = 0.5 if name.endswith(("weight", "running_var")) else -0.5
                tensor.uniform_(low, low + 1.0)
    return module.eval()


def inputs_of(inputs: tuple[InputShape, ...], n: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return tuple(_input(one, n, generator) for one in inputs)


def _input(one: InputShape, n: int, generator: torch.Generator) -> torch.Tensor:
    shape = (n, *(7 if axis == -1 else axis for axis in one.shape))
    if one.datatype == "INT64":
        ids: torch.Tensor = torch.randint(0, 20, shape, generator=generator)
        return ids
    return torch.randn(shape, generator=generator)


def flat(outputs: Any) -> list[torch.Tensor]:
    values = outputs.values() if isinstance(outputs, Mapping) else (outputs,)
    return list(values)


@dataclass(frozen=True, eq=False)
class Case:
    topology: Topology
    network: Network

    def module(self) -> nn.Module:
        """A new one each time."""
        return built(self.topology.build)

    def pruned(self, gone: Sequence[int]) -> tuple[nn.Module, str]:
        """By the first form that computes what it should, and which that was."""
        inputs = inputs_of(self.topology.inputs, 2)
        wanted = masked_outputs(self.module(), self.network, gone, inputs)
        for form in (MODULE, TRACE):
            operations = operations_of(self.network, gone, form, self.topology.inputs)
            module = operate(self.module(), operations)
            problem = difference(module, wanted, inputs)
            if not problem:
                return module, form
        raise AssertionError(problem)


@cache
def case(name: str) -> Case:
    """Tracing takes a second, and nothing changes a case."""
    topology = TOPOLOGIES[name]
    return Case(topology, network_of(trace(built(topology.build), topology.inputs)))


def halved(groups: Sequence[Group]) -> list[int]:
    """Every second unit of each group."""
    return [unit for group in groups for unit in group.units[::2]]


def zeroed(module: nn.Module, groups: Sequence[Group], gone: Sequence[int]) -> nn.Module:
    """The slow reference: all parameters of these units set to zero, and nothing removed."""
    tensors = named_tensors(module)
    with torch.no_grad():
        for group in groups:
            for (name, axis), by_unit in group.places.items():
                if isinstance(tensors[name], nn.Parameter):
                    for unit, indices in zip(group.units, by_unit, strict=True):
                        if unit in gone:
                            tensors[name].index_fill_(axis, torch.from_numpy(indices), 0.0)
    return module
