"""Decomposition: layers as chains of smaller ones, by low rank.

Convolutions by Tucker-2, tensor train or CP; linear layers and 1x1 convolutions by SVD, plain or
weighted by the calibration inputs. A layer is replaced where the chain takes fewer
multiply-accumulates and fewer weights, counted; what that is worth in time, the ladder measures.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optimizer.model_source import read_signature
from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_variant import load_torch, torch_model
from optimizer.variant import Json, Kind, Model, Stage, TorchModel, TorchVariant

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimizer.decomposition.factors import Array
    from optimizer.decomposition.ranks import RankRule
    from optimizer.decomposition.sites import Site, Sites

_ROUND_TO = 8
"""Channels that kernels of CPUs compute at once; fewer leave lanes empty."""
_EXAMPLE_BATCH = 2
_MOMENT_BATCH = 32
_MAX_NAMED = 3
_RANKS = {"evbmf": "ranks by EVBMF", "energy": "{:.0%} of the energy", "share": "{:.0%} of ranks"}


class Decomposition:
    traits = Traits(
        name="decomposition",
        version="1",
        stage=Stage.DECOMPOSE,
        accepts=Kind.TORCH,
        gives=Kind.TORCH,
        needs=Needs.UNLABELLED,
        packages=("torch", "tensorly", "numpy"),
        preserves=False,
    )

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, TorchModel)
        sites = _sites(model, load_torch(model), context)
        if not sites.found:
            return f"no layer can be decomposed{_because(sites.refused)}"
        smallest = {"form": "tucker", "matrix_form": "svd", "rank_by": "share", "share": 1e-9,
                    "layers": "all", "round_to": _ROUND_TO}  # fmt: skip
        if not any(_plan(site, smallest, _rule(smallest), None) for site in sites.found):
            return f"no layer gets cheaper, not even at a rank of {_ROUND_TO}"
        return None

    def space(self, model: Model, context: Context) -> Space:
        assert isinstance(model, TorchModel)
        sites = _sites(model, load_torch(model), context)
        kinds = [name for name in ("convolutions", "matrices") if getattr(sites, name)]
        layers = ("all", *kinds) if len(kinds) > 1 else tuple(kinds)
        space: dict[str, Categorical] = {"layers": Categorical(layers)}
        if "convolutions" in kinds:
            on = {"layers": ("all", "convolutions")}
            space["form"] = Categorical(("tucker", "tensor_train", "cp"), when=on)
        if "matrices" in kinds:
            on = {"layers": ("all", "matrices")}
            space["matrix_form"] = Categorical(("weighted_svd", "svd"), when=on)
        return {
            **space,
            "rank_by": Categorical(("evbmf", "energy", "share")),
            "energy": Categorical((0.9, 0.8, 0.95), when={"rank_by": ("energy",)}),
            "share": Categorical((0.5, 0.625, 0.375, 0.25, 0.125), when={"rank_by": ("share",)}),
            "round_to": Categorical((_ROUND_TO,)),
        }

    def describe(self, parameters: Parameters) -> str:
        forms = [str(parameters[name]) for name in ("form", "matrix_form") if name in parameters]
        by = str(parameters["rank_by"])
        ranks = _RANKS[by].format(parameters.get(by, ""))
        return f"{' and '.join(forms).replace('_', ' ')}, {ranks}"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        import torch

        module = load_torch(model)
        sites = _sites(model, module, context)
        moments = _moments(model, module, sites, parameters, context)
        rule = _rule(parameters)
        plans = {
            site.name: plan
            for site in sites.found
            if (plan := _plan(site, parameters, rule, moments.get(site.name)))
        }
        if not plans:
            raise ValueError("no layer gets cheaper by these ranks, want lower ones")
        weights = {
            site.name: _factors(site, plans[site.name], context.seed, moments.get(site.name))
            for site in sites.found
            if site.name in plans
        }
        module = self.restructure(module, plans)
        with torch.no_grad():
            for name, factors in weights.items():
                links = module.get_submodule(name).children()
                for part, factor in zip(links, factors, strict=True):
                    weight = part.weight
                    assert isinstance(weight, torch.Tensor)
                    weight.copy_(torch.from_numpy(factor).reshape(weight.shape))
        notes = (f"{len(plans)} of {len(sites.found) + len(sites.refused)} layers decomposed",)
        return torch_model(directory, model, module, self, plans, notes)

    def restructure(self, module: "nn.Module", operations: Json) -> "nn.Module":
        """`operations`: layer → its form and ranks. Raises ValueError for what can't be."""
        from torch import nn

        from optimizer.decomposition.forms import chain

        for name, plan in operations.items():
            layer = module.get_submodule(name)
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                raise ValueError(f"{name}: got a {type(layer).__name__}, want Conv2d or Linear")
            module.set_submodule(name, chain(layer, name, plan["form"], plan["ranks"]))
        return module


