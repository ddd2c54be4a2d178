"""Fake quantization: layers that compute in fp32 what they will compute from 8 bits.

Within it, weights and activations are rounded by the arithmetic of `optimizer.quantization`, and
gradients pass as if they weren't, but for what is clipped (the straight-through estimator of Jacob
et al. 2018, "Quantization and Training of Neural Networks", section 3). It knows no loss and no
loop, and nothing of it stays in the module.

Batch normalization runs by its statistics as they are: the graph has it folded into the weights.
Rounding needs no folding, since a weight's scale is its output channel's own: rounding γ / σ × w
gives γ / σ times the rounded w.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from optimizer.quantization import ranges
from optimizer.quantization.histogram import Histogram
from optimizer.quantization.qdq import Arithmetic, Levels, levels_of
from optimizer.quantization.ranges import N_LEVELS
from optimizer.quantization.weights import quantize
from optimizer.training.batches import Batch

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Whose weights [output, ...] the graph can have in 8 bits. Subclasses with a `forward` of their
own are left alone."""
_RECTIFIERS = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})
"""Functions of torch behind which alone a result is in 8 bits."""
_FORWARD = "forward"


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be rounded, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, LAYERS) and _is_plain(part, LAYERS)
    }


@contextmanager
def fake_quantized(
    module: nn.Module, batches: Iterable[Batch], arithmetic: Arithmetic
) -> Iterator[tuple[str, ...]]:
    """The module in place, as in 8 bits; the names of the layers that are.

    Ranges of activations are those with the least squared error over the batches, for as long as
    it lasts. Layers that don't run are left as they are: the names lack them, as they lack those
    whose weights other code reads past the layer. Raises NotFinite where an activation isn't
    finite, and ValueError without a layer that runs.
    """
    with _layer_by_layer(), _observed_and_rounded(module, batches, arithmetic) as names:
        yield names


@contextmanager
def _observed_and_rounded(
    module: nn.Module, batches: Iterable[Batch], arithmetic: Arithmetic
) -> Iterator[tuple[str, ...]]:
    inputs, outputs = _observed(module, batches)
    if not inputs:
        raise ValueError("got a module without a convolution or linear layer that runs")
    parts = dict(module.named_modules())
    forwards = {n: _frozen(part) for n, part in parts.items() if _is_frozen(part)}
    for name, histogram in inputs.items():
        forwards[name] = _rounded(parts[name], _levels(histogram, arithmetic), arithmetic)
    hooks = [
        parts[name].register_forward_hook(_rounding(_levels(histogram, arithmetic)))
        for name, histogram in outputs.items()
    ]
    try:
        for name, forward in forwards.items():
            # Of the instance, before that of its class: names and state stay as they are.
            parts[name].__dict__[_FORWARD] = forward
        yield tuple(inputs)
    finally:
        for name in forwards:
            parts[name].__dict__.pop(_FORWARD, None)
        for one in hooks:
            one.remove()


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Without torch's short cut for encoders in eval mode, which reads weights past the layers."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def settle(module: nn.Module, names: Iterable[str], arithmetic: Arithmetic) -> None:
    """Set the weights of the layers named to what they will be restored as.

    What is trained with rounded weights is right with those. Rounding them again changes nothing,
    whichever normalization is folded into them, so nothing makes up for it a second time, as the
    correction of biases would.
    """
    with torch.no_grad():
        for name in names:
            weight = module.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(fake_weight(weight, arithmetic))


