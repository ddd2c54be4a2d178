"""Timed table: the target's latencies of layers, as techniques take their decisions by them.

It is of the model that the study started from, whatever steps lie between, since that is what is
timed; and its digest is a parameter, so that ids cover it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from optimizer.blocks import Block
from optimizer.space import Categorical, Space, Value
from optimizer.techniques import Context
from optimizer.torch_variant import read_plan
from optimizer.variant import TorchModel, TorchVariant

if TYPE_CHECKING:
    from optimizer.latency_table import LatencyTable

LATENCIES = "latencies"


def timed_table(
    model: TorchModel, context: Context, layers: Callable[[TorchModel], Iterable[Block]]
) -> "LatencyTable | None":
    """The table of the `layers` of the model that the study started from; None where not all of it
    was measured."""
    from optimizer.latency_table import latency_table

    if context.block_seconds is None:
        return None
    if isinstance(model, TorchVariant):
        model = TorchModel(model.source, read_plan(model).base)
    return latency_table(layers(model), context.block_seconds)


def table_parameter(
    table: "LatencyTable | None", when: Mapping[str, tuple[Value, ...]] | None = None
) -> Space:
    """The parameter by which ids cover the table; none where there is no table."""
    if table is None:
        return {}
    return {LATENCIES: Categorical((table.digest,), when=when or {})}


def wanted_table(wanted: object, table: "LatencyTable | None") -> "LatencyTable":
    """The target's table. Raises ValueError where it isn't that of the digest `wanted`, which is
    the parameter's value."""
    found = "missing" if table is None else table.digest
    if table is None or found != wanted:
        raise ValueError(
            f"{LATENCIES}: got {wanted}, and the target's table of latencies is {found}: want the "
            "table that the recipe was made with"
        )
    return table
