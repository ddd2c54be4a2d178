"""Pruning: channels, heads, neurons and whole blocks that a network can do without.

Structured: what goes is really gone, from all tensors that it has a part in. Weights are set to
zero, at once or by who trains, only where the target may have kernels for that. Winning accuracy
back is a later step's, but for the trainings between rounds, where channels go in several.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.blocks import Block, named_blocks
from optimizer.model_source import read_signature
from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.torch_example import example_inputs
from optimizer.torch_variant import load_torch, read_plan, torch_model
from optimizer.training.round_training import (
    RoundTraining,
    rounds_of,
    space_of_rounds,
    total_epochs,
    why_not,
)
from optimizer.variant import Json, Kind, Model, Stage, TorchModel, TorchVariant
from serve.machine import Machine

if TYPE_CHECKING:
    import torch

    from optimizer.pruning.graph import InputShape
    from optimizer.pruning.groups import Network
    from optimizer.pruning.importance import Samples
    from optimizer.pruning.latency_table import LatencyTable
    from optimizer.pruning.narrowing import Narrowing

_NAME = "pruning"
_CHANNELS, _BLOCKS, _BOTH, _WEIGHTS = "channels", "blocks", "both", "weights"
_ALLOCATIONS = ("cost", "uniform", "global", "sensitivity")
_LATENCY, _TABLE = "latency", "latencies"
_GRADUAL = "gradual"
_WIDTHS, _ROUNDS = "widths", "rounds"
"""Operations that narrow: all at once, or a list of them."""
_RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7)
_N_CHECKED = 2
_REMEMBERED = 8
"""Networks whose groups are kept in memory: finding them takes seconds."""


class Pruning:
    traits = Traits(
        name=_NAME,
        version="1",
        stage=Stage.PRUNE,
        accepts=Kind.TORCH,
        gives=Kind.TORCH,
        needs=Needs.UNLABELLED,
        packages=("torch", "numpy"),
        preserves=False,
        calibrates=True,
    )

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Network] = {}

    def check(self, model: Model, context: Context) -> str | None:
        assert isinstance(model, TorchModel)
        from optimizer.pruning.graph import Untraceable
        from optimizer.pruning.masks import why_no_speed

        try:
            network = self._network(model)
        except Untraceable as error:
            return str(error)
        if network.groups:
            return why_not(model, context)
        if self._blocks(model, network):
            return None
        unknown = ", ".join(sorted(network.flow.unknown))
        reason = "nothing of the model can go: every layer's width is tied to an input or output"
        reason += f", or to an operator without a rule ({unknown})" if unknown else ""
        no_speed = why_no_speed(context.machine)
        return f"{reason}; and {no_speed}" if no_speed else None

    def space(self, model: Model, context: Context) -> Space:
        assert isinstance(model, TorchModel)
        from optimizer.pruning.importance import CRITERIA

        network = self._network(model)
        n_blocks = len(self._blocks(model, network))
        kinds = self._kinds(network, n_blocks, context.machine)
        widths = {"what": (_CHANNELS, _BOTH)}
        scopes = [residual for residual in (False, True) if network.in_scope(residual)]
        table = _table(model, context) if network.groups else None
        criteria = [name for name in CRITERIA if name != "random"]
        if not _has_norms(network):
            criteria.remove("bn_scale")
        return {
            "what": Categorical(kinds),
            "ratio": Categorical(_RATIOS, when=widths),
            "residual": Categorical(tuple(scopes) or (True,), when=widths),
            "criterion": Categorical(tuple(criteria), when=widths),
            "allocation": Categorical(
                (*_ALLOCATIONS, *((_LATENCY,) if table else ())), when=widths
            ),
            **_table_of(table),
            "multiple": Categorical((8, 16, 4, 1), when=widths),
            **(space_of_rounds(model, context, widths) if network.groups else {}),
            "blocks": Categorical(
                tuple(range(1, max(2, n_blocks))), when={"what": (_BLOCKS, _BOTH)}
            ),
            "pattern": Categorical(("2:4", "global", "layer"), when={"what": (_WEIGHTS,)}),
            "sparsity": Categorical(
                (0.5, 0.7, 0.8, 0.9),
                when={"what": (_WEIGHTS,), "pattern": ("global", "layer")},
            ),
            "schedule": Categorical(("one_shot", _GRADUAL), when={"what": (_WEIGHTS,)}),
        }

    def timed_blocks(self, model: Model, context: Context) -> Sequence[Block]:
        """For the allocation by latency: what its table has to have."""
        assert isinstance(model, TorchModel)
        from optimizer.pruning.latency_table import table_blocks

        if self.check(model, context) is not None or not self._network(model).groups:
            return ()
        return table_blocks(_layers(model).values())

    def describe(self, parameters: Parameters) -> str:
        what = str(parameters["what"])
        if what == _WEIGHTS:
            share = f" {float(parameters['sparsity']):.0%}" if "sparsity" in parameters else ""
            by = ", gradual" if parameters.get("schedule") == _GRADUAL else ""
            return f"{parameters['pattern']} sparse{share}{by}"
        parts = [f"{parameters['blocks']} blocks less"] if "blocks" in parameters else []
        if "ratio" in parameters:
            of = " of latency" if parameters["allocation"] == _LATENCY else ""
            share = f"{float(parameters['ratio']):.0%}{of}"
            rounds = f" in {n} rounds" if (n := rounds_of(parameters)) > 1 else ""
            parts.append(f"{share} pruned by {parameters['criterion']}{rounds}")
        return ", ".join(parts)

    def epochs(self, parameters: Parameters, context: Context) -> float:
        """Of all trainings between rounds; 0 where all goes at once."""
        return total_epochs(parameters)

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        assert isinstance(model, TorchModel)
        if parameters["what"] == _WEIGHTS:
            return self._mask(model, parameters, directory)
        samples = _samples(model, context)
        operations: dict[str, Json] = {}
        if "blocks" in parameters:
            operations["bypassed"] = self._bypassed(model, int(parameters["blocks"]), samples)
        if "ratio" not in parameters:
            module = self.restructure(load_torch(model), operations)
            return torch_model(directory, model, module, self, operations)
        narrowing = _narrowing(model, parameters, context, samples)
        if rounds_of(parameters) > 1:
            return self._in_rounds(model, parameters, context, narrowing, operations, directory)
        forms, ratio = operations.get("bypassed", {}), float(parameters["ratio"])
        network = self._network(model, forms)
        module, operations[_WIDTHS] = narrowing.narrowed(
            lambda: _bypassing(model, forms), network, ratio
        )
        return torch_model(directory, model, module, self, operations)

    def restructure(self, module: "torch.nn.Module", operations: Json) -> "torch.nn.Module":
        from optimizer.pruning.depth import bypass
        from optimizer.pruning.rounds import replay

        module = bypass(module, operations.get("bypassed", {}))
        return replay(module, _widths_of(operations))

    # --- what the model is made of

    def _network(self, model: TorchModel, forms: Json = None) -> "Network":
        """The model's groups, after bypassing blocks; found once."""
        key = (model.digest, *sorted(forms or {}))
        if key not in self._known:
            found = _traced(_bypassing(model, forms), model)
            while len(self._known) >= _REMEMBERED:
                self._known.pop(next(iter(self._known)))
            self._known[key] = found
        return self._known[key]

    def _blocks(self, model: TorchModel, network: "Network") -> tuple[str, ...]:
        from optimizer.pruning.depth import blocks_of

        return blocks_of(load_torch(model), network.flow.seen)

    def _kinds(self, network: "Network", n_blocks: int, machine: Machine) -> tuple[str, ...]:
        from optimizer.pruning.masks import why_no_speed

        kinds = [_CHANNELS] if network.groups else []
        kinds += [_BLOCKS] if n_blocks > 1 else []
        kinds += [_BOTH] if len(kinds) == 2 else []
        kinds += [] if why_no_speed(machine) else [_WEIGHTS]
        return tuple(kinds)

    # --- what goes

    def _bypassed(self, model: TorchModel, n: int, samples: "Samples") -> dict[str, str]:
        from optimizer.pruning.depth import forms_of, importance, least_important

        module = load_torch(model)
        blocks = self._blocks(model, self._network(model))
        chosen = least_important(importance(module, blocks, samples.inputs), n)
        return forms_of(module, chosen, _first(samples, _N_CHECKED))

    def _in_rounds(
        self,
        model: TorchModel,
        parameters: Parameters,
        context: Context,
        narrowing: "Narrowing",
        operations: dict[str, Json],
        directory: Path,
    ) -> TorchVariant:
        """The variant whose channels go in rounds; `operations` are those of its blocks."""
        from optimizer.pruning.rounds import Schedule, in_rounds

        forms = operations.get("bypassed", {})
        training = RoundTraining(model, parameters, context, self.traits)
        pruned = in_rounds(
            lambda: _bypassing(model, forms),
            self._network(model, forms),
            narrowing,
            Schedule(float(parameters["ratio"]), rounds_of(parameters)),
            lambda module: _traced(module, model),
            training,
        )
        training.finish()
        of = "seconds" if parameters["allocation"] == _LATENCY else "multiply-adds"
        left = ", ".join(f"{one:.0%}" for one in pruned.left)
        note = f"{left} of the {of} left after the rounds"
        operations = {**operations, _ROUNDS: list(pruned.operations)}
        return torch_model(directory, model, pruned.module, self, operations, (note,))

    def _mask(self, model: TorchModel, parameters: Parameters, directory: Path) -> TorchVariant:
        from optimizer.pruning.masks import GRADUAL, MASKS, compressed_bytes, mask

        module = load_torch(model)
        pattern, sparsity = str(parameters["pattern"]), float(parameters.get("sparsity", 0.5))
        is_gradual = parameters.get("schedule") == _GRADUAL
        names = mask(module, pattern, sparsity)
        packed, dense = compressed_bytes(module, names)
        notes = (
            f"{sparsity:.0%} of the weights of {len(names)} layers "
            f"{'become zero while it is recovered' if is_gradual else 'are zero'}; "
            f"{packed:,} bytes with its zeros packed, {dense:,} as it is: files and memory of "
            "engines keep the zeros",
        )
        operations: dict[str, Json] = {MASKS: list(names)}
        if is_gradual:  # the masked module said whether and how far it can be
            module = load_torch(model)
            operations[GRADUAL] = {"pattern": pattern, "sparsity": sparsity}
        return torch_model(directory, model, module, self, operations, notes)


