"""Latency: what a network's layers take on the target, by how many units each group has lost.

The seconds come from a table of single layers at some widths, measured on the target; between its
widths they are interpolated. So what a channel is worth is what the machine gains by it, which
isn't what is counted: kernels work in tiles. It measures nothing (`optimizer.estimates` does).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from optimizer.blocks import Block
from optimizer.pruning.costs import Costs, Counts

_TILE = 8
"""Widths of the table are multiples of it, but for the layer's own."""
_N_OUTPUTS, _N_INPUTS = 6, 3
"""Widths along each axis, at most."""

Seconds = Callable[[Block], float | None]


def table_blocks(blocks: Iterable[Block]) -> list[Block]:
    """The layers that a table of these has to have, each once: at fewer outputs and inputs."""
    found = {one: None for block in blocks for row in _grid(block) for one in row}
    return list(found)


def table_digest(blocks: Iterable[Block], seconds: Seconds) -> str | None:
    """SHA-256 (hex, 16 digits) of the table's times; None where one is missing."""
    content = []
    for block in table_blocks(blocks):
        found = seconds(block)
        if found is None:
            return None
        content.append(f"{block.key} {found!r}")
    return hashlib.sha256("\n".join(sorted(content)).encode()).hexdigest()[:16]


class Latency:
    """For one batch of the table. What isn't in it (attention's products, grouped convolutions)
    is taken at the seconds that a counted multiply-add costs on average in what is."""

    def __init__(self, costs: Costs, blocks: Mapping[str, Block], seconds: Seconds) -> None:
        """`blocks` are the layers' by name, all of whose `table_blocks` have seconds."""
        self._costs = costs
        self._rows = {
            row: _Row(block, seconds)
            for row, name in enumerate(costs.layers)
            if (block := blocks.get(name)) is not None
        }

    def seconds(self, gone: Counts) -> float:
        """What is left of the network takes."""
        counted = self._costs.efforts(gone, multiple=1)
        others = counted.sum() - counted[list(self._rows)].sum()
        return self._known(gone) + float(others) * self._per_effort

    def _known(self, gone: Counts) -> float:
        """Of what is in the table."""
        outputs, inputs = self._costs.shares(gone)
        return sum(row(outputs[at], inputs[at]) for at, row in self._rows.items())

    @cached_property
    def _per_effort(self) -> float:
        whole = np.zeros(self._costs.n_groups, dtype=np.int64)
        counted = float(self._costs.efforts(whole, multiple=1)[list(self._rows)].sum())
        return self._known(whole) / counted if counted > 0 else 0.0


class _Row:
    """One layer's seconds by the shares of its widths that are left."""

    def __init__(self, block: Block, seconds: Seconds) -> None:
        grid = _grid(block)
        self._full = block.n_outputs, _n_inputs(block)
        self._outputs = np.array([row[0].n_outputs for row in grid], dtype=np.float64)
        self._inputs = np.array([_n_inputs(one) for one in grid[0]], dtype=np.float64)
        self._seconds = np.array([[_known(one, seconds) for one in row] for row in grid])

    def __call__(self, outputs: float, inputs: float) -> float:
        """Interpolated linearly along both axes; below the table by the line through 0 and its
        least. A layer with one axis of widths goes by its outputs."""
        at_outputs, scale = _within(outputs * self._full[0], self._outputs)
        if len(self._inputs) == 1:
            return float(np.interp(at_outputs, self._outputs, self._seconds[:, 0]) * scale)
        at_inputs, scale_inputs = _within(inputs * self._full[1], self._inputs)
        by_output = [np.interp(at_inputs, self._inputs, row) for row in self._seconds]
        return float(np.interp(at_outputs, self._outputs, by_output) * scale * scale_inputs)


def _within(width: float, widths: NDArray[np.float64]) -> tuple[float, float]:
    """The width in the table that stands for it, and the share of its seconds."""
    least = float(widths[0])
    return (width, 1.0) if width >= least else (least, width / least)


def _grid(block: Block) -> list[list[Block]]:
    """[outputs][inputs], both rising to the layer's own. Depthwise layers have one axis; layers
    in other groups are what they are."""
    if block.groups == 1:
        return [
            [
                _narrowed(block, n_outputs, n_inputs)
                for n_inputs in _widths(_n_inputs(block), _N_INPUTS)
            ]
            for n_outputs in _widths(block.n_outputs, _N_OUTPUTS)
        ]
    if block.groups == block.n_outputs == _n_inputs(block):
        widths = _widths(block.n_outputs, _N_OUTPUTS)
        return [[replace(_narrowed(block, n, n), groups=n)] for n in widths]
    return [[block]]


def _narrowed(block: Block, n_outputs: int, n_inputs: int) -> Block:
    shape = list(block.input_shape)
    shape[_channel_axis(block)] = n_inputs
    return replace(block, input_shape=tuple(shape), n_outputs=n_outputs)


def _n_inputs(block: Block) -> int:
    return block.input_shape[_channel_axis(block)]


def _channel_axis(block: Block) -> int:
    return 0 if block.kind == "conv" else -1


def _widths(full: int, n: int) -> list[int]:
    """At most `n` multiples of the tile, evenly spread, up to the full width."""
    tiles = range(_TILE, full, _TILE)
    if len(tiles) >= n:
        spread: Sequence[int] = [
            round(full * share / n / _TILE) * _TILE or _TILE for share in range(1, n)
        ]
    else:
        spread = tiles
    return sorted({one for one in spread if one < full} | {full})


def _known(block: Block, seconds: Seconds) -> float:
    found = seconds(block)
    if found is None:
        raise ValueError(f"the table of latencies lacks {block}")
    return found
