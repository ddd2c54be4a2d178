"""Decomposition: layers as chains of smaller ones, by low rank.

Convolutions by Tucker-2, tensor train or CP; linear layers and 1x1 convolutions by SVD, plain or
weighted by the calibration inputs. A layer is replaced where the target takes less time for the
chain, by its table of latencies; without one where the chain takes fewer multiply-accumulates and
fewer weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optimizer.blocks import Block, named_blocks
from optimizer.model_source import read_signature
from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.timed_table import (
    LATENCIES,
    table_parameter,
    timed_table,
    wanted_table,
)
from optimizer.torch_example import example_inputs
from optimizer.torch_variant import keeps_base, load_torch, torch_model
from optimizer.variant import Json, Kind, Model, Stage, TorchModel, TorchVariant

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimizer.decomposition.factors import Array
    from optimizer.decomposition.forms import Link
    from optimizer.decomposition.ranks import RankRule
    from optimizer.decomposition.sites import Site, Sites
    from optimizer.latency_table import LatencyTable

    IsBetter = Callable[[Site, Sequence[Link]], bool]
    """Whether the layer is to be replaced by these."""

_ROUND_TO = 8
"""Channels that kernels of CPUs compute at once; fewer leave lanes empty."""
_EXAMPLE_BATCH = 2
_MOMENT_BATCH = 32
_MAX_NAMED = 3
_LEAST_SHARE = 1e-9
"""Of ranks: what rounding makes of it is the least that there is."""
_FASTER, _CHEAPER = "faster", "cheaper"
_RANKS = {"evbmf": "ranks by EVBMF", "energy": "{:.0%} of the energy", "share": "{:.0%} of ranks"}


class Decomposition:
    traits = Traits(
        name="decomposition",
        version="2",
        stage=Stage.DECOMPOSE,
        accepts=Kind.TORCH,
        gives=Kind.TORCH,
        needs=Needs.UNLABELLED,
        packages=("torch", "tensorly", "numpy"),
        preserves=False,
    )

    def __init__(self) -> None:
        self._known: dict[str, Sequence[Block]] = {}
        """Model's digest → the layers of its table: finding them takes runs of the model."""

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, TorchModel)
        module = load_torch(model)
        sites = _sites(model, module, context)
        if not sites.found:
            return f"no layer can be decomposed{_because(sites.refused)}"
        table = self._table(model, context)
        is_better = _is_better(model, module, table)
        if not any(_forms(site, is_better) for site in sites.found):
            return f"no layer gets {_wanted(table)}, not even at a rank of {_ROUND_TO}"
        return None

    def space(self, model: Model, context: Context) -> Space:
        from optimizer.decomposition.forms import CONVOLUTIONS, MATRICES

        assert isinstance(model, TorchModel)
        sites = _sites(model, load_torch(model), context)
        kinds = [name for name in ("convolutions", "matrices") if getattr(sites, name)]
        layers = ("all", *kinds) if len(kinds) > 1 else tuple(kinds)
        space: dict[str, Categorical] = {"layers": Categorical(layers)}
        if "convolutions" in kinds:
            on = {"layers": ("all", "convolutions")}
            space["form"] = Categorical(CONVOLUTIONS, when=on)
        if "matrices" in kinds:
            on = {"layers": ("all", "matrices")}
            space["matrix_form"] = Categorical(MATRICES, when=on)
        table = self._table(model, context)
        return {
            **space,
            "rank_by": Categorical(("evbmf", "energy", "share")),
            "energy": Categorical((0.9, 0.8, 0.95), when={"rank_by": ("energy",)}),
            "share": Categorical((0.5, 0.625, 0.375, 0.25, 0.125), when={"rank_by": ("share",)}),
            "round_to": Categorical((_ROUND_TO,)),
            "replaced": Categorical((_wanted(table),)),
            **table_parameter(table),
        }

    def timed_blocks(self, model: Model, context: Context) -> Sequence[Block]:
        """The layers that can be replaced and what their chains are made of."""
        assert isinstance(model, TorchModel)
        from optimizer.latency_table import table_blocks

        return table_blocks(self._layers_of_table(model, context))

    def describe(self, parameters: Parameters) -> str:
        forms = [str(parameters[name]) for name in ("form", "matrix_form") if name in parameters]
        by = str(parameters["rank_by"])
        ranks = _RANKS[by].format(parameters.get(by, ""))
        where = ", where faster" if parameters.get("replaced") == _FASTER else ""
        return f"{' and '.join(forms).replace('_', ' ')}, {ranks}{where}"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        """Raises ValueError where no layer is to be replaced, for a layer whose weights aren't
        finite, for another table of latencies, and where the model fails with chains in it."""
        assert isinstance(model, TorchModel)
        table = None
        if parameters["replaced"] == _FASTER:
            table = wanted_table(parameters.get(LATENCIES), self._table(model, context))
        module = load_torch(model)
        sites = _sites(model, module, context)
        moments = _moments(model, module, sites, parameters, context)
        chains = _chains(sites, moments, parameters, _is_better(model, module, table), context.seed)
        if not chains.plans:
            raise ValueError(
                f"no layer can be decomposed{_because(chains.failed)}"
                if chains.failed
                else f"no layer gets {_wanted(table)} by these ranks, want lower ones"
            )
        module = self.restructure(module, chains.plans)
        _fill(module, chains)
        self._check_run(model, module, chains.plans, context)
        notes = (_note(chains, sites),)
        return torch_model(directory, model, module, self, chains.plans, notes)

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

    def _check_run(
        self, model: TorchModel, module: "nn.Module", plans: Json, context: Context
    ) -> None:
        """Raises ValueError, which names layers, unless the module made of the model runs."""
        inputs = _examples(model, context)
        failure = _failure(module, inputs)
        if not failure:
            return
        alone = [
            name
            for name, plan in plans.items()
            if _failure(self.restructure(load_torch(model), {name: plan}), inputs)
        ]
        names = ", ".join(alone or plans)
        raise ValueError(f"{names}: the model fails with a chain in the layer's place: {failure}")

    def _table(self, model: TorchModel, context: Context) -> "LatencyTable | None":
        """The target's times of the layers that the study started from and of their chains; None
        where they weren't measured, or an earlier step put another network in their place."""
        if not keeps_base(model):
            return None
        return timed_table(model, context, lambda base: self._layers_of_table(base, context))

    def _layers_of_table(self, model: TorchModel, context: Context) -> Sequence[Block]:
        """Of the layers that get cheaper at the least ranks, by count, with the forms that do."""
        from optimizer.decomposition.chain_times import layers_of_table

        if model.digest not in self._known:
            module = load_torch(model)
            blocks = _blocks(model, module)
            forms: dict[Block, tuple[str, ...]] = {}
            for site in _sites(model, module, context).found:
                if site.name in blocks and (cheaper := _forms(site, _is_cheaper)):
                    forms[blocks[site.name]] = cheaper
            self._known[model.digest] = layers_of_table(forms)
        return self._known[model.digest]


