"""Latency table: seconds of single layers on the target, at some of their widths, as plain data.

It knows layers by their operator (kernel, stride, padding, dilation, size of the input) and finds
seconds by widths, between those measured by interpolation. It measures nothing
(`optimizer.estimates` does), and knows no network.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from optimizer.blocks import Block

_TILE = 8
"""Widths of the table are multiples of it, but for the layer's own."""
_N_OUTPUTS, _N_INPUTS = 6, 3
"""Widths along each axis, at most."""

Seconds = Callable[[Block], float | None]
Grid = Sequence[Sequence[Block]]


def table_blocks(layers: Iterable[Block]) -> list[Block]:
    """What a table of these layers has to have, each once: at fewer outputs and inputs."""
    found = {one: None for layer in layers for row in _grid(layer) for one in row}
    return list(found)


def latency_table(layers: Iterable[Block], seconds: Seconds) -> "LatencyTable | None":
    """The table of these layers; None where there are none, or one of `table_blocks` has no
    seconds."""
    layers = list(dict.fromkeys(layers))
    found = {one: seconds(one) for one in table_blocks(layers)}
    known = {one: given for one, given in found.items() if given is not None}
    return LatencyTable(layers, known) if found and len(known) == len(found) else None


class LatencyTable:
    """For one batch of the size that it was measured at."""

    def __init__(self, layers: Sequence[Block], seconds: Mapping[Block, float]) -> None:
        """`seconds` are of all `table_blocks(layers)`."""
        self._layers = layers
        self._seconds = seconds

    @property
    def digest(self) -> str:
        """SHA-256 (hex, 16 digits) of what was measured; whatever the order."""
        content = sorted(f"{block.key} {found!r}" for block, found in self._seconds.items())
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]

    def row(self, layer: Block) -> "Row | None":
        """By the narrowest layer measured that differs in its widths alone (a bias aside) and isn't
        narrower along either; None where there is none."""
        wide = [one for one in self._layers if _is_covered(layer, one)]
        if not wide:
            return None
        least = min(wide, key=lambda one: (one.n_outputs * _n_inputs(one), one.bias != layer.bias))
        return Row(layer, _grid(least), self._seconds)


class Row:
    """One layer's seconds by the shares of its widths that are left."""

    def __init__(self, layer: Block, grid: Grid, seconds: Mapping[Block, float]) -> None:
        self._full = layer.n_outputs, _n_inputs(layer)
        self._outputs = np.array([row[0].n_outputs for row in grid], dtype=np.float64)
        self._inputs = np.array([_n_inputs(one) for one in grid[0]], dtype=np.float64)
        self._seconds = np.array([[seconds[one] for one in row] for row in grid])

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


def _is_covered(layer: Block, by: Block) -> bool:
    return (
        _operator(layer) == _operator(by)
        and layer.n_outputs <= by.n_outputs
        and _n_inputs(layer) <= _n_inputs(by)
    )


def _operator(block: Block) -> tuple[bool, Block]:
    """The layer at width 1, or as one of its groups; and which of the two."""
    is_grouped = block.groups > 1
    n_outputs, n_inputs = _per_group(block) if is_grouped else (1, 1)
    return is_grouped, replace(_narrowed(block, n_outputs, n_inputs), groups=1, bias=True)


def _grid(block: Block) -> Grid:
    """[outputs][inputs], both rising to the layer's own. Grouped layers, whose groups go as a
    whole, have one axis: their groups."""
    if block.groups > 1:
        n_outputs, n_inputs = _per_group(block)
        return [
            [replace(_narrowed(block, n * n_outputs, n * n_inputs), groups=n)]
            for n in _widths(block.groups, _N_OUTPUTS)
        ]
    return [
        [_narrowed(block, n_outputs, n_inputs) for n_inputs in _widths(_n_inputs(block), _N_INPUTS)]
        for n_outputs in _widths(block.n_outputs, _N_OUTPUTS)
    ]


def _per_group(block: Block) -> tuple[int, int]:
    return block.n_outputs // block.groups, _n_inputs(block) // block.groups


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
