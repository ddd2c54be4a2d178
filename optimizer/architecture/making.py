"""Making: the space that a spec describes, of networks in a given model's place."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from optimizer.architecture.networks import BLOCKS, BlockFactory
from optimizer.architecture.options import ArchitectureSpec, EncoderSpaceSpec, VisionSpaceSpec
from optimizer.architecture.plan import LayerPlan
from optimizer.architecture.space import (
    ArchitectureSpace,
    Decision,
    EncoderNetworks,
    Networks,
    StageChoices,
    VisionNetworks,
)
from optimizer.importable import Importable
from optimizer.model_source import Signature
from optimizer.torch_source import named_outputs
from optimizer.variant import Json, canonical_json

PRECISION = "precision"
"""The decision that is about no plan: what the network computes in."""
_BY_SIZE = ("int8", "fp32")
_IMAGE_AXES = 3
_TOKENS = 2
"""Inputs of an encoder: ids and mask."""


class Unfit(Exception):
    """No network of the space can stand in the model's place; the message says why."""


@dataclass(frozen=True)
class Place:
    """What the networks take and give: `image` [channel, y, x] or None for tokens, and how many
    values a sample."""

    image: tuple[int, int, int] | None
    n_outputs: int

    def to_json(self) -> Json:
        return {"image": self.image, "n_outputs": self.n_outputs}

    @classmethod
    def of_json(cls, stored: Json) -> "Place":
        image = stored["image"]
        return cls(None if image is None else (image[0], image[1], image[2]), stored["n_outputs"])


def place_of(
    spec: ArchitectureSpec,
    signature: Signature,
    model: nn.Module,
    example: Sequence[torch.Tensor],
) -> Place:
    """The place of the model, which is run on `example` (batch first). Raises Unfit."""
    names = signature.output_names
    if len(names) != 1:
        raise Unfit(f"the model gives {', '.join(names)}, and a network of the space one output")
    with torch.inference_mode():
        (output,) = named_outputs(model(*example), names).values()
    if output.ndim != 2:
        raise Unfit(f"the model's {names[0]} is {list(output.shape[1:])} a sample, want one axis")
    shapes = [tuple(one.shape) for one in signature.inputs]
    types = [one.datatype for one in signature.inputs]
    if isinstance(spec.space, VisionSpaceSpec):
        if types != ["FP32"] or len(shapes[0]) != _IMAGE_AXES or min(shapes[0]) < 1:
            raise Unfit(
                f"the model takes {_shown(shapes, types)}, and a space of the kind vision one "
                "FP32 [channel, y, x] of fixed size"
            )
        channels, height, width = shapes[0]
        return Place((channels, height, width), output.shape[1])
    if types != ["INT64"] * _TOKENS or any(len(shape) != 1 for shape in shapes):
        raise Unfit(
            f"the model takes {_shown(shapes, types)}, and a space of the kind encoder ids and "
            "mask, INT64 [length] each"
        )
    return Place(None, output.shape[1])


def space_of(spec: ArchitectureSpec, place: Place) -> ArchitectureSpace:
    """All networks that the spec allows in that place, each in the spec's precisions. Raises Unfit
    for a block that there isn't, by its name."""
    precisions = tuple(one for one in _BY_SIZE if one in spec.precisions)
    return ArchitectureSpace(_networks(spec, place), (Decision(PRECISION, precisions),))


def factories_of(spec: ArchitectureSpec) -> dict[str, BlockFactory]:
    """The user's own blocks by name; their code is imported when one is built."""
    return {name: partial(_called, block) for name, block in spec.blocks.items()}


def space_digest(spec: ArchitectureSpec) -> str:
    """SHA-256 (hex, 16 digits) of the networks and of the code of the user's blocks; their
    precisions aren't in it, as they make no difference to a supernet."""
    digest = hashlib.sha256(canonical_json(spec.space.model_dump(mode="json")).encode())
    for name, block in sorted(spec.blocks.items()):
        digest.update(name.encode() + block.source_bytes())
    return digest.hexdigest()[:16]


def _networks(spec: ArchitectureSpec, place: Place) -> Networks:
    given = spec.space
    if isinstance(given, EncoderSpaceSpec):
        return EncoderNetworks(
            given.n_tokens, given.max_length, place.n_outputs, given.head_width, given.depths,
            given.widths, given.heads, given.inners,
        )  # fmt: skip
    known = {*BLOCKS, *spec.blocks}
    unknown = sorted({name for stage in given.stages for name in stage.blocks} - known)
    if unknown:
        raise Unfit(f"there is no block {unknown[0]!r}, want one of {', '.join(sorted(known))}")
    assert place.image is not None
    stages = tuple(StageChoices(**one.model_dump()) for one in given.stages)
    sizes = given.resolutions or (None,)
    return VisionNetworks(place.image, place.n_outputs, given.stems, stages, sizes)


def _called(block: Importable, plan: LayerPlan, n_in: int) -> nn.Module:
    made: nn.Module = block.call(plan, n_in)
    return made


def _shown(shapes: Sequence[tuple[int, ...]], types: Sequence[str]) -> str:
    pairs = zip(types, shapes, strict=True)
    return ", ".join(f"{kind} {list(shape)}" for kind, shape in pairs)
