"""A table of `search_table.py` in the place of building and measuring: trials end at once, as they
would have ended, by the study's own ladder, serving rule, block table and log. No torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from loadtest.slo import Slo
from optimizer.builder import Builder
from optimizer.estimates import Estimates
from optimizer.evaluator import Evaluator
from optimizer.judgement import Judgement
from optimizer.kernels import KernelProof
from optimizer.recipe import EFFORT, EFFORTS, Recipe, Traits
from optimizer.result import InstanceTimes, Prediction, ServingChoice, Speedup
from optimizer.search.landscape import Option
from optimizer.serving import Serving
from optimizer.simulation import FrontEnd
from optimizer.space import Categorical, Space
from optimizer.spec import Constraints
from optimizer.store import Store, StoredVariant
from optimizer.timing import Timing
from optimizer.trials import Trials
from optimizer.variant import EngineModel, Kind, Stage
from serve.artifact import Quality, ServiceTime, Step
from serve.engines import EngineSpec
from serve.machine import Machine

SHRINK = Traits("shrink", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH, preserves=False)
DISTILL = Traits(
    "distill", "1", Stage.RECOVER, Kind.TORCH, Kind.TORCH, optional=False, preserves=False
)
EXPORT = Traits("export", "1", Stage.EXPORT, Kind.TORCH, Kind.ONNX, optional=False)
INT8 = Traits("quantization", "1", Stage.PRECISION, Kind.ONNX, Kind.ONNX)
COMPILE = Traits("compilation", "1", Stage.COMPILE, Kind.ONNX, Kind.ENGINE, optional=False)

BLOCKS = tuple(f"blocks_{number}" for number in (1, 2, 3))
SPACES: Mapping[str, Space] = {
    "shrink": {
        **{name: Categorical((3, 2, 1)) for name in BLOCKS},
        "width": Categorical((1.0, 0.5)),
    },
    "distill": {EFFORT: Categorical(tuple(reversed(EFFORTS)))},
    "export": {},
    "quantization": {},
    "compilation": {"engine": Categorical(("onnxruntime", "openvino"), is_baseline=True)},
}
PRICE_PER_CORE_HOUR = 0.04

Point = tuple[tuple[object, ...] | None, bool, str]
"""(shape, whether it is int8, engine)."""


def point_of(recipe: Recipe) -> Point:
    steps = {choice.traits.name: choice.parameters for choice in recipe.choices}
    shape = steps.get("shrink")
    values = None if shape is None else (*(shape[name] for name in BLOCKS), shape["width"])
    return values, "quantization" in steps, str(steps.get("compilation", {}).get("engine", ""))


@dataclass(frozen=True)
class Row:
    """What was measured of a point. `quality` is by effort."""

    label: str
    size_bytes: int
    timing: Timing
    serving: ServingChoice
    quality: Mapping[str, Quality]
    blocks: Mapping[str, int]

    def drop(self, effort: str = EFFORTS[-1]) -> float:
        return self.quality[effort].drop_bound

    @property
    def cost(self) -> float:
        return self.serving.cost_per_million


@dataclass(frozen=True, eq=False)
class Table:
    machine: Machine
    rows: Mapping[Point, Row]
    blocks: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Block → engine → batch size → seconds."""
    slo: Mapping[str, object]
    epochs: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> "Table":
        stored = json.loads(path.read_text())
        machine = {**stored["machine"], "flags": tuple(stored["machine"]["flags"])}
        rows = dict(_row(row) for row in stored["rows"])
        return cls(Machine(**machine), rows, stored["blocks"], stored["slo"], stored["epochs"])

    def feasible(self, max_drop: float) -> dict[Point, Row]:
        return {point: row for point, row in self.rows.items() if row.drop() <= max_drop}

    def best(self, max_drop: float) -> float:
        return min(row.cost for row in self.feasible(max_drop).values())

    def best_baseline(self, max_drop: float) -> float:
        """Of the untouched network's variants."""
        feasible = self.feasible(max_drop)
        return min(row.cost for point, row in feasible.items() if point[0] is None)


@dataclass(frozen=True)
class RecordedEngine(EngineModel):
    n_bytes: int = 0

    def size_bytes(self) -> int:
        return self.n_bytes


@dataclass(frozen=True)
class _Named:
    """All of a technique that a replay asks for."""

    traits: Traits
    passes: Mapping[str, float] = field(default_factory=dict)

    def describe(self, parameters: Mapping[str, object]) -> str:
        return " ".join(map(str, parameters.values()))

    def epochs(self, parameters: Mapping[str, object], _context: object) -> float:
        return self.passes[str(parameters[EFFORT])]


