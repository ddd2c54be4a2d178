"""Techniques made for tests: they do real work on a `nn.Sequential`, in milliseconds."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_source import load_source
from optimizer.torch_variant import load_torch, torch_model
from optimizer.variant import Json, Kind, Model, Stage, TorchModel, TorchVariant

N_STEPS = {"recalibrate": 0, "short": 2, "full": 6}


class Narrow:
    """Removes hidden channels of the first convolution, those with the smallest weights."""

    traits = Traits(
        "narrow", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH, packages=("torch",), preserves=False
    )

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, TorchModel)
        if len(_convolutions(load_torch(model))) < 2:
            return "the model has no two convolutions in a row"
        return None

    def space(self, model: Model, context: Context) -> Space:
        return {"width": Categorical((0.75, 0.5))}

    def describe(self, parameters: Parameters) -> str:
        return f"{parameters['width']} of the channels"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        module = load_torch(model)
        weight = _convolutions(module)[0].weight  # [out, in, height, width]
        n_kept = int(len(weight) * float(parameters["width"]))
        order = weight.abs().sum(dim=(1, 2, 3)).argsort(descending=True, stable=True)
        operations = {"kept": sorted(order[:n_kept].tolist())}
        return torch_model(directory, model, self.restructure(module, operations), self, operations)

    def restructure(self, module: nn.Module, operations: Json) -> nn.Module:
        kept = torch.tensor(operations["kept"])
        first, second = _convolutions(module)[:2]
        norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm2d))
        first.weight = nn.Parameter(first.weight.detach()[kept])
        second.weight = nn.Parameter(second.weight.detach()[:, kept])
        norm.weight = nn.Parameter(norm.weight.detach()[kept])
        norm.bias = nn.Parameter(norm.bias.detach()[kept])
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]
        first.out_channels = second.in_channels = norm.num_features = len(kept)
        return module


class Tune:
    """Recalibrates batch normalization, and tunes the weights towards the source's outputs."""

    traits = Traits(
        "tune", "1", Stage.RECOVER, Kind.TORCH, Kind.TORCH, Needs.UNLABELLED, ("torch",),
        preserves=False,
    )  # fmt: skip

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, TorchModel)
        if not _norms(load_torch(model)):
            return "the model has no batch normalization"
        return None

    def space(self, model: Model, context: Context) -> Space:
        return {"effort": Categorical(tuple(N_STEPS))}

    def describe(self, parameters: Parameters) -> str:
        return str(parameters["effort"])

    def epochs(self, parameters: Parameters, context: Context) -> float:
        return N_STEPS[str(parameters["effort"])] * len(context.calibration) / 1000

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        module = load_torch(model)
        samples = context.calibration.read(np.arange(len(context.calibration)))
        images = torch.from_numpy(samples.inputs["image"])
        recalibrate(module, images)
        tune(module, load_source(model.source), images, N_STEPS[str(parameters["effort"])])
        return torch_model(directory, model, module)


class NotANumber(Tune):
    """Its weights have run away."""

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        module = load_torch(model)
        for weights in module.parameters():
            weights.data.fill_(float("nan"))
        return torch_model(directory, model, module)


def recalibrate(module: nn.Module, images: torch.Tensor) -> None:
    norms = _norms(module)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    with torch.no_grad():
        module(images)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


def tune(module: nn.Module, teacher: nn.Module, images: torch.Tensor, n_steps: int) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    with torch.no_grad():
        wanted = teacher(images)
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(images), wanted).backward()
        optimizer.step()


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


def _norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
