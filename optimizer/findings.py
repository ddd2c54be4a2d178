"""Findings: what there is to learn beside the answer, once a study has one or has none.

What each step of the answer contributed (by variants that lack it, measured where they weren't
yet), what became of each layer, and where nothing is feasible what giving way would buy. None of
it changes the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadtest.slo import Slo
from optimizer.ablation import ablations, missing
from optimizer.layers import layers_of
from optimizer.measuring import Measurer
from optimizer.recipe import Recipe
from optimizer.relaxation import relaxations
from optimizer.result import Ablation, Fusion, Layer, Outcome, Relaxation, ServingChoice, Variant
from optimizer.search.coordinator import Trial
from optimizer.search.landscape import Decisions
from optimizer.spec import Spec
from optimizer.timing import Contender
from optimizer.trials import Trials
from optimizer.variant import EngineModel, OnnxModel
from serve.artifact import Step
from serve.engines import KernelTime

_N_RUNS = 20
"""Of a profile. The first is cold, so few would tell of that."""


@dataclass(frozen=True)
class Found:
    """`rows` are those of the finals, and the variants measured for the ablations behind them."""

    rows: list[Variant]
    relaxations: tuple[Relaxation, ...] = ()
    ablations: tuple[Ablation, ...] = ()
    layers: tuple[Layer, ...] = ()
    fusions: tuple[Fusion, ...] = ()


@dataclass(frozen=True, eq=False)
class Findings:
    """`rows` are the trials' rows with what became of them in the finals."""

    spec: Spec
    trials: Trials
    rows: Sequence[Variant]
    measurer: Measurer

    def found(self, outcome: Outcome, has_time: bool) -> Found:
        """`has_time` is whether the budget leaves room to measure what the ablations lack."""
        rows = list(self.rows)
        chosen = next((row for row in rows if row.status == "chosen"), None)
        if chosen is None:
            wanted = outcome == "infeasible"
            steps = relaxations(rows, self.spec.slo, self.spec.objective, self._serve)
            return Found(rows, steps if wanted else ())
        if has_time:
            rows += self._measured(rows, chosen)
        return Found(rows, (), ablations(rows, chosen), self._layers(chosen), self._fusions(chosen))

    def _serve(self, variant: Variant, slo: Slo) -> ServingChoice:
        return self.trials.serving.choose(variant.service_times, slo)

    def _measured(self, rows: Sequence[Variant], chosen: Variant) -> list[Variant]:
        """The variants that the ablations lack, as far as they can be made."""
        found = []
        for steps in missing(rows, chosen):
            row = self._ablated(steps)
            if row is not None:
                found.append(row)
        return found

    def _ablated(self, steps: Sequence[Step]) -> Variant | None:
        """Climbed as a baseline is: to the top, whatever the others are."""
        builder = self.trials.builder
        try:
            recipe = Recipe(builder.base.kind)
            for step in steps:
                recipe = recipe.then(builder.techniques[step.technique].traits, step.parameters)
        except ValueError:  # the step before gave what the step behind needs
            return None
        trial = Trial(0, Decisions(recipe, {}), is_baseline=True, handle=None)
        given = replace(self.trials.surroundings(), best=None, recoveries=())
        ended = self.trials.ascent(trial, given).run()
        row = ended.row
        return None if row is None or row.status == "dropped" else row

    def _layers(self, chosen: Variant) -> tuple[Layer, ...]:
        """Of the answer against the baseline, with their times by profile."""
        baseline = self.trials.baseline
        stored = self.trials.builder.find(chosen.id)
        assert baseline is not None
        assert stored is not None
        base_graph, graph = (self._graph(one.parent_id) for one in (baseline, stored))
        if base_graph is None or graph is None:
            return ()
        base_kernels, kernels = (self._kernels(one.model) for one in (baseline, stored))
        return layers_of(base_graph.path, graph.path, base_kernels, kernels)

    def _fusions(self, chosen: Variant) -> tuple[Fusion, ...]:
        stored = self.trials.builder.find(chosen.id)
        assert stored is not None
        graph = self._graph(stored.parent_id)
        return self.trials.evaluator.fusions(stored, graph) if graph is not None else ()

    def _graph(self, variant_id: str) -> OnnxModel | None:
        """The ONNX model that an engine was made of."""
        builder = self.trials.builder
        found = builder.find(variant_id)
        model = found.model if found is not None else builder.base
        return model if isinstance(model, OnnxModel) else None

    def _kernels(self, model: object) -> Sequence[KernelTime]:
        assert isinstance(model, EngineModel)
        evaluator = self.trials.evaluator
        size = evaluator.batch_sizes[-1]
        sizes = (size,) if model.spec.name == "openvino" else ()
        batch = {name: array[:size] for name, array in evaluator.inputs.items()}
        contender = Contender(model.directory, model.served(1, 1, sizes))
        return self.measurer.kernels(contender, batch, _N_RUNS)
