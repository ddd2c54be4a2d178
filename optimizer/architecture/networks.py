"""Networks: torch modules built from plans.

Every tensor of a smaller network is the leading part of a larger one's under the same name (the
middle of a larger kernel), which is what lets them share weights (`supernet`). Blocks are in a
table, and users may add to it.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from optimizer.architecture.plan import EncoderPlan, LayerPlan, Plan, VisionPlan

BlockFactory = Callable[[LayerPlan, int], nn.Module]
"""Builds a layer from its plan and its in-channels; it maps [n, in-channel, y, x] to [n, width,
y / stride, x / stride]."""
_SQUEEZE = 4
"""A gate's inner width is the channels by this (Hu et al. 2018 take 16, MobileNetV3 4)."""


def build(plan: Plan, blocks: Mapping[str, BlockFactory] | None = None) -> nn.Module:
    """The network with weights drawn by torch's generator; `blocks` are further ones by name.
    Raises ValueError for a block that there isn't or that can't be built, by its name."""
    if isinstance(plan, EncoderPlan):
        return EncoderNetwork(plan)
    return VisionNetwork(plan, {**BLOCKS, **(blocks or {})})


class VisionNetwork(nn.Module):
    """[n, channel, y, x] float32 to [n, class]."""

    def __init__(self, plan: VisionPlan, blocks: Mapping[str, BlockFactory]) -> None:
        super().__init__()
        self._resolution = plan.resolution
        n_channels = plan.stem
        self.stem = _convolution(plan.image[0], plan.stem, 3)
        stages = []
        for number, stage in enumerate(plan.stages):
            layers = nn.ModuleDict()
            for position, layer in enumerate(stage):
                where = f"stage {number}, layer {position}"
                layers[f"{position}_{_safe(layer.block)}"] = _block(
                    layer, n_channels, blocks, where
                )
                n_channels = layer.width
            stages.append(layers)
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(n_channels, plan.n_outputs)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image
        if self._resolution is not None and x.shape[-1] != self._resolution:
            size = (self._resolution, self._resolution)
            x = functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
        x = self.stem(x)
        for stage in self.stages:
            for layer in cast(nn.ModuleDict, stage).values():
                x = layer(x)
        return cast(torch.Tensor, self.classifier(x.mean((2, 3))))


