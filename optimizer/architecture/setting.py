"""Setting: a model's place, and what its techniques of architecture share: the space, the target's
table of layers, how networks are trained and what on.

It neither trains nor chooses.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from optimizer.architecture.inheriting import (
    inherit,
    initial_digest,
    largest_like,
    load_initial,
)
from optimizer.architecture.judging import Judge, Part, parted
from optimizer.architecture.latency import Unmeasured, blocks_in
from optimizer.architecture.making import (
    PRECISION,
    Place,
    Unfit,
    factories_of,
    place_of,
    space_digest,
    space_of,
)
from optimizer.architecture.networks import BlockFactory
from optimizer.architecture.options import ArchitectureSpec, InitialSpec
from optimizer.architecture.plan import plan_json
from optimizer.architecture.space import ArchitectureSpace, Choices
from optimizer.architecture.supernet import Supernet
from optimizer.architecture.table import SpaceTable, blocks_of_space, space_table, spread
from optimizer.block_times import TABLE_SIZE
from optimizer.blocks import Block, blocks_of
from optimizer.model_source import Signature, read_signature, source_digest
from optimizer.pruning.graph import InputShape
from optimizer.quantization.processor import kernel_layout
from optimizer.quantization.qdq import Arithmetic
from optimizer.search.block_table import Pair
from optimizer.space import Categorical, Parameters, Space, Value
from optimizer.spec import TorchKind
from optimizer.techniques import Context
from optimizer.torch_source import load_source
from optimizer.training.batches import Batches
from optimizer.training.lesson import Lesson, plain_space
from optimizer.variant import Json, TorchModel, canonical_json

_EXAMPLE = 2
"""Samples that the model is run on to see what it gives."""
N_WHOLE = 6
"""Networks of each precision that are timed whole."""
SEARCHED = "searched"
"""In a precision's place: the search chooses it with the network."""
_LOSSES = ("answers", "dist")
"""Those that need no features, which two structures don't have alike."""