def _widths_of(operations: Json) -> list[Json]:
    """Of each round, or of the one."""
    return [*operations.get(_ROUNDS, ()), *([operations[_WIDTHS]] if _WIDTHS in operations else [])]


def _narrowing(
    model: TorchModel, parameters: Parameters, context: Context, samples: "Samples"
) -> "Narrowing":
    """What the parameters say of channels. Raises ValueError for another table of latencies."""
    from optimizer.pruning.narrowing import Narrowing

    example = example_inputs(read_signature(model.source))
    return Narrowing(
        criterion=str(parameters["criterion"]),
        allocation=str(parameters["allocation"]),
        multiple=int(parameters["multiple"]),
        residual=bool(parameters["residual"]),
        samples=samples,
        inputs=_inputs(model),
        layers=lambda module: named_blocks(module, example),
        table=_wanted_table(model, parameters, context),
    )


def _bypassing(model: TorchModel, forms: Json) -> "torch.nn.Module":
    """The model without these blocks; nobody else holds it."""
    from optimizer.pruning.depth import bypass

    return bypass(load_torch(model), forms or {})


def _traced(module: "torch.nn.Module", model: TorchModel) -> "Network":
    """Of a module that was made of the model."""
    from optimizer.pruning.graph import trace
    from optimizer.pruning.groups import network_of

    return network_of(trace(module, _inputs(model)))


