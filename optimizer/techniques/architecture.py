"""Architecture: another network in the model's place, found by a controller on the target's table
of layers.

It asks a space's networks for their worth: those of a supernet as they are, others trained from
scratch. What it found begins where the search left it; recovery, which comes behind it as behind
every change of the structure, teaches it by the model.
"""

# ruff: noqa: ARG002  every technique takes what the contract passes

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.architecture.options import ArchitectureSpec
from optimizer.blocks import Block
from optimizer.quantization.processor import kernel_layout
from optimizer.recipe import EPOCHS, Needs, Traits
from optimizer.space import Categorical, Parameters, Space, Value
from optimizer.techniques import Context, TimedNetwork
from optimizer.torch_variant import load_torch, torch_model
from optimizer.training.lesson import reason_against
from optimizer.variant import Json, Kind, Model, Stage, TorchModel, TorchVariant

if TYPE_CHECKING:
    from torch import nn

    from optimizer.architecture.setting import Setting
    from optimizer.architecture.space import Choices
    from optimizer.architecture.table import SpaceTable

_RECORD = "architecture.json"
"""What was looked at, beside the weights."""
_SHARED = "shared"
_PRECISION, _INT8 = "network_precision", "int8"
"""The parameter beside `precision`, which is what a training computes in."""
_FOUND_IN_INT8 = "found in int8: latency and accuracy are those of the network once it is quantized"