@dataclass(frozen=True, eq=False)
class Setting:
    """The networks of `spec` in the place of the model that `source` gives."""

    spec: ArchitectureSpec
    source: TorchKind
    context: Context
    _layers: dict[Choices, Counter[Block]] = field(default_factory=dict)
    _fixed: dict[str, "Setting"] = field(default_factory=dict)

    def reason_against(self) -> str | None:
        """Why no network of the space can take the model's place, or None."""
        return self._reason

    @cached_property
    def _reason(self) -> str | None:
        try:
            supernet = Supernet(self.space.structures, self.factories)
            if self.spec.initial is not None:
                largest_like(supernet, self._initial(self.spec.initial), self._example)
        except (Unfit, ValueError) as error:
            return str(error)
        return None

    def supernet(self) -> tuple[Supernet, tuple[str, ...]]:
        """Untrained, as the spec has it begin, with notes on that; drawn by torch's generator.
        Raises ValueError where `initial` isn't the space's largest network."""
        supernet = Supernet(self.space.structures, self.factories)
        if self.spec.initial is None:
            return supernet, ()
        inputs = [InputShape(one.datatype, one.shape) for one in self.signature.inputs]
        initial = self._initial(self.spec.initial)
        return supernet, (inherit(supernet, initial, inputs, self._example),)

    def _initial(self, initial: InitialSpec | str) -> torch.nn.Module:
        return load_initial(initial, self.source)

    @cached_property
    def factories(self) -> dict[str, BlockFactory]:
        return factories_of(self.spec)

    @cached_property
    def signature(self) -> Signature:
        return read_signature(self.source)

    @cached_property
    def place(self) -> Place:
        """Raises Unfit."""
        return place_of(self.spec, self.signature, load_source(self.source), self._example)

    @cached_property
    def space(self) -> ArchitectureSpace:
        """Raises Unfit."""
        return space_of(self.spec, self.place)

    def at(self, precision: str) -> "Setting":
        """The setting with all networks in that precision; as it is where that is searched."""
        if precision == SEARCHED or self.spec.precisions == (precision,):
            return self
        if precision not in self._fixed:
            spec = self.spec.model_copy(update={"precisions": (precision,)})
            self._fixed[precision] = Setting(spec, self.source, self.context)
        return self._fixed[precision]

    def precision(self, choices: Choices) -> str:
        """What the network computes in."""
        return str(self.space.option(choices, PRECISION))

    def rounding(self, choices: Choices, parameters: Parameters) -> Arithmetic | None:
        """How the network rounds, None where it computes in fp32."""
        if self.precision(choices) == "fp32":
            return None
        return Arithmetic(
            signed=parameters["activations"] == "int8",
            pairs_saturate=bool(parameters["reduce_range"]),
            least_error=True,
        )

    @cached_property
    def base_blocks(self) -> Counter[Block]:
        """The layers of the model itself."""
        return blocks_of(load_source(self.source), self._example)

    @cached_property
    def wanted(self) -> tuple[Block, ...]:
        """The layers that a table has to have: the model's and the space's."""
        own = blocks_of_space(self.space, self.layers_of)
        return tuple(dict.fromkeys([*self.base_blocks, *own]))

    def layers_of(self, choices: Choices) -> Counter[Block]:
        """The network's, in its precision. Raises ValueError where it can't be built."""
        if choices not in self._layers:
            precision = self.precision(choices)
            plain = blocks_in(self.space.plan(choices), self.factories)
            found = {replace(one, precision=precision): n for one, n in plain.items()}
            self._layers[choices] = Counter(found)
        return self._layers[choices]

    def table(self) -> SpaceTable | None:
        """As far as the target's layers were timed, corrected where enough networks were timed
        whole; None where the model's own layers weren't."""
        sums, seconds = self._sums(), self.context.network_seconds
        base_s = None if seconds is None else seconds(self.base_key)
        if sums is None or base_s is None:
            return sums
        pairs = {str(one): self.at(one).pairs() for one in self.spec.precisions}
        return sums.corrected(pairs, base_s)

    def whole(self) -> dict[str, Choices]:
        """Networks to be timed whole, by the key that their seconds are kept under, in the
        setting's precision, which is one; empty while their layers aren't timed."""
        sums = self._sums()
        return {} if sums is None else {self._key(one): one for one in spread(sums, N_WHOLE)}

    def pairs(self) -> list[Pair]:
        """Of the networks timed whole, as far as they are."""
        sums, seconds = self._sums(), self.context.network_seconds
        if sums is None or seconds is None:
            return []
        return [
            Pair(total, found)
            for key, choices in self.whole().items()
            if (found := seconds(key)) is not None and (total := sums.seconds(choices)) is not None
        ]

    @cached_property
    def base_key(self) -> str:
        """That the model's own seconds are kept under, timed whole."""
        return _sha256(["model", source_digest(self.source)])

    def _key(self, choices: Choices) -> str:
        precision = self.precision(choices)
        layout = None if precision == "fp32" else kernel_layout(self.context.machine)
        code = space_digest(self.spec) if self.spec.blocks else ""
        return _sha256(["network", plan_json(self.space.plan(choices)), precision, layout, code])

    def _sums(self) -> SpaceTable | None:
        seconds = self.context.block_seconds
        if seconds is None:
            return None
        found = space_table(self.space, self.layers_of, self.wanted, seconds, TABLE_SIZE)
        try:
            return None if found is None or not found.latency(self.base_blocks) else found
        except Unmeasured:
            return None

    def base_s(self, table: SpaceTable) -> float:
        """What the model takes, for a batch: as it was timed whole where the table is corrected,
        else by the table."""
        return table.latency(self.base_blocks) if table.base_s is None else table.base_s

    def training(self, epochs: float) -> dict[str, Value]:
        """What decides a training beside the model: the space, what a supernet begins as, and how
        the spec trains."""
        given = self.context.training
        losses = tuple(one for one in given.losses if one in _LOSSES)
        plain = given.model_copy(update={"losses": losses or _LOSSES[:1]})
        base = TorchModel(self.source, "")
        space = plain_space(base, replace(self.context, training=plain), epochs)
        initial = self.spec.initial
        by_kind = "sgd" if self.spec.space.kind == "vision" else "adamw"
        return {
            **{name: one.default for name, one in space.items()},
            "optimizer": given.optimizer or by_kind,
            "learning_rate": self.spec.learning_rate,
            "space": space_digest(self.spec),
            **({} if initial is None else {"initial": initial_digest(initial)}),
        }

    def lesson(self, model: TorchModel, network: torch.nn.Module, parameters: Parameters) -> Lesson:
        """The network's, which learns from the base as the parameters say; `model` is what the
        step was given."""
        return Lesson(model, network, self._data, parameters, self.context)

    def parts(self) -> tuple[Part, Part]:
        """Of train: what is learned from, and what networks are judged by."""
        return parted(self._data, self.context.seed)

    def judge(self, parameters: Parameters) -> Judge:
        learned, held_out = self.parts()
        return Judge(
            load_source(self.source),
            learned,
            held_out,
            self.signature.output_names,
            str(parameters["output"]),
            str(parameters["learns"]),
        )

    @property
    def _data(self) -> Batches:
        assert self.context.train is not None, "checked before"
        return Batches(self.context.train, self.signature.input_names)

    @property
    def _example(self) -> Sequence[torch.Tensor]:
        calibration = self.context.calibration
        inputs: Mapping[str, np.ndarray] = calibration.read(
            np.arange(_EXAMPLE) % len(calibration)
        ).inputs
        return [
            torch.from_numpy(np.ascontiguousarray(inputs[name]))
            for name in self.signature.input_names
        ]


def _sha256(content: Json) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def single(values: Mapping[str, Value]) -> Space:
    """Parameters that are no choice."""
    return {name: Categorical((value,)) for name, value in values.items()}
