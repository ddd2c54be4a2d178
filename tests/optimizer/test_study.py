"""A study from spec to repository, on a tiny model and with a fake server."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from optimizer.blocks import PROTOCOL_VERSION
from optimizer.errors import SpecInvalid
from optimizer.execution.setup import Surroundings, read_data
from optimizer.observer import Silent, Standing
from optimizer.recipe import Recipe, Traits
from optimizer.result import Variant, Verification, from_json, to_json
from optimizer.space import Categorical, Parameters, Space
from optimizer.spec import Spec
from optimizer.store import Store
from optimizer.study import Options, optimize
from optimizer.techniques import TECHNIQUES, Context, Technique, load_technique
from optimizer.variant import Kind, Model, Stage, StoredModel
from serve.artifact import read_golden, read_manifest, verify_files
from serve.engines import load_engine
from serve.machine import this_machine
from tests.optimizer.tiny_study import QUICK, FakeVerifier, spec_with, write_study
from tests.optimizer.trials_bench import in_a_hurry

VIOLATED = Verification("violated", ("too slow",), slo_latency_s=2.0)


@dataclass
class Diary(Silent):
    """An observer that remembers."""

    phases: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def trial_ended(self, variant: Variant, standing: Standing) -> None:
        self.variants.append(variant)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spec of a tiny study, beside the store that the tests of this module share."""
    return in_a_hurry(write_study(tmp_path_factory.mktemp("study")))


def options(study: Path, verifier: FakeVerifier | None = None, **more: object) -> Options:
    given = Options(
        store=study.with_name("store.sqlite"), verifier=verifier or FakeVerifier(), effort=QUICK
    )
    return replace(given, **more)


def test_study_publishes_the_chosen_variant_with_all_that_serving_needs(
    study: Path, tmp_path: Path
) -> None:
    verifier = FakeVerifier()
    diary = Diary()
    repository = tmp_path / "models"
    result = optimize(
        spec_with(study, trials=4), repository, options(study, verifier, observer=diary)
    )

    assert result.outcome == "met"
    chosen = result.chosen
    assert chosen is not None
    assert chosen.version == "1"
    assert chosen.test_quality is not None
    directory = repository / "tiny" / "1"
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    assert manifest.variant_id == chosen.id
    assert manifest.recipe[0].technique == "export"
    assert manifest.quality == chosen.quality
    assert manifest.profile is not None
    assert manifest.slo is not None
    assert manifest.slo["name"] == "tiny"
    assert verifier.candidates[0].manifest.engine == manifest.engine
    assert manifest.golden is not None
    inputs, expected = read_golden(directory / manifest.golden.file)
    engine = load_engine(directory, manifest.engine)
    np.testing.assert_allclose(engine.run(inputs)["logits"], expected["logits"], rtol=1e-5)
    engine.close()
    assert 'name: "tiny"' in (repository / "tiny" / "config.pbtxt").read_text()
    assert diary.phases[-2:] == ["publishing", "what each step contributed"]
    assert [variant.label for variant in diary.variants] == [
        "ONNX Runtime",
        "int8 (mse), ONNX Runtime",
        "OpenVINO",
        "int8 (mse), OpenVINO",
    ]
    int8 = [variant for variant in result.variants if variant.precision == "int8"]
    assert {variant.int8_share for variant in int8} == {1.0}
    assert result.baseline is not None
    assert result.baseline.label == "ONNX Runtime"
    assert from_json(to_json(result)) == result


def test_study_makes_the_same_choice_without_measuring_again_when_it_is_repeated(
    study: Path, tmp_path: Path
) -> None:
    first = optimize(spec_with(study, trials=4), tmp_path / "first", options(study))
    before = _measurements(study)

    again = optimize(spec_with(study, trials=4), tmp_path / "again", options(study))

    assert _measurements(study) == before
    assert first.chosen is not None
    assert again.chosen is not None
    assert again.chosen.id == first.chosen.id
    assert [one.service_times for one in again.variants] == [
        one.service_times for one in first.variants
    ]


def test_study_publishes_the_next_best_when_the_first_is_violated(
    study: Path, tmp_path: Path
) -> None:
    best = optimize(spec_with(study, trials=2), tmp_path / "best", options(study)).chosen
    assert best is not None
    verifier = FakeVerifier({(best.engine, best.precision): VIOLATED})

    result = optimize(spec_with(study, trials=2), tmp_path / "models", options(study, verifier))

    assert result.outcome == "met"
    assert result.chosen is not None
    assert result.chosen.id != best.id
    refuted = result.variant(best.id)
    assert refuted is not None
    assert refuted.status == "infeasible"
    assert refuted.reasons[0].constraint == "latency"


