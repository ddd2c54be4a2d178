"""Techniques of one's own: a ResNet with fewer blocks and narrower inner layers, and
its training by distillation. Small and plain, as an example of the contract.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from optimizer.recipe import EFFORTS, Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_source import load_source
from optimizer.torch_variant import load_torch, torch_model
from optimizer.variant import Json, Kind, Model, Stage, TorchModel, TorchVariant

N_STAGES = 3
# effort -> passes over the training split
EPOCHS = {"recalibrate": 0.0, "short": 0.1, "full": 1.0}
_RECALIBRATED_ON = 1024
_BATCH_SIZE = 64
_RATE = 0.02
_TEMPERATURE = 4.0


class Shrink:
    """Keeps the first blocks of each stage, and in all blocks those inner channels that have the
    largest batch-norm scales (Liu et al. 2017, "Network Slimming", without its sparsity training).
    """

    traits = Traits(
        "shrink", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH, packages=("torch",), preserves=False
    )

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, TorchModel)
        stages = _stages(load_torch(model))
        return None if len(stages) == N_STAGES else "the model is no ResNet of three stages"

    def space(self, model: Model, context: Context) -> Space:
        assert isinstance(model, TorchModel)
        stages = _stages(load_torch(model))
        depths = {
            f"blocks_{number}": Categorical(tuple(range(len(stage), 0, -1)))
            for number, stage in enumerate(stages, 1)
        }
        return {**depths, "width": Categorical((1.0, 0.5))}

    def describe(self, parameters: Parameters) -> str:
        blocks = "-".join(str(parameters[f"blocks_{n}"]) for n in range(1, N_STAGES + 1))
        return f"{blocks} blocks, width {parameters['width']}"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        module = load_torch(model)
        operations = {
            "blocks": [int(parameters[f"blocks_{n}"]) for n in range(1, N_STAGES + 1)],
            "kept": _kept_channels(module, float(parameters["width"])),
        }
        return torch_model(directory, model, self.restructure(module, operations), self, operations)

    def restructure(self, module: nn.Module, operations: Json) -> nn.Module:
        for stage, n_blocks, kept in zip(
            _stages(module), operations["blocks"], operations["kept"], strict=True
        ):
            del stage[n_blocks:]
            for block, channels in zip(stage, kept, strict=False):
                _narrow(block, torch.tensor(channels))
        return module


class Distill:
    """Recalibrates batch normalization, then trains with the base as teacher (Hinton et al. 2015,
    with its hard labels left out), one cycle of the learning rate."""

    traits = Traits(
        "distill", "1", Stage.RECOVER, Kind.TORCH, Kind.TORCH, Needs.UNLABELLED, ("torch",),
        optional=False, preserves=False,
    )  # fmt: skip
    passes = EPOCHS

    def check(self, model: Model, context: Context) -> str | None:
        return None

    def space(self, model: Model, context: Context) -> Space:
        return {"effort": Categorical(tuple(reversed(EFFORTS)))}

    def describe(self, parameters: Parameters) -> str:
        return f"distilled {self.passes[str(parameters['effort'])]:g} epochs"

    def epochs(self, parameters: Parameters, context: Context) -> float:
        return self.passes[str(parameters["effort"])]

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        assert context.train is not None
        module, teacher = load_torch(model), load_source(model.source)
        rng = np.random.default_rng(context.seed)
        n_samples = int(self.passes[str(parameters["effort"])] * len(context.train))
        order = rng.permutation(len(context.train))
        _train(module, teacher, context, order[:n_samples], rng)
        _recalibrate(module, context, order[:_RECALIBRATED_ON])
        return torch_model(directory, model, module)


def _stages(module: nn.Module) -> list[nn.Sequential]:
    return [part for part in module.children() if isinstance(part, nn.Sequential)]


def _kept_channels(module: nn.Module, width: float) -> list[list[list[int]]]:
    """By stage and block, the inner channels that stay, in order."""
    kept = []
    for stage in _stages(module):
        scales = [block.bn1.weight.detach().abs() for block in stage]
        n_kept = max(1, round(width * len(scales[0])))
        kept.append([sorted(one.topk(n_kept).indices.tolist()) for one in scales])
    return kept


def _narrow(block: nn.Module, kept: torch.Tensor) -> None:
    """Keep only those of the channels between the block's two convolutions."""
    first, norm, second = block.conv1, block.bn1, block.conv2
    first.weight = nn.Parameter(first.weight.detach()[kept].clone())
    second.weight = nn.Parameter(second.weight.detach()[:, kept].clone())
    norm.weight = nn.Parameter(norm.weight.detach()[kept].clone())
    norm.bias = nn.Parameter(norm.bias.detach()[kept].clone())
    norm.running_mean = norm.running_mean[kept].clone()
    norm.running_var = norm.running_var[kept].clone()
    first.out_channels = second.in_channels = norm.num_features = len(kept)


def _train(
    module: nn.Module,
    teacher: nn.Module,
    context: Context,
    order: np.ndarray,
    rng: np.random.Generator,
) -> None:
    steps = max(1, len(order) // _BATCH_SIZE)
    if not len(order):
        return
    optimizer = torch.optim.SGD(module.parameters(), _RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    module.train()
    for step in range(steps):
        images = _images(context, order[step * _BATCH_SIZE : (step + 1) * _BATCH_SIZE])
        if rng.random() < 0.5:  # the same for the whole batch, so that the teacher sees it too
            images = images.flip(-1)
        with torch.no_grad():
            wanted = functional.log_softmax(teacher(images) / _TEMPERATURE, dim=1)
        given = functional.log_softmax(module(images) / _TEMPERATURE, dim=1)
        loss = functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        (loss * _TEMPERATURE**2).backward()
        optimizer.step()
        schedule.step()
    module.eval()


def _recalibrate(module: nn.Module, context: Context, order: np.ndarray) -> None:
    """Statistics as the plain average over training images."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for start in range(0, len(order), _BATCH_SIZE):
            module(_images(context, order[start : start + _BATCH_SIZE]))
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


def _images(context: Context, rows: np.ndarray) -> torch.Tensor:
    assert context.train is not None
    (images,) = context.train.read(rows).inputs.values()
    return torch.from_numpy(images)