def _block(plan: LayerPlan, n_in: int, blocks: Mapping[str, BlockFactory], where: str) -> nn.Module:
    if plan.block not in blocks:
        raise ValueError(f"{where}: got the block {plan.block!r}, want one of {sorted(blocks)}")
    try:
        layer = blocks[plan.block](plan, n_in)
    except Exception as error:
        raise ValueError(
            f"{where}: the block {plan.block!r} can't be built: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(layer, nn.Module):
        raise ValueError(
            f"{where}: the block {plan.block!r} gave a {type(layer).__name__}, want an nn.Module"
        )
    is_added = plan.shortcut and plan.stride == 1 and plan.width == n_in
    return _Added(layer) if is_added else _Alone(layer)


class _Alone(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.body(x))


class _Added(_Alone):
    """With its input added."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def _convolution(n_in: int, n_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(inplace=True),
    )


def _depthwise(n_channels: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            n_channels, n_channels, kernel, stride, kernel // 2, groups=n_channels, bias=False
        ),
        nn.BatchNorm2d(n_channels),
        nn.ReLU(inplace=True),
    )


def _projection(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out))


class _Squeeze(nn.Module):
    """Channels scaled by a gate on their means."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        inner = max(1, n_channels // _SQUEEZE)
        self.reduce = nn.Conv2d(n_channels, inner, 1)
        self.expand = nn.Conv2d(inner, n_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean((2, 3), keepdim=True)
        gate = self.expand(functional.relu(self.reduce(means)))
        return x * functional.hardsigmoid(gate)


def _conv(plan: LayerPlan, n_in: int) -> nn.Module:
    """A convolution, normalized, with a ReLU."""
    return _convolution(n_in, plan.width, plan.kernel, plan.stride)


def _separable(plan: LayerPlan, n_in: int) -> nn.Module:
    """Depthwise, then pointwise (Howard et al. 2017, MobileNet)."""
    return nn.Sequential(
        _depthwise(n_in, plan.kernel, plan.stride), _convolution(n_in, plan.width, 1)
    )


class _Inverted(nn.Module):
    """1×1 wider, depthwise, gate, 1×1 back without a nonlinearity (Sandler et al. 2018,
    MobileNetV2; Tan et al. 2019, MnasNet)."""

    def __init__(self, plan: LayerPlan, n_in: int) -> None:
        super().__init__()
        inner = n_in * plan.expansion
        self.widen = _convolution(n_in, inner, 1) if plan.expansion > 1 else nn.Identity()
        self.filter = _depthwise(inner, plan.kernel, plan.stride)
        self.gate = _Squeeze(inner) if plan.squeezes else nn.Identity()
        self.project = _projection(inner, plan.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.project(self.gate(self.filter(self.widen(x)))))


class _FusedInverted(nn.Module):
    """k×k wider, gate, 1×1 back (Tan and Le 2021, EfficientNetV2)."""

    def __init__(self, plan: LayerPlan, n_in: int) -> None:
        super().__init__()
        inner = n_in * plan.expansion
        self.widen = _convolution(n_in, inner, plan.kernel, plan.stride)
        self.gate = _Squeeze(inner) if plan.squeezes else nn.Identity()
        self.project = _projection(inner, plan.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.project(self.gate(self.widen(x))))


class _Basic(nn.Module):
    """Two convolutions, of which the first is `expansion` times its input wide (He et al. 2016,
    but without a ReLU after the addition)."""

    def __init__(self, plan: LayerPlan, n_in: int) -> None:
        super().__init__()
        inner = n_in * plan.expansion
        self.first = _convolution(n_in, inner, plan.kernel, plan.stride)
        self.gate = _Squeeze(inner) if plan.squeezes else nn.Identity()
        self.second = nn.Sequential(
            nn.Conv2d(inner, plan.width, plan.kernel, 1, plan.kernel // 2, bias=False),
            nn.BatchNorm2d(plan.width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.second(self.gate(self.first(x))))


BLOCKS: Mapping[str, BlockFactory] = {
    "conv": _conv,
    "depthwise": _separable,
    "mbconv": _Inverted,
    "fused_mbconv": _FusedInverted,
    "basic": _Basic,
}


def _safe(name: str) -> str:
    """The name as a module's: without dots and colons."""
    return name.replace(".", "_").replace(":", "_")


class EncoderNetwork(nn.Module):
    """`input_ids` and `attention_mask` [n, length] int64 to [n, axis] float32."""

    def __init__(self, plan: EncoderPlan) -> None:
        super().__init__()
        self.tokens = nn.Embedding(plan.n_tokens, plan.width)
        self.positions = nn.Embedding(plan.max_length, plan.width)
        self.layers = nn.ModuleList(
            _EncoderLayer(plan.width, layer.n_heads, plan.head_width, layer.inner)
            for layer in plan.layers
        )
        self.norm = nn.LayerNorm(plan.width)
        self.output = nn.Linear(plan.width, plan.n_outputs)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(places)
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, mask)
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        means = (self.norm(x) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return cast(torch.Tensor, self.output(means))


class _EncoderLayer(nn.Module):
    """Attention and a feed-forward part, each behind a normalization (Xiong et al. 2020)."""

    def __init__(self, width: int, n_heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self._n_heads = n_heads
        self._head_width = head_width
        total = n_heads * head_width
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, total)
        self.key = nn.Linear(width, total)
        self.value = nn.Linear(width, total)
        self.join = nn.Linear(total, width)
        self.forward_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, inner)
        self.project = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [n, length, width], mask [n, 1, 1, length] true where there is a token."""
        normed = self.attention_norm(x)
        n, length, _ = x.shape

        def heads(made: torch.Tensor) -> torch.Tensor:
            return made.view(n, length, self._n_heads, self._head_width).transpose(1, 2)

        attended = functional.scaled_dot_product_attention(
            heads(self.query(normed)),
            heads(self.key(normed)),
            heads(self.value(normed)),
            attn_mask=mask,
        )
        x = x + self.join(attended.transpose(1, 2).reshape(n, length, -1))
        return x + cast(
            torch.Tensor, self.project(functional.gelu(self.widen(self.forward_norm(x))))
        )