def table_in(store: Path, spec: Spec, techniques: Mapping[str, Technique]) -> object:
    """What pruning is offered, as a worker of the next study would build it."""
    shared = Surroundings(spec, read_data(spec), this_machine(), techniques)
    with Store(store) as opened:
        builder = shared.builder(opened)
        option = builder.option("pruning", Recipe(builder.base.kind))
    assert option is not None
    return option.space.get("latencies")


def test_study_times_the_table_of_pruning_once_and_the_next_one_finds_it(
    study: Path, tmp_path: Path
) -> None:
    diary, spec = Diary(), spec_with(study, trials=1)
    techniques = {name: load_technique(name) for name in ("pruning", "export", "compilation")}
    store = tmp_path / "store.sqlite"
    given = options(study, observer=diary, store=store, techniques=techniques)
    found = []
    for name in ("first", "again"):
        optimize(spec, tmp_path / name, given)
        with Store(store) as opened:
            found.append(opened.values("block", PROTOCOL_VERSION, this_machine()))

    # Of widths 1 to 16, 16 to 16 and 16 to 4, in steps of 8.
    assert len(found[0]) == 2 + 4 + 2
    assert found[0] == found[1]
    assert diary.phases.count("timing 8 layers for pruning") == 2
    assert isinstance(table_in(store, spec, techniques), Categorical)


def test_study_goes_without_the_table_and_says_so_when_there_is_no_time_for_it(
    study: Path, tmp_path: Path
) -> None:
    diary, spec = Diary(), spec_with(study, trials=1)
    techniques = {name: load_technique(name) for name in ("pruning", "export", "compilation")}
    store, ticks = tmp_path / "store.sqlite", itertools.count(0.0, 1.0)
    given = options(study, observer=diary, store=store, techniques=techniques)
    budget = spec.budget.model_copy(update={"wall_clock_s": 15.0})
    hasty = replace(given, clock=lambda: next(ticks))
    optimize(replace(spec, budget=budget), tmp_path, hasty)
    assert "pruning: 1 of 8 layers could be timed in its share of 20%" in diary.notes[0]
    assert table_in(store, spec, techniques) is None


@pytest.mark.parametrize(
    ("verification", "outcome"),
    [
        pytest.param(VIOLATED, "infeasible", id="violated"),
        pytest.param(Verification("inconclusive", ("few requests",)), "inconclusive", id="unsure"),
    ],
)
def test_study_leaves_nothing_in_the_repository_when_no_variant_is_met(
    verification: Verification, outcome: str, study: Path, tmp_path: Path
) -> None:
    engines = ("onnxruntime", "openvino")
    verdicts = {(e, p): verification for e in engines for p in ("fp32", "int8", "bf16")}
    verifier = FakeVerifier(verdicts)
    repository = tmp_path / "models"

    spec = spec_with(study, trials=10)
    spec = replace(
        spec, techniques=spec.techniques.model_copy(update={"include": ("compilation",)})
    )

    result = optimize(spec, repository, options(study, verifier))

    assert result.outcome == outcome
    assert result.chosen is None
    assert len(verifier.candidates) == len(result.variants)
    assert not repository.exists()


def test_study_is_unverified_and_published_when_that_was_asked_for(
    study: Path, tmp_path: Path
) -> None:
    verifier = FakeVerifier()
    result = optimize(spec_with(study, trials=1), tmp_path, options(study, verifier, verify=False))
    assert result.outcome == "unverified"
    assert verifier.candidates == []
    assert (tmp_path / "tiny" / "1" / "manifest.json").is_file()


def test_study_names_the_nearest_miss_when_nothing_is_feasible(study: Path, tmp_path: Path) -> None:
    spec = spec_with(study, trials=2)
    latency = spec.slo.latency.model_copy(update={"threshold_ms": 0.001})
    spec = replace(spec, slo=spec.slo.model_copy(update={"latency": latency}))
    result = optimize(spec, tmp_path / "models", options(study))
    assert result.outcome == "inconclusive"  # not every baseline was tried with two trials
    assert "the budget ended before every baseline was tried" in result.notes
    spec = replace(spec, budget=spec.budget.model_copy(update={"trials": 5}))
    result = optimize(spec, tmp_path / "models", options(study))
    assert result.outcome == "infeasible"
    assert result.nearest_miss is not None
    assert result.nearest_miss.binding.constraint == "latency"
    assert not (tmp_path / "models").exists()


