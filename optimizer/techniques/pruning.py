"""Pruning: channels, heads, neurons and whole blocks that a network can do without.

Structured: what goes is really gone, from all tensors that it has a part in. Weights are set to
zero, at once or by who trains, only where the target may have kernels for that. Winning accuracy
back is a later step's, but for the trainings between rounds, where channels go in several.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from optimizer.blocks import Block, named_blocks
from optimizer.model_source import read_signature
from optimizer.recipe import Needs, Traits
from optimizer.space import Categorical, Parameters, Space
from optimizer.techniques import Context
from optimizer.timed_table import LATENCIES, table_parameter, timed_table, wanted_table
from optimizer.torch_example import example_inputs
from optimizer.torch_variant import load_torch, torch_model
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

    from optimizer.latency_table import LatencyTable
    from optimizer.pruning.depth import Form
    from optimizer.pruning.graph import InputShape
    from optimizer.pruning.groups import Network
    from optimizer.pruning.importance import Samples
    from optimizer.pruning.narrowing import Narrowing

_NAME = "pruning"
_CHANNELS, _BLOCKS, _BOTH, _WEIGHTS = "channels", "blocks", "both", "weights"
_ALLOCATIONS = ("cost", "uniform", "global", "sensitivity")
_LATENCY = "latency"
_GRADUAL = "gradual"
_CLASSES, _VALUES = "classes", "values"
_WIDTHS, _ROUNDS = "widths", "rounds"
"""Operations that narrow: all at once, or a list of them."""
_RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7)
_N_CHECKED = 2
_REMEMBERED = 8
"""Models whose groups and blocks are kept in memory: finding them takes seconds."""
_Key = TypeVar("_Key")
_Found = TypeVar("_Found")


class Pruning:
    traits = Traits(
        name=_NAME,
        version="2",
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
        self._found: dict[str, dict[str, Form]] = {}

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
        if len(self._blocks(model)) > 1:
            return None
        unknown = ", ".join(sorted(network.flow.unknown))
        reason = "nothing of the model can go: every layer's width is tied to an input or output"
        reason += f", or to an operator without a rule ({unknown})" if unknown else ""
        no_speed = why_no_speed(context.machine)
        return f"{reason}; and {no_speed}" if no_speed else None

    def space(self, model: Model, context: Context) -> Space:
        assert isinstance(model, TorchModel)
        from optimizer.pruning.importance import criteria_for
        from optimizer.pruning.masks import patterns_for

        network = self._network(model)
        n_blocks = len(self._blocks(model))
        kinds = self._kinds(network, n_blocks, context.machine)
        widths = {"what": (_CHANNELS, _BOTH)}
        scopes = [residual for residual in (False, True) if network.in_scope(residual)]
        table = _table(model, context) if network.groups else None
        module = load_torch(model)
        return {
            "what": Categorical(kinds),
            "ratio": Categorical(_RATIOS, when=widths),
            "residual": Categorical(tuple(scopes) or (True,), when=widths),
            "criterion": Categorical(criteria_for(module, network.groups), when=widths),
            "outputs": Categorical((_outputs_of(context),), when={"criterion": ("taylor",)}),
            "allocation": Categorical(
                (*_ALLOCATIONS, *((_LATENCY,) if table else ())), when=widths
            ),
            **table_parameter(table, when={"allocation": (_LATENCY,)}),
            "multiple": Categorical((8, 16, 4, 1), when=widths),
            **(space_of_rounds(model, context, widths) if network.groups else {}),
            "blocks": Categorical(
                tuple(range(1, max(2, n_blocks))), when={"what": (_BLOCKS, _BOTH)}
            ),
            "pattern": Categorical(patterns_for(module), when={"what": (_WEIGHTS,)}),
            "sparsity": Categorical(
                (0.5, 0.7, 0.8, 0.9),
                when={"what": (_WEIGHTS,), "pattern": ("global", "layer")},
            ),
            "schedule": Categorical(("one_shot", _GRADUAL), when={"what": (_WEIGHTS,)}),
        }

    def timed_blocks(self, model: Model, context: Context) -> Sequence[Block]:
        """For the allocation by latency: what its table has to have."""
        assert isinstance(model, TorchModel)
        from optimizer.latency_table import table_blocks

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
        samples = _samples(model, parameters, context)
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
        from optimizer.pruning.rounds import replay

        module = _without(module, operations.get("bypassed"))
        return replay(module, _widths_of(operations))

    # --- what the model is made of

    def _network(self, model: TorchModel, forms: Json = None) -> "Network":
        """The model's groups, after bypassing blocks; found once."""
        key = (model.digest, *sorted(forms or {}))
        return _remembered(self._known, key, lambda: _traced(_bypassing(model, forms), model))

    def _blocks(self, model: TorchModel) -> "Mapping[str, Form]":
        """The model's blocks, with how each is bypassed; found once."""
        from optimizer.pruning.depth import blocks_of

        def find() -> "dict[str, Form]":
            return blocks_of(load_torch(model), _inputs(model))

        return _remembered(self._found, model.digest, find)

    def _kinds(self, network: "Network", n_blocks: int, machine: Machine) -> tuple[str, ...]:
        from optimizer.pruning.masks import why_no_speed

        kinds = [_CHANNELS] if network.groups else []
        kinds += [_BLOCKS] if n_blocks > 1 else []
        kinds += [_BOTH] if len(kinds) == 2 else []
        kinds += [] if why_no_speed(machine) else [_WEIGHTS]
        return tuple(kinds)

    # --- what goes

    def _bypassed(self, model: TorchModel, n: int, samples: "Samples") -> dict[str, Json]:
        """Raises ValueError where there are fewer, or the model doesn't run without them all."""
        from optimizer.pruning.depth import importance, least_important, why_not_without

        module, blocks = load_torch(model), self._blocks(model)
        chosen = least_important(importance(module, blocks, samples.inputs), n)
        forms = {name: blocks[name] for name in chosen}
        reason = why_not_without(module, forms, _first(samples, _N_CHECKED))
        if reason is not None:
            raise ValueError(f"the model doesn't run without {', '.join(chosen)}: {reason}")
        return {name: form.to_json() for name, form in forms.items()}

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
    return _without(load_torch(model), forms)


