"""The contract that every technique keeps, those of the table and synthetic ones."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from optimizer.builder import Builder
from optimizer.errors import TechniqueFailed
from optimizer.model_source import source_digest
from optimizer.parity import batch_sizes, check_outputs, check_parity, load_runner
from optimizer.recipe import Recipe
from optimizer.space import Value, defaults
from optimizer.store import Store
from optimizer.techniques import TECHNIQUES, Technique, load_technique
from optimizer.variant import (
    EngineModel,
    Kind,
    Model,
    OnnxModel,
    StoredTorch,
    TorchModel,
    TorchVariant,
    directory_digest,
)
from tests.optimizer.synthetic import Narrow, Tune
from tests.optimizer.workbench import MAX_BATCH_SIZE, Workbench, make_workbench

ROOT = Path(__file__).parents[2]
SYNTHETIC: Mapping[str, type[Narrow] | type[Tune]] = {"narrow": Narrow, "tune": Tune}
ALL = (*TECHNIQUES, *SYNTHETIC)


@dataclass(frozen=True)
class Refused:
    """A model of the right kind on which a technique can't work, and its reason."""

    technique: str
    network: str
    reason: str


REFUSED = (
    Refused("pruning", "nn.Sequential(nn.Flatten(), nn.Linear(64, 4))", "nothing of the model can"),
    Refused("narrow", "nn.Sequential(nn.Flatten(), nn.Linear(64, 4))", "no two convolutions"),
    Refused("tune", "nn.Sequential(nn.Flatten(), nn.Linear(64, 4))", "no batch normalization"),
    Refused("quantization", "nn.Sequential(nn.Flatten(), nn.ReLU())", "no operator worth it"),
    Refused(
        "quantization_aware_training", "nn.Sequential(nn.Flatten(), nn.ReLU())",
        "no convolution or linear layer",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("study"))


def load(name: str) -> Technique:
    return SYNTHETIC[name]() if name in SYNTHETIC else load_technique(name)


def cases() -> Iterator[object]:
    for name in ALL:
        yield pytest.param(name, {}, id=name)
    for parameters in (
        {"calibration": "entropy"},
        {"calibration": "percentile", "percentile": 99.9, "keep_fp32": 0.1},
        {"calibration": "minmax", "equalize": "activations"},
    ):
        yield pytest.param("quantization", parameters, id="quantization by other parameters")
    yield pytest.param("compilation", {"engine": "openvino"}, id="compilation to OpenVINO")
    zeros = {"what": "weights", "pattern": "global", "schedule": "gradual"}
    yield pytest.param("pruning", zeros, id="pruning of single weights while it is trained")
    for trains in ("tune", "quantization_aware_training"):
        yield pytest.param(trains, {"effort": "full"}, id=f"{trains} at full effort")


@pytest.mark.parametrize(("name", "given"), list(cases()))
def test_technique_is_pure_and_its_results_are_equal_in_what_it_promises(
    name: str, given: dict[str, Value], bench: Workbench, tmp_path: Path
) -> None:
    technique = load(name)
    context = bench.context
    if given.get("what") == "weights":  # in the space where a runtime may have kernels for zeros
        machine = replace(context.machine, runtimes={"onnxruntime-gpu": "1.32"})
        context = replace(context, machine=machine)
    model = bench.models[technique.traits.accepts]
    before = content(model)
    assert technique.check(model, context) is None
    parameters = defaults(technique.space(model, context), **given)

    made = apply(technique, model, parameters, bench, tmp_path / "first")
    again = apply(technique, model, parameters, bench, tmp_path / "second")

    assert made.kind is technique.traits.gives
    assert made.digest == again.digest
    assert content(model) == before
    assert technique.describe(parameters) == technique.describe(dict(parameters))
    for file in (tmp_path / "first").iterdir():
        assert str(tmp_path) not in file.read_bytes().decode("latin1")
    assert batch_sizes(MAX_BATCH_SIZE) == (1, 2, 3, MAX_BATCH_SIZE)
    if technique.traits.preserves:
        check_parity(made, model, bench.inputs, MAX_BATCH_SIZE)
    else:
        check_outputs(name, made, model, bench.inputs, MAX_BATCH_SIZE)
    if isinstance(made, TorchModel):
        exported = apply(load("export"), made, {}, bench, tmp_path / "exported")
        check_parity(exported, made, bench.inputs, MAX_BATCH_SIZE)


@pytest.mark.parametrize("name", ALL)
def test_technique_is_found_as_it_was_built_when_the_store_is_opened_again(
    name: str, bench: Workbench, tmp_path: Path
) -> None:
    technique = load(name)
    model = bench.models[technique.traits.accepts]
    recipe = Recipe(model.kind).then(
        technique.traits, defaults(technique.space(model, bench.context))
    )
    with Store(tmp_path / "store.sqlite") as store:
        built = builder(store, model, technique, bench).build(recipe)
        outputs = load_runner(built.model, MAX_BATCH_SIZE)(bench.inputs)
    with Store(tmp_path / "store.sqlite") as store:
        found = builder(store, model, technique, bench).find(built.id)
        assert found == built
        again = load_runner(found.model, MAX_BATCH_SIZE)(bench.inputs)
    for output, values in outputs.items():
        np.testing.assert_array_equal(again[output], values)


@pytest.mark.parametrize("name", ALL)
def test_technique_makes_nothing_when_parameters_are_outside_of_its_space(
    name: str, bench: Workbench, tmp_path: Path
) -> None:
    technique = load(name)
    model = bench.models[technique.traits.accepts]
    space = technique.space(model, bench.context)
    chosen = defaults(space)
    wrong = chosen | {next(iter(chosen), "unknown"): "of no kind"}
    recipe = Recipe(model.kind).then(technique.traits, wrong)
    with Store(tmp_path / "store.sqlite") as store:
        at_work = builder(store, model, technique, bench)
        with pytest.raises(TechniqueFailed, match="got"):
            at_work.build(recipe)
        assert at_work.find(at_work.variant_id(recipe)) is None


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.technique)
def test_technique_refuses_with_a_reason_when_the_model_gives_it_nothing_to_do(
    case: Refused, tmp_path: Path
) -> None:
    bench = make_workbench(tmp_path, case.network)
    technique = load(case.technique)
    model = bench.torch if technique.traits.accepts is Kind.TORCH else bench.onnx
    reason = technique.check(model, bench.context)
    assert reason is not None
    assert case.reason in reason


IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from optimizer.space import defaults
from tests.optimizer.synthetic import Tune
from tests.optimizer.workbench import make_workbench

bench = make_workbench(Path(sys.argv[1]))
technique = Tune()
parameters = defaults(technique.space(bench.torch, bench.context), effort="short")
directory = Path(sys.argv[1], "made")
directory.mkdir()
print(technique.apply(bench.torch, parameters, bench.context, directory).digest)
"""


@pytest.mark.full  # takes a while
def test_technique_gives_the_same_digest_when_it_runs_in_another_process(
    bench: Workbench, tmp_path: Path
) -> None:
    made = apply(Tune(), bench.torch, {"effort": "short"}, bench, tmp_path / "made")
    other = tmp_path / "other"
    other.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(other)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == made.digest


def apply(
    technique: Technique,
    model: Model,
    parameters: Mapping[str, Value],
    bench: Workbench,
    directory: Path,
) -> TorchVariant | StoredTorch | OnnxModel | EngineModel:
    directory.mkdir()
    made = technique.apply(model, parameters, bench.context, directory)
    assert made.directory == directory
    return made


def builder(store: Store, base: Model, technique: Technique, bench: Workbench) -> Builder:
    return Builder(store, base, {technique.traits.name: technique}, bench.context, bench.inputs)


def content(model: Model) -> str:
    if isinstance(model, OnnxModel | EngineModel | TorchVariant | StoredTorch):
        return directory_digest(model.directory)
    return source_digest(model.source)
