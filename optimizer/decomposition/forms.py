"""Forms: what chain of smaller layers a layer becomes, by kind of decomposition and ranks.

A form is links, each a convolution or a linear layer of its own. It makes layers and counts what
they cost; the values of their weights come from `optimizer.decomposition.factors`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from optimizer.decomposition import bounds

Layer = nn.Conv2d | nn.Linear
CONVOLUTIONS = ("tucker", "tensor_train", "cp")
MATRICES = ("weighted_svd", "svd")


@dataclass(frozen=True)
class Link:
    """A layer of the chain. `axes` are those of space that it works on (`y`, `x`): with the
    kernel, stride, padding and dilation of the original there, and 1x1 else."""

    n_in: int
    n_out: int
    axes: str = ""
    groups: int = 1


@dataclass(frozen=True)
class Cost:
    """Of one sample: multiply-accumulates, and weights that are read."""

    macs: int
    weights: int

    def is_below(self, other: "Cost") -> bool:
        return self.macs < other.macs and self.weights < other.weights


@dataclass(frozen=True)
class Geometry:
    """A layer's sides. For linear layers kernel, input and output are (1, positions)."""

    n_in: int
    n_out: int
    kernel: tuple[int, int]
    input_size: tuple[int, int]
    """[y, x] of one sample."""
    output_size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the weight, [out, in, y, x]."""
        return self.n_out, self.n_in, *self.kernel

    @property
    def is_matrix(self) -> bool:
        return prod(self.kernel) == 1

    @property
    def cost(self) -> Cost:
        return self.cost_of([Link(self.n_in, self.n_out, "yx")])

    def cost_of(self, links: Sequence[Link]) -> Cost:
        size = list(self.input_size)
        macs = weights = 0
        for link in links:
            for axis, name in enumerate("yx"):
                if name in link.axes:
                    size[axis] = self.output_size[axis]
            kernel = prod(self.kernel["yx".index(name)] for name in link.axes)
            n_weights = link.n_in // link.groups * link.n_out * kernel
            macs += n_weights * prod(size)
            weights += n_weights
        return Cost(macs, weights)


def links_of(name: str, geometry: Geometry, form: str, ranks: Sequence[int]) -> tuple[Link, ...]:
    """The chain of a layer called `name`. Raises ValueError for ranks that the form can't have."""
    bounds.check_ranks(name, form, geometry.shape, ranks)
    return _LINKS[form](geometry, ranks)


def max_ranks(geometry: Geometry, form: str) -> tuple[int, ...]:
    """The largest rank of each kind that the form has; at all of them it is exact."""
    return bounds.max_ranks(form, geometry.shape)


def chain(layer: Layer, name: str, form: str, ranks: Sequence[int]) -> nn.Sequential:
    """The layers that take the place of `layer`, on its device, in its type and frozen as it is.

    The last has the layer's own bias, all weights are zeros. Nothing is drawn at random.
    """
    if isinstance(layer, nn.Linear):
        links = links_of(name, linear_geometry(layer, 1), form, ranks)
        parts: list[Layer] = [_empty(layer, nn.Linear, one.n_in, one.n_out) for one in links]
    else:
        links = links_of(name, convolution_geometry(layer, (1, 1), (1, 1)), form, ranks)
        parts = [_convolution(layer, link) for link in links]
    for part in parts:
        nn.init.zeros_(part.weight)
        part.weight.requires_grad_(layer.weight.requires_grad)
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    parts[-1].register_parameter("bias", bias)
    return nn.Sequential(*parts).train(layer.training)


def linear_geometry(layer: nn.Linear, n_positions: int) -> Geometry:
    size = (1, n_positions)
    return Geometry(layer.in_features, layer.out_features, (1, 1), size, size)


def convolution_geometry(
    layer: nn.Conv2d, input_size: tuple[int, int], output_size: tuple[int, int]
) -> Geometry:
    height, width = layer.kernel_size
    return Geometry(layer.in_channels, layer.out_channels, (height, width), input_size, output_size)


def _tucker(geometry: Geometry, ranks: Sequence[int]) -> tuple[Link, ...]:
    first, last = ranks
    return (
        Link(geometry.n_in, first),
        Link(first, last, "yx"),
        Link(last, geometry.n_out),
    )


def _cp(geometry: Geometry, ranks: Sequence[int]) -> tuple[Link, ...]:
    (rank,) = ranks
    return (
        Link(geometry.n_in, rank),
        Link(rank, rank, "y", groups=rank),
        Link(rank, rank, "x", groups=rank),
        Link(rank, geometry.n_out),
    )


def _tensor_train(geometry: Geometry, ranks: Sequence[int]) -> tuple[Link, ...]:
    first, second, third = ranks
    return (
        Link(geometry.n_in, first),
        Link(first, second, "y"),
        Link(second, third, "x"),
        Link(third, geometry.n_out),
    )


def _svd(geometry: Geometry, ranks: Sequence[int]) -> tuple[Link, ...]:
    (rank,) = ranks
    return Link(geometry.n_in, rank, "yx"), Link(rank, geometry.n_out)


_LINKS: Mapping[str, Callable[[Geometry, Sequence[int]], tuple[Link, ...]]] = {
    "tucker": _tucker,
    "cp": _cp,
    "tensor_train": _tensor_train,
    "svd": _svd,
    "weighted_svd": _svd,
}


def _empty(layer: Layer, kind: Callable[..., Any], *sides: Any, **options: Any) -> Any:
    """A layer without a bias and with memory for weights, where and in the type `layer` is."""
    made = kind(*sides, **options, bias=False, device="meta", dtype=layer.weight.dtype)
    return made.to_empty(device=layer.weight.device)


def _convolution(layer: nn.Conv2d, link: Link) -> nn.Conv2d:
    on = [name in link.axes for name in "yx"]

    def along(values: Sequence[int], else_: int) -> tuple[int, int]:
        y, x = (value if has else else_ for value, has in zip(values, on, strict=True))
        return y, x

    padding = layer.padding
    if isinstance(padding, str):
        wanted: str | tuple[int, int] = padding if link.axes else 0  # type: ignore[assignment]
    else:
        wanted = along(padding, 0)
    made: nn.Conv2d = _empty(
        layer,
        nn.Conv2d,
        link.n_in,
        link.n_out,
        along(layer.kernel_size, 1),
        stride=along(layer.stride, 1),
        padding=wanted,
        dilation=along(layer.dilation, 1),
        groups=link.groups,
        padding_mode=layer.padding_mode,
    )
    return made