def fake_weight(weight: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    """What the weight [output, ...] will be restored as."""
    found: torch.Tensor = _Weight.apply(weight, arithmetic)  # type: ignore[no-untyped-call]
    return found


def fake_activation(values: torch.Tensor, levels: Levels) -> torch.Tensor:
    """What the values will be restored as."""
    low = -N_LEVELS // 2 if levels.signed else 0
    return torch.fake_quantize_per_tensor_affine(
        values.float(), levels.scale, levels.zero, low, low + N_LEVELS - 1
    )


class _Weight(torch.autograd.Function):
    """Rounds; its gradient is that of the identity where nothing was clipped."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
        values = weight.detach().float().numpy()
        ctx.mark = torch.ones_like(weight, dtype=torch.bool)
        if not bool(torch.isfinite(weight).all()):  # the loss will tell
            return weight.clone()
        found = quantize(
            values, 0, pairs_saturate=arithmetic.pairs_saturate, least_error=arithmetic.least_error
        )
        restored = torch.from_numpy(found.restored())
        halves = torch.from_numpy(found.scales).reshape(-1, *[1] * (weight.ndim - 1)) / 2
        # Rounding moves a weight by half a step at most.
        ctx.mark = (restored - weight.detach()).abs() <= halves * (1 + 1e-4)
        return restored

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.mark, None


def _levels(histogram: Histogram, arithmetic: Arithmetic) -> Levels:
    return levels_of(ranges.mse(histogram), arithmetic.signed)


def _rounded(
    part: nn.Module, levels: Levels, arithmetic: Arithmetic
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's `forward`, with its input and weights rounded."""
    assert isinstance(part, _ConvNd | nn.Linear)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        weight = fake_weight(part.weight, arithmetic)
        inputs = fake_activation(inputs, levels)
        if isinstance(part, nn.Linear):
            return functional.linear(inputs, weight, part.bias)
        return part._conv_forward(inputs, weight, part.bias)

    return forward


def _frozen(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The normalization's `forward` in eval mode, whatever mode it is in."""
    assert isinstance(norm, _BatchNorm)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(
            inputs, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )

    return forward


def _rounding(levels: Levels) -> Callable[..., torch.Tensor]:
    def hook(_part: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return fake_activation(output, levels)

    return hook


def _is_frozen(part: nn.Module) -> bool:
    has_statistics = isinstance(part, _BatchNorm) and part.running_mean is not None
    return has_statistics and _is_plain(part, (_BatchNorm,))


def _is_plain(part: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it computes what torch's class of it does."""
    return _FORWARD not in part.__dict__ and any(type(part).forward is k.forward for k in kinds)


# --- what the tensors hold


def _observed(
    module: nn.Module, batches: Iterable[Batch]
) -> tuple[dict[str, Histogram], dict[str, Histogram]]:
    """Of what the layers take, and of what convolutions give where that is in 8 bits, by the name
    of the module; in the order in which they run."""
    module.eval()
    inputs: dict[str, Histogram] = {}
    outputs: dict[str, Histogram] = {}
    ends: tuple[str, ...] | None = None
    layers = layers_of(module)
    for batch in batches:
        if ends is None:
            ends = _ends(module, batch)
        with torch.no_grad(), _watched(module, layers, ends, inputs, outputs):
            module(*batch.inputs)
    return inputs, outputs


@contextmanager
def _watched(
    module: nn.Module,
    layers: Iterable[str],
    ends: Iterable[str],
    inputs: dict[str, Histogram],
    outputs: dict[str, Histogram],
) -> Iterator[None]:
    def before(name: str) -> Any:
        def add(_part: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            inputs.setdefault(name, Histogram()).add(given[0].numpy())

        return add

    def behind(name: str) -> Any:
        def add(_part: nn.Module, _given: Any, output: torch.Tensor) -> None:
            outputs.setdefault(name, Histogram()).add(output.numpy())

        return add

    hooks = [module.get_submodule(n).register_forward_pre_hook(before(n)) for n in layers]
    hooks += [module.get_submodule(n).register_forward_hook(behind(n)) for n in ends]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


class _Rectified(torch.overrides.TorchFunctionMode):
    """Notes the tensors that rectifiers take. It keeps them, so that their ids are their own."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _RECTIFIERS:
            self.taken[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))


def _ends(module: nn.Module, batch: Batch) -> tuple[str, ...]:
    """Names of the convolutions, or of the normalizations behind them, whose result the graph has
    in 8 bits: all but those with a rectifier behind them, whose own result is."""
    made: dict[int, tuple[str, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def note(part: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if isinstance(part, _BatchNorm) and made.pop(id(given[0]), None) is None:
                return
            made[id(output)] = (name, output)

        return note

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    watched = [
        part.register_forward_hook(hook(name))
        for name, part in module.named_modules()
        if isinstance(part, (_BatchNorm, *convolutions))
    ]
    mode = _Rectified()
    try:
        with torch.no_grad(), mode:
            module(*batch.inputs)
    finally:
        for one in watched:
            one.remove()
    return tuple(name for key, (name, _) in made.items() if key not in mode.taken)