@dataclass(frozen=True)
class _Block:
    key: str


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedBuilder(Builder):
    table: Table

    def ids(self, recipe: Recipe) -> tuple[str, ...]:
        choices = recipe.choices
        return tuple(str(Recipe(Kind.TORCH, choices[: n + 1])) for n in range(len(choices)))

    def steps(self, recipe: Recipe) -> tuple[Step, ...]:
        return tuple(Step(c.traits.name, "1", dict(c.parameters), 0) for c in recipe.choices)

    def build(self, recipe: Recipe) -> StoredVariant:
        point = point_of(recipe)
        spec = EngineSpec(point[2], "", "int8" if point[1] else "fp32")
        name = self.ids(recipe)[-1]
        model = RecordedEngine(Path(), spec, name, n_bytes=self.table.rows[point].size_bytes)
        return StoredVariant(name, "", self.steps(recipe)[-1], "", model, 0.0)

    def find(self, _variant_id: str) -> StoredVariant | None:
        return None

    def option(self, name: str, _skeleton: Recipe) -> Option | None:
        return Option(self.techniques[name].traits, SPACES[name])

    def blocks(self, recipe: Recipe) -> Mapping[_Block, int] | None:
        shape = point_of(recipe)[0]
        row = self.table.rows[shape, False, "onnxruntime"]
        return {_Block(key): n for key, n in row.blocks.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedEvaluator(Evaluator):
    table: Table
    points: dict[str, tuple[Point, str]]
    """Variant → (point, effort)."""

    def check(self, _variant: StoredVariant, _parent: object) -> KernelProof:
        return KernelProof(0.0, 0, 0, ())

    def timings(
        self, variant: StoredVariant, _baseline: StoredVariant, _best_speedup: float
    ) -> tuple[Timing, ...]:
        return (self.table.rows[self.points[variant.id][0]].timing,)


class RecordedJudgement(Judgement):
    def quality(self, variant: StoredVariant, _base: StoredVariant, _split: object) -> Quality:
        point, effort = self.evaluator.points[variant.id]
        return self.evaluator.table.rows[point].quality[effort]


@dataclass(frozen=True)
class RecordedServing(Serving):
    table: Table

    def choose(self, times: Sequence[InstanceTimes], _slo: Slo | None = None) -> ServingChoice:
        return self._by_times[times[0]]

    @cached_property
    def _by_times(self) -> Mapping[InstanceTimes, ServingChoice]:
        return {row.timing.times: row.serving for row in self.table.rows.values()}


@contextmanager
def empty_store() -> Iterator[Store]:
    with TemporaryDirectory() as folder, Store(Path(folder) / "store.db") as store:
        yield store


def recorded_trials(table: Table, store: Store, max_drop: float, seed: int) -> Trials:
    """A study's trials at their beginning; what earlier studies left in the store isn't recalled
    yet."""
    slo = Slo.model_validate({**table.slo, "accuracy": {"max_drop_points": max_drop * 100}})
    spec = SimpleNamespace(
        slo=slo,
        objective="cost",
        seed=seed,
        constraints=Constraints(),
        budget=SimpleNamespace(training_epochs=None),
        target=SimpleNamespace(price_per_core_hour=PRICE_PER_CORE_HOUR),
    )
    traits = (SHRINK, DISTILL, EXPORT, INT8, COMPILE)
    techniques = {one.name: _Named(one, table.epochs) for one in traits}
    base = SimpleNamespace(digest="base", kind=Kind.TORCH, precision="fp32")
    measurer = SimpleNamespace(machine=table.machine)
    builder = RecordedBuilder(store, base, techniques, None, {}, table=table)
    points = _Points(builder)
    evaluator = RecordedEvaluator(store, measurer, 1, (1,), {}, seed, table=table, points=points)
    judgement = RecordedJudgement(evaluator, None, 0.95, seed)
    serving = RecordedServing(spec, 1, FrontEnd(), table)
    estimates = Estimates(spec, store, measurer, "base", 1, builder.blocks)
    _fill(estimates, table)
    name = f"study {seed}"
    return Trials(spec, builder, evaluator, judgement, serving, None, name, estimates)


class _Points(dict[str, tuple[Point, str]]):
    """By variant's id, made as they are asked for."""

    def __init__(self, builder: RecordedBuilder) -> None:
        super().__init__()
        for point in builder.table.rows:
            for effort in EFFORTS:
                recipe = recipe_of(point, effort)
                self[builder.ids(recipe)[-1]] = (point, effort)


def recipe_of(point: Point, effort: str = EFFORTS[-1]) -> Recipe:
    shape, is_int8, engine = point
    recipe = Recipe(Kind.TORCH)
    if shape is not None:
        values = dict(zip((*BLOCKS, "width"), shape, strict=True))
        recipe = recipe.then(SHRINK, values).then(DISTILL, {EFFORT: effort})
    recipe = recipe.then(EXPORT, {})
    recipe = recipe.then(INT8, {}) if is_int8 else recipe
    return recipe.then(COMPILE, {"engine": engine})


def _fill(estimates: Estimates, table: Table) -> None:
    for key, engines in table.blocks.items():
        for engine, times in engines.items():
            estimates._timed_blocks.add((engine, key))
            for size, seconds in times.items():
                estimates._times[engine, key, int(size)] = seconds


def _row(row: Mapping) -> tuple[Point, Row]:
    shape = row["shape"]
    values = None if shape is None else (*(shape[name] for name in BLOCKS), shape["width"])
    times = dict(row["times"])
    times["times"] = tuple(ServiceTime(**one) for one in times["times"])
    times["quantiles"] = ()
    timing = Timing(InstanceTimes(**times), Speedup(**row["speedup"]))
    serving = dict(row["serving"])
    serving["prediction"] = Prediction(**serving["prediction"])
    quality = {effort: Quality(**one) for effort, one in row["quality"].items()}
    for effort in EFFORTS:  # the untouched network is what it is at any effort
        quality.setdefault(effort, quality[EFFORTS[-1]])
    point = (values, row["int8"], row["engine"])
    return point, Row(
        row["label"],
        row["size_bytes"],
        timing,
        ServingChoice(**serving),
        quality,
        row["blocks"],
    )