class ArchitectureSearch:
    def __init__(self, spec: ArchitectureSpec) -> None:
        self._spec = spec
        self.traits = Traits(
            name="architecture",
            version="3",
            stage=Stage.ARCHITECTURE,
            accepts=Kind.TORCH,
            gives=Kind.TORCH,
            needs=Needs.UNLABELLED,
            packages=("torch", "numpy"),
            preserves=False,
            prepares=Stage.PRECISION if _INT8 in spec.precisions else None,
            prepares_when=(_PRECISION, (_INT8,)),
            wants=(("format", ("static",)),),
            shares=("activations", "reduce_range"),
            follows=Stage.SUPERNET if spec.weights == _SHARED else None,
        )
        self._known: Setting | None = None

    def check(self, model: Model, context: Context) -> str | None:
        from optimizer.architecture.reach import why_not

        assert isinstance(model, TorchModel)
        return reason_against(model, context) or why_not(self._setting(model, context))

    def missing(self, model: Model, context: Context) -> Mapping[str, str]:
        """Speedups that no network of the space reaches, and precisions that reach none."""
        from optimizer.architecture.reach import slow_precisions, unreachable

        assert isinstance(model, TorchModel)
        setting = self._setting(model, context)
        table = setting.table()
        found = {} if table is None else unreachable(setting, table)
        return {
            **{f"architecture at {speedup:g}x": reason for speedup, reason in found.items()},
            **{f"architecture in {one}": why for one, why in slow_precisions(setting).items()},
        }

    def timed_blocks(self, model: Model, context: Context) -> Sequence[Block]:
        assert isinstance(model, TorchModel)
        setting = self._setting(model, context)
        return () if setting.reason_against() is not None else setting.wanted

    def timed_networks(self, model: Model, context: Context) -> Sequence[TimedNetwork]:
        from optimizer.architecture.whole import whole_networks

        assert isinstance(model, TorchModel)
        setting = self._setting(model, context)
        if setting.reason_against() is not None:
            return ()
        return list(whole_networks(setting, model, self))

    def space(self, model: Model, context: Context) -> Space:
        """A step whose precision is fixed binds the recipe's quantization to it; of one that is
        searched the outcome isn't known before it is applied, so it binds nothing."""
        from optimizer.architecture.reach import slow_precisions, unreachable
        from optimizer.architecture.setting import SEARCHED, single

        assert isinstance(model, TorchModel)
        setting, spec = self._setting(model, context), self._spec
        table = setting.table()
        assert table is not None, "checked before"
        missed = unreachable(setting, table)
        reachable = [one for one in spec.speedups if one not in missed]
        precisions: tuple[str, ...] = spec.precisions
        if len(precisions) > 1:
            slow = slow_precisions(setting)
            precisions = (SEARCHED, *(one for one in precisions if one not in slow))
        epochs = 0.0 if spec.weights == _SHARED else spec.epochs
        return {
            "speedup": Categorical(tuple(reachable)),
            "controller": Categorical(spec.controllers),
            _PRECISION: Categorical(precisions),
            **_rounding(precisions, context),
            "weights": Categorical((spec.weights,)),
            "evaluations": Categorical((spec.evaluations,)),
            "screen": Categorical((spec.screen,)),
            "table": Categorical((table.digest,)),
            **single(setting.training(epochs)),
        }

    def describe(self, parameters: Parameters) -> str:
        words = f"another network, {float(parameters['speedup']):g}x, by {parameters['controller']}"
        if self._spec.precisions == ("fp32",):
            return words
        return f"{words}, precision {parameters[_PRECISION]}"

    def epochs(self, parameters: Parameters, context: Context) -> float:
        """Of all networks that are trained from scratch, were none proposed twice; networks of a
        supernet aren't trained."""
        from optimizer.architecture.exploration import N_PROPOSERS
        from optimizer.architecture.halving import total_epochs

        n = N_PROPOSERS * int(parameters["evaluations"])
        return total_epochs(n, float(parameters[EPOCHS]))

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> TorchVariant:
        from optimizer.architecture.exploration import document, notes_of, ranking
        from optimizer.architecture.plan import plan_json
        from optimizer.architecture.run import run
        from optimizer.architecture.worth import Remembered, Shared, Trained, Worth

        assert isinstance(model, TorchModel)
        whole = self._setting(model, context)
        table = whole.table()
        found = "missing" if table is None else table.digest
        if table is None or found != parameters["table"]:
            raise ValueError(
                f"table: got {parameters['table']}, and the target's is {found}: want the one that "
                "the recipe was made with"
            )
        setting = whole.at(str(parameters[_PRECISION]))
        table = setting.table()
        assert table is not None, "the model's own layers are in the whole's"
        target_s = setting.base_s(table) / float(parameters["speedup"])
        given = load_torch(model)
        worth: Worth = (
            Shared(setting, parameters, given)
            if parameters["weights"] == _SHARED
            else Trained(setting, model, parameters)
        )
        checkpoint = setting.lesson(model, given, parameters).checkpoint(self.traits)
        path = None if checkpoint is None else checkpoint.path.with_suffix(".json")
        accuracy = Remembered(worth, path)
        trails = run(setting, table, target_s, parameters, accuracy)
        chosen, network = worth.chosen([one.choices for one in ranking(trails, target_s)])
        accuracy.forget()
        record = document(setting.space, trails, target_s)
        (directory / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        precision = setting.precision(chosen)
        operations = {"plan": plan_json(setting.space.plan(chosen)), "precision": precision}
        notes = (
            *notes_of(trails, target_s),
            *_slower(table, chosen, target_s),
            *_corrected(table),
            *((_FOUND_IN_INT8,) if precision == _INT8 else ()),
        )
        return torch_model(directory, model, network, self, operations, notes)

    def restructure(self, module: "nn.Module", operations: Json) -> "nn.Module":
        """The network, whatever the module was."""
        from optimizer.architecture.making import factories_of
        from optimizer.architecture.networks import build
        from optimizer.architecture.plan import plan_of_json

        return build(plan_of_json(operations["plan"]), factories_of(self._spec)).eval()

    def _setting(self, model: TorchModel, context: Context) -> "Setting":
        """Kept as long as source and context are the same: tracing a space takes seconds."""
        from optimizer.architecture.setting import Setting

        known = self._known
        if known is None or known.context is not context or known.source is not model.source:
            self._known = known = Setting(self._spec, model.source, context)
        return known


def _rounding(precisions: Sequence[str], context: Context) -> Space:
    """How the target wants int8, as for static quantization, where networks are looked at in it."""
    rounded = tuple(one for one in precisions if one != "fp32")
    if not rounded:
        return {}
    activations, reduce_range = kernel_layout(context.machine)
    when: Mapping[str, tuple[Value, ...]] = {_PRECISION: rounded}
    return {
        "activations": Categorical((activations,), when=when),
        "reduce_range": Categorical((reduce_range,), when=when),
    }


def _corrected(table: "SpaceTable") -> tuple[str, ...]:
    """How far latencies can be believed; nothing where they are sums of layers."""
    if not table.trusts:
        return ("latencies are sums of layers: too few networks were timed whole to correct them",)
    return tuple(
        f"latencies in {precision} are corrected by {one.n_networks} networks timed whole; each, "
        f"left out of it, is {one.relative_error:.1%} off on average, rank correlation "
        f"{one.rank_correlation:.2f}"
        for precision, one in table.trusts.items()
    )


def _slower(table: "SpaceTable", chosen: "Choices", target_s: float) -> tuple[str, ...]:
    seconds = table.seconds(chosen)
    if seconds is None or seconds <= target_s:
        return ()
    return (f"none of them is within the target; this one takes {1e3 * seconds:.3g} ms",)