def _without(module: "torch.nn.Module", forms: Json) -> "torch.nn.Module":
    """The module, edited, without the blocks of the operation `bypassed`."""
    from optimizer.pruning.depth import Form, bypass

    return bypass(module, {name: Form.from_json(one) for name, one in (forms or {}).items()})


def _remembered(known: dict[_Key, _Found], key: _Key, find: Callable[[], _Found]) -> _Found:
    """What was found for the key, now or before; the oldest is forgotten."""
    if key not in known:
        found = find()
        while len(known) >= _REMEMBERED:
            known.pop(next(iter(known)))
        known[key] = found
    return known[key]


def _traced(module: "torch.nn.Module", model: TorchModel) -> "Network":
    """Of a module that was made of the model."""
    from optimizer.pruning.graph import trace
    from optimizer.pruning.groups import network_of

    return network_of(trace(module, _inputs(model)))


def _table(model: TorchModel, context: Context) -> "LatencyTable | None":
    return timed_table(model, context, lambda base: _layers(base).values())


def _wanted_table(
    model: TorchModel, parameters: Parameters, context: Context
) -> "LatencyTable | None":
    """The table of the parameters; None where they have none. Raises ValueError where the target's
    is another."""
    wanted = parameters.get(LATENCIES)
    return None if wanted is None else wanted_table(wanted, _table(model, context))


def _layers(model: TorchModel) -> dict[str, Block]:
    """The network's convolutions and matrix products by the names of their layers."""
    return named_blocks(load_torch(model), example_inputs(read_signature(model.source)))


def _inputs(model: TorchModel) -> "list[InputShape]":
    from optimizer.pruning.graph import InputShape

    return [InputShape(one.datatype, one.shape) for one in read_signature(model.source).inputs]


def _outputs_of(context: Context) -> str:
    """What the task says the model's outputs are, so that ids cover it."""
    return _CLASSES if context.task.kind == "classification" else _VALUES


def _samples(model: TorchModel, parameters: Parameters, context: Context) -> "Samples":
    import torch

    from optimizer.pruning.importance import Samples

    read = context.calibration.read()
    names = read_signature(model.source).input_names
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(read.inputs[name])) for name in names)
    labels = None if read.labels is None else torch.from_numpy(read.labels)
    has_classes = parameters.get("outputs", _CLASSES) == _CLASSES
    return Samples(inputs, labels, context.seed, has_classes)


def _first(samples: "Samples", n: int) -> Sequence[Any]:
    return [one[:n] for one in samples.inputs]