@dataclass(frozen=True, eq=False)
class _Chains:
    """Layer → its chain's form and ranks, and weights; and why another's fit failed."""

    plans: dict[str, Json] = field(default_factory=dict)
    factors: "dict[str, list[Array]]" = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def _chains(
    sites: "Sites",
    moments: "Mapping[str, Array]",
    parameters: Mapping[str, Any],
    is_better: "IsBetter",
    seed: int,
) -> _Chains:
    from optimizer.decomposition.factors import factors_of

    rule, found = _rule(parameters), _Chains()
    for site in sites.found:
        form = _form(site, parameters)
        if form is None:
            continue
        weight, moment = _weight(site), moments.get(site.name)
        if not np.isfinite(weight).all():
            raise ValueError(f"{site.name}: got weights with NaN or infinity, want finite ones")
        try:
            ranks = _ranks(site, form, rule, is_better, moment)
            if ranks:
                found.factors[site.name] = factors_of(form, weight, ranks, seed, moment)
                found.plans[site.name] = {"form": form, "ranks": ranks}
        except np.linalg.LinAlgError as error:
            found.failed[site.name] = str(error)
    return found


def _fill(module: "nn.Module", chains: _Chains) -> None:
    """Give the chains in the module their weights."""
    import torch

    with torch.no_grad():
        for name, factors in chains.factors.items():
            for part, factor in zip(module.get_submodule(name).children(), factors, strict=True):
                weight = part.weight
                assert isinstance(weight, torch.Tensor)
                weight.copy_(torch.from_numpy(factor).reshape(weight.shape))