def _table_of(table: "LatencyTable | None") -> Space:
    """The parameter by which ids cover the table."""
    if table is None:
        return {}
    return {_TABLE: Categorical((table.digest,), when={"allocation": (_LATENCY,)})}


def _table(model: TorchModel, context: Context) -> "LatencyTable | None":
    """The target's times of the layers of the model that the study started from, which are what is
    timed, whatever steps lie between; None where they weren't."""
    from optimizer.pruning.latency_table import latency_table

    if context.block_seconds is None:
        return None
    if isinstance(model, TorchVariant):
        model = TorchModel(model.source, read_plan(model).base)
    return latency_table(_layers(model).values(), context.block_seconds)


def _wanted_table(
    model: TorchModel, parameters: Parameters, context: Context
) -> "LatencyTable | None":
    """The table of the parameters; None where they have none. Raises ValueError where the target's
    is another."""
    wanted = parameters.get(_TABLE)
    if wanted is None:
        return None
    table = _table(model, context)
    found = "missing" if table is None else table.digest
    if found != wanted:
        raise ValueError(
            f"{_TABLE}: got {wanted}, and the target's table of latencies is {found}: want the "
            "table that the recipe was made with"
        )
    return table


def _layers(model: TorchModel) -> dict[str, Block]:
    """The network's convolutions and matrix products by the names of their layers."""
    return named_blocks(load_torch(model), example_inputs(read_signature(model.source)))


def _inputs(model: TorchModel) -> "list[InputShape]":
    from optimizer.pruning.graph import InputShape

    return [InputShape(one.datatype, one.shape) for one in read_signature(model.source).inputs]


def _samples(model: TorchModel, context: Context) -> "Samples":
    import torch

    from optimizer.pruning.importance import Samples

    read = context.calibration.read()
    names = read_signature(model.source).input_names
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(read.inputs[name])) for name in names)
    labels = None if read.labels is None else torch.from_numpy(read.labels)
    return Samples(inputs, labels, context.seed)


def _first(samples: "Samples", n: int) -> Sequence[Any]:
    return [one[:n] for one in samples.inputs]


def _has_norms(network: "Network") -> bool:
    return any(name.endswith(".running_mean") for name in network.flow.tensors)