def _sites(model: TorchModel, module: "nn.Module", context: Context) -> "Sites":
    from optimizer.decomposition.sites import sites_of

    indices = np.arange(_EXAMPLE_BATCH) % len(context.calibration)
    return sites_of(module, _inputs(model, context, indices))


def _inputs(model: TorchModel, context: Context, indices: NDArray[np.intp]) -> list["torch.Tensor"]:
    import torch

    given = context.calibration.read(indices).inputs
    names = read_signature(model.source).input_names
    return [torch.from_numpy(np.ascontiguousarray(given[name])) for name in names]


def _rule(parameters: Mapping[str, Any]) -> "RankRule":
    from optimizer.decomposition.ranks import RankRule

    by = parameters["rank_by"]
    return RankRule(by, parameters.get(by, 1.0), parameters["round_to"])


def _plan(
    site: "Site", parameters: Mapping[str, Any], rule: "RankRule", moment: "Array | None"
) -> dict[str, Any] | None:
    """Form and ranks of the site's chain; None where it stays as it is."""
    from optimizer.decomposition.factors import ranks_of
    from optimizer.decomposition.forms import links_of, max_ranks

    geometry = site.geometry
    kind, key = ("matrices", "matrix_form") if geometry.is_matrix else ("convolutions", "form")
    if parameters["layers"] not in ("all", kind):
        return None
    form = parameters[key]
    limits = max_ranks(geometry, form)
    ranks = [
        min(rank, largest)
        for rank, largest in zip(ranks_of(form, _weight(site), rule, moment), limits, strict=True)
    ]
    chain_cost = geometry.cost_of(links_of(site.name, geometry, form, ranks))
    return {"form": form, "ranks": ranks} if chain_cost.is_below(geometry.cost) else None


def _factors(
    site: "Site", plan: Mapping[str, Any], seed: int, moment: "Array | None"
) -> "list[Array]":
    from optimizer.decomposition.factors import factors_of

    return factors_of(plan["form"], _weight(site), plan["ranks"], seed, moment)


def _weight(site: "Site") -> "Array":
    """[out, in, y, x] in float64."""
    weight: Array = site.layer.weight.detach().double().numpy()
    return weight if weight.ndim == 4 else weight[:, :, None, None]


def _moments(
    model: TorchModel,
    module: "nn.Module",
    sites: "Sites",
    parameters: Parameters,
    context: Context,
) -> "dict[str, Array]":
    if parameters.get("matrix_form") != "weighted_svd":
        return {}
    from optimizer.decomposition.moments import second_moments

    return second_moments(module, sites.matrices, _calibration(model, context))


def _calibration(model: TorchModel, context: Context) -> Iterator[Sequence["torch.Tensor"]]:
    n = len(context.calibration)
    for start in range(0, n, _MOMENT_BATCH):
        yield _inputs(model, context, np.arange(start, min(start + _MOMENT_BATCH, n)))


def _because(refused: Mapping[str, str]) -> str:
    if not refused:
        return ": it has no linear layer and no convolution that runs as a module"
    named = [f"{name}: {reason}" for name, reason in list(refused.items())[:_MAX_NAMED]]
    more = len(refused) - len(named)
    return f" ({'; '.join(named)}{f'; and {more} more' if more else ''})"
