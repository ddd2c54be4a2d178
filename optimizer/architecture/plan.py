"""Plans: a network's structure as plain data, from which alone it can be built.

A plan has a digest, and equal networks have equal plans, whatever they were chosen from. It knows
neither the choices (`space`) nor torch (`networks`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optimizer.variant import Json, canonical_json

WITHOUT_INNER_WIDTH = frozenset({"conv", "depthwise"})
"""Blocks that expansion and squeezing make no difference to."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a stage: `block` by its name, out-channels, a square kernel of odd size. The
    block's inner width is `expansion` times its input's channels. `squeezes`: with a gate on its
    channels (Hu et al. 2018, squeeze and excitation). `shortcut`: its input is added where it has
    the output's shape."""

    block: str
    width: int
    kernel: int = 3
    stride: int = 1
    expansion: int = 1
    squeezes: bool = False
    shortcut: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "kernel", "stride", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: got {self.kernel}, want an odd size")


@dataclass(frozen=True)
class VisionPlan:
    """Images [n, channel, y, x] in, logits [n, class] out: scaled to `resolution` pixels a side
    where that is given, a 3×3 stem, stages of layers, the mean over pixels, a linear layer."""

    image: tuple[int, int, int]
    """Channels, height, width of what comes in."""
    n_outputs: int
    stem: int
    """Channels."""
    stages: tuple[tuple[LayerPlan, ...], ...]
    resolution: int | None = None

    def __post_init__(self) -> None:
        if not self.stages or not all(self.stages):
            raise ValueError("stages: got an empty one, want at least one layer in each")


@dataclass(frozen=True)
class EncoderLayerPlan:
    """One layer of a transformer encoder: `n_heads` of the plan's head width, and the inner width
    of the feed-forward part."""

    n_heads: int
    inner: int


@dataclass(frozen=True)
class EncoderPlan:
    """Tokens [n, length] in, one vector [n, axis] a text out: embeddings, layers that normalize
    first, the mean over tokens, a linear layer."""

    n_tokens: int
    max_length: int
    n_outputs: int
    width: int
    head_width: int
    layers: tuple[EncoderLayerPlan, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: got none, want at least one")


Plan = VisionPlan | EncoderPlan
_KINDS: Mapping[str, type[VisionPlan] | type[EncoderPlan]] = {
    "vision": VisionPlan,
    "encoder": EncoderPlan,
}


def plan_json(plan: Plan) -> Json:
    """The plan as JSON has it."""
    kind = next(name for name, one in _KINDS.items() if isinstance(plan, one))
    return {"kind": kind, **asdict(plan)}


def plan_of_json(content: Json) -> Plan:
    """The plan that `plan_json` wrote. Raises ValueError for what isn't one."""
    try:
        fields: dict[str, Any] = dict(content)
        kind = fields.pop("kind")
        if kind == "vision":
            fields["image"] = tuple(fields["image"])
            fields["stages"] = tuple(
                tuple(LayerPlan(**layer) for layer in stage) for stage in fields["stages"]
            )
        elif kind == "encoder":
            fields["layers"] = tuple(EncoderLayerPlan(**layer) for layer in fields["layers"])
        else:
            raise ValueError(f"kind: got {kind!r}, want {' or '.join(_KINDS)}")
        return _KINDS[kind](**fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not an architecture: {error}") from error


def plan_digest(plan: Plan) -> str:
    """SHA-256 (hex) of all of it."""
    return hashlib.sha256(f"architecture {canonical_json(plan_json(plan))}".encode()).hexdigest()