def _failure(module: "nn.Module", inputs: "Sequence[torch.Tensor]") -> str:
    """Why the module can't be run; empty where it can."""
    import torch

    try:
        with torch.inference_mode():
            module(*inputs)
    except Exception as error:  # noqa: BLE001  the forward is the user's code
        return f"{type(error).__name__}: {error}"
    return ""


def _note(chains: _Chains, sites: "Sites") -> str:
    n_layers = len(sites.found) + len(sites.refused)
    note = f"{len(chains.plans)} of {n_layers} layers decomposed"
    if not chains.failed:
        return note
    return f"{note}; the fit of {len(chains.failed)} failed{_because(chains.failed)}"


def _sites(model: TorchModel, module: "nn.Module", context: Context) -> "Sites":
    from optimizer.decomposition.sites import sites_of

    return sites_of(module, _examples(model, context))


def _examples(model: TorchModel, context: Context) -> "list[torch.Tensor]":
    return _inputs(model, context, np.arange(_EXAMPLE_BATCH) % len(context.calibration))


def _inputs(model: TorchModel, context: Context, indices: NDArray[np.intp]) -> list["torch.Tensor"]:
    import torch

    given = context.calibration.read(indices).inputs
    names = read_signature(model.source).input_names
    return [torch.from_numpy(np.ascontiguousarray(given[name])) for name in names]


def _rule(parameters: Mapping[str, Any]) -> "RankRule":
    from optimizer.decomposition.ranks import RankRule

    by = parameters["rank_by"]
    return RankRule(by, parameters.get(by, 1.0), parameters["round_to"])


def _form(site: "Site", parameters: Mapping[str, Any]) -> str | None:
    """What the parameters say of such a layer; None where it stays as it is."""
    is_matrix = site.geometry.is_matrix
    kind, key = ("matrices", "matrix_form") if is_matrix else ("convolutions", "form")
    return str(parameters[key]) if parameters["layers"] in ("all", kind) else None


def _forms(site: "Site", is_better: "IsBetter") -> tuple[str, ...]:
    """Those in which the layer is to be replaced at the least ranks."""
    from optimizer.decomposition.forms import CONVOLUTIONS, MATRICES
    from optimizer.decomposition.ranks import RankRule

    least = RankRule("share", _LEAST_SHARE, _ROUND_TO)
    forms = MATRICES if site.geometry.is_matrix else CONVOLUTIONS
    return tuple(form for form in forms if _ranks(site, form, least, is_better, None))


def _ranks(
    site: "Site", form: str, rule: "RankRule", is_better: "IsBetter", moment: "Array | None"
) -> list[int]:
    """Of the site's chain; none where the layer is better than that. Raises LinAlgError."""
    from optimizer.decomposition.factors import ranks_of
    from optimizer.decomposition.forms import links_of

    ranks = ranks_of(form, _weight(site), rule, moment)
    return ranks if is_better(site, links_of(site.name, site.geometry, form, ranks)) else []


def _is_cheaper(site: "Site", links: "Sequence[Link]") -> bool:
    return site.geometry.cost_of(links).is_below(site.geometry.cost)


def _is_better(model: TorchModel, module: "nn.Module", table: "LatencyTable | None") -> "IsBetter":
    """By the table, or counted without one; `module` is what the model is."""
    from optimizer.decomposition.chain_times import ChainTimes

    if table is None:
        return _is_cheaper
    times = ChainTimes(table, _blocks(model, module))
    return lambda site, links: times.is_faster(site.name, links)


def _wanted(table: "LatencyTable | None") -> str:
    return _CHEAPER if table is None else _FASTER


def _blocks(model: TorchModel, module: "nn.Module") -> dict[str, Block]:
    """The module's layers by name, as they are timed."""
    return named_blocks(module, example_inputs(read_signature(model.source)))


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
    """The layers, the first few of them by name, with the reason."""
    if not refused:
        return ": it has no linear layer and no convolution that runs as a module"
    named = [f"{name}: {reason}" for name, reason in list(refused.items())[:_MAX_NAMED]]
    more = len(refused) - len(named)
    return f" ({'; '.join(named)}{f'; and {more} more' if more else ''})"
