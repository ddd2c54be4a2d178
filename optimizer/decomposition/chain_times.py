"""Chain times: seconds of layers and of chains in their place, by the target's latency table.

A chain is the sum of its links. Each link was timed as a model of its own, so a sum has the cost
of a call once a link, and says rather too much of a chain than too little. It times nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from optimizer.blocks import Block
from optimizer.decomposition.bounds import max_ranks
from optimizer.decomposition.forms import Geometry, Link, links_of
from optimizer.latency_table import LatencyTable


@dataclass(frozen=True, eq=False)
class ChainTimes:
    """`layers` are the module's own, by name."""

    table: LatencyTable
    layers: Mapping[str, Block]

    def is_faster(self, name: str, links: Sequence[Link]) -> bool:
        """Whether these are, in the layer's place. They aren't where the table lacks either."""
        layer = self.layers.get(name)
        if layer is None:
            return False
        now = self._seconds([layer])
        then = self._seconds(link_blocks(layer, links))
        return now is not None and then is not None and then < now

    def _seconds(self, blocks: Iterable[Block]) -> float | None:
        total = 0.0
        for block in blocks:
            row = self.table.row(block)
            if row is None:
                return None
            total += row(1.0, 1.0)
        return total


def link_blocks(layer: Block, links: Sequence[Link]) -> list[Block]:
    """The blocks of a chain in the layer's place."""
    found, size = [], layer.input_shape[1:]
    for index, link in enumerate(links):
        has_bias = layer.bias and index == len(links) - 1
        if layer.kind == "linear":
            shape = (*layer.input_shape[:-1], link.n_in)
            found.append(replace(layer, input_shape=shape, n_outputs=link.n_out, bias=has_bias))
            continue
        block = _convolution(layer, link, size)
        found.append(replace(block, bias=has_bias))
        size = _output_size(block)
    return found


def layers_of_table(layers: Mapping[Block, Iterable[str]]) -> list[Block]:
    """What a latency table has to be of so that it has these layers (layer → its forms) and all
    their chains.

    These are the layers and, for each operator among the links of one layer, one link as wide as
    the widest: ranks are all that varies, so forms share their links, and a core of Tucker's, or
    either matrix of an SVD, mostly is the layer itself, narrowed.
    """
    found: dict[Block, None] = {}
    for layer, forms in layers.items():
        widest = {_operator(layer): layer}
        for form in forms:
            for link in link_blocks(layer, _largest_links(layer, form)):
                operator = _operator(link)
                widest[operator] = _widened(widest.get(operator, link), link, layer.bias)
        found |= dict.fromkeys(widest.values())
    return list(found)


def _largest_links(layer: Block, form: str) -> tuple[Link, ...]:
    """At the largest ranks that rules give; of CP those are Tucker's."""
    sides = Geometry(_n_inputs(layer), layer.n_outputs, _kernel(layer), (1, 1), (1, 1))
    ranks = max_ranks(form, sides.shape)
    if form == "cp":
        ranks = (max(max_ranks("tucker", sides.shape)),)
    return links_of("", sides, form, ranks)


def _kernel(layer: Block) -> tuple[int, int]:
    height, width = layer.kernel or (1, 1)
    return height, width


def _convolution(layer: Block, link: Link, size: Sequence[int]) -> Block:
    """The link on an input of that size [y, x]: along its axes as the layer, else 1x1."""
    on = [name in link.axes for name in "yx"]

    def along(values: Sequence[int], else_: int) -> tuple[int, ...]:
        return tuple(value if has else else_ for value, has in zip(values, on * 2, strict=False))

    return replace(
        layer,
        input_shape=(link.n_in, *size),
        n_outputs=link.n_out,
        kernel=along(layer.kernel, 1),
        stride=along(layer.stride, 1),
        padding=along(layer.padding, 0),
        dilation=along(layer.dilation, 1),
        groups=link.groups,
    )


def _output_size(block: Block) -> tuple[int, ...]:
    """[y, x]."""
    before, after = block.padding[:2], block.padding[2:]
    sides = zip(
        block.input_shape[1:], before, after, block.dilation, block.kernel, block.stride,
        strict=True,
    )  # fmt: skip
    return tuple(
        (size + first + last - dilation * (kernel - 1) - 1) // stride + 1
        for size, first, last, dilation, kernel, stride in sides
    )


def _operator(block: Block) -> Block:
    """What blocks of one kind have in common, whatever their widths."""
    return replace(_wide(block, 1, 1), groups=min(block.groups, 2), bias=True)


def _widened(block: Block, other: Block, bias: bool) -> Block:
    """As wide as the wider of the two along each axis."""
    n_outputs = max(block.n_outputs, other.n_outputs)
    made = _wide(block, n_outputs, max(_n_inputs(block), _n_inputs(other)))
    return replace(made, groups=max(block.groups, other.groups), bias=bias)


def _wide(block: Block, n_outputs: int, n_inputs: int) -> Block:
    shape = list(block.input_shape)
    shape[-1 if block.kind == "linear" else 0] = n_inputs
    return replace(block, input_shape=tuple(shape), n_outputs=n_outputs)


def _n_inputs(block: Block) -> int:
    return block.input_shape[-1 if block.kind == "linear" else 0]