def test_study_says_that_samples_are_too_few_before_anything_is_built(
    study: Path, tmp_path: Path
) -> None:
    spec = spec_with(study, trials=2)
    assert spec.slo.accuracy is not None
    strict = spec.slo.accuracy.model_copy(update={"max_drop_points": 0.1})
    spec = replace(spec, slo=spec.slo.model_copy(update={"accuracy": strict}))
    diary = Diary()
    given = options(study, observer=diary, store=tmp_path / "store.sqlite")
    result = optimize(spec, tmp_path / "models", given)
    assert result.outcome == "inconclusive"
    assert "data.validation has 96 samples" in result.notes[0]
    assert diary.phases == ["reading model and data"]
    assert not given.store.exists()


def test_study_says_that_requests_are_too_few_before_anything_is_built(
    study: Path, tmp_path: Path
) -> None:
    spec = spec_with(study, trials=2)
    spec = replace(spec, slo=spec.slo.model_copy(update={"window_s": 2.0}))
    diary = Diary()
    given = options(study, observer=diary, store=tmp_path / "store.sqlite")
    result = optimize(spec, tmp_path / "models", given)
    assert result.outcome == "inconclusive"
    assert (
        "are 100 requests, but a quantile of 0.99 can't be shown with fewer than 299"
        in (result.notes[0])
    )
    assert diary.phases == ["reading model and data"]
    assert not given.store.exists()


class Raising:
    """A technique that accepts every model and fails."""

    traits = Traits("pruning", "1", Stage.PRUNE, Kind.TORCH, Kind.TORCH)

    def check(self, model: Model, context: Context) -> str | None:
        return None

    def space(self, model: Model, context: Context) -> Space:
        return {"ratio": Categorical((0.5,))}

    def describe(self, parameters: Parameters) -> str:
        return "pruned"

    def apply(
        self, model: Model, parameters: Parameters, context: Context, directory: Path
    ) -> StoredModel:
        raise RuntimeError("a layer without a name")


def test_study_reports_a_technique_that_raises_and_goes_on(study: Path, tmp_path: Path) -> None:
    techniques: Mapping[str, Technique] = {
        "pruning": Raising(),
        "export": load_technique("export"),
        "compilation": load_technique("compilation"),
    }
    result = optimize(spec_with(study, trials=4), tmp_path, options(study, techniques=techniques))
    assert result.outcome == "met"
    dropped = [variant for variant in result.variants if variant.status == "dropped"]
    assert dropped
    assert dropped[0].label == "pruned"
    assert dropped[0].reasons[0].detail == ("pruning failed: RuntimeError: a layer without a name")


class Refusing(Raising):
    """A technique that finds nothing to do in any model."""

    def check(self, model: Model, context: Context) -> str | None:
        return "no layer is wide enough"


def test_study_says_why_a_technique_is_left_out_when_its_check_refuses(
    study: Path, tmp_path: Path
) -> None:
    techniques: Mapping[str, Technique] = {
        "pruning": Refusing(),
        "export": load_technique("export"),
        "compilation": load_technique("compilation"),
    }
    result = optimize(spec_with(study, trials=3), tmp_path, options(study, techniques=techniques))
    assert result.outcome == "met"
    assert "pruning was left out: no layer is wide enough" in result.notes


def test_study_leaves_out_what_the_spec_excludes(study: Path, tmp_path: Path) -> None:
    spec = spec_with(study, trials=10)
    included = spec.techniques.model_copy(update={"include": ("compilation",)})
    result = optimize(replace(spec, techniques=included), tmp_path, options(study))
    assert {variant.precision for variant in result.variants} <= {"fp32", "bf16"}


def test_study_refuses_more_cores_than_it_may_use(study: Path, tmp_path: Path) -> None:
    spec = spec_with(study, trials=1)
    target = spec.target.model_copy(update={"cores": 4096})
    with pytest.raises(SpecInvalid, match=r"target\.cores: got 4096, want at most"):
        optimize(replace(spec, target=target), tmp_path, options(study))


def test_every_technique_of_the_table_loads() -> None:
    for name in TECHNIQUES:
        assert load_technique(name).traits.name == name


def _measurements(study: Path) -> int:
    import sqlite3

    connection = sqlite3.connect(study.with_name("store.sqlite"))
    (count,) = connection.execute("SELECT count(*) FROM measurements").fetchone()
    connection.close()
    assert isinstance(count, int)
    return count


def test_manifest_is_plain_json(study: Path, tmp_path: Path) -> None:
    optimize(spec_with(study, trials=1), tmp_path, options(study))
    document = json.loads((tmp_path / "tiny" / "1" / "manifest.json").read_text())
    assert document["engine"]["name"] == "onnxruntime"
    assert str(tmp_path) not in json.dumps(document)
