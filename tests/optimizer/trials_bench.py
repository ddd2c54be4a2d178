"""The trials of a tiny study, for who tests them without the study around: one core, quick
measurements, everything in this process."""

from collections.abc import Mapping
from pathlib import Path

from optimizer.builder import Builder
from optimizer.evaluator import Evaluator
from optimizer.execution.delegation import DelegatingBuilder
from optimizer.execution.inline import InlineExecutor
from optimizer.execution.setup import Surroundings, enabled_techniques, read_data
from optimizer.judgement import Judgement
from optimizer.measuring.local import LocalMeasurer
from optimizer.recipe import Recipe
from optimizer.search.coordinator import Trial
from optimizer.search.landscape import Decisions
from optimizer.serving import Serving
from optimizer.simulation import FrontEnd
from optimizer.space import Value, defaults
from optimizer.spec import Spec
from optimizer.store import Store
from optimizer.tasks import make_task
from optimizer.trials import Trials
from tests.optimizer.tiny_study import QUICK

Steps = tuple[tuple[str, Mapping[str, Value]], ...]
PLAIN: Steps = (("export", {}), ("compilation", {"engine": "onnxruntime"}))
INT8: Steps = (
    ("export", {}), ("quantization", {}), ("compilation", {"engine": "openvino"}),
)  # fmt: skip


def make_trials(spec: Spec, store: Store, study_id: str = "study") -> Trials:
    measurer = LocalMeasurer(takes_cores=False)
    splits = read_data(spec)
    shared = Surroundings(spec, splits, measurer.machine, enabled_techniques(spec))
    executor = InlineExecutor(shared, store, measurer)
    builder = DelegatingBuilder(
        store, shared.base, shared.techniques, shared.context, shared.inputs, executor=executor
    )
    evaluator = Evaluator(store, measurer, 1, (1, 32), shared.inputs, spec.seed, QUICK)
    judgement = Judgement(evaluator, make_task(spec.task, has_labels=True), 0.9, spec.seed)
    serving = Serving(spec, 1, FrontEnd())
    return Trials(spec, builder, evaluator, judgement, serving, splits.validation, study_id)


def recipe_of(builder: Builder, steps: Steps) -> Recipe:
    """With defaults for what isn't given."""
    recipe = Recipe(builder.base.kind)
    for name, given in steps:
        option = builder.option(name, recipe.skeleton())
        assert option is not None
        recipe = recipe.then(option.traits, defaults(option.space, **given))
    return recipe


def trial_of(number: int, recipe: Recipe) -> Trial:
    decisions = Decisions(recipe, {"engine": str(recipe.choices[-1].parameters["engine"])})
    return Trial(number, decisions, is_baseline=True, handle=None)


def in_a_hurry(path: Path) -> Path:
    """The spec for one core."""
    path.write_text(path.read_text().replace("target: {", "target: {cores: 1, "))
    return path
