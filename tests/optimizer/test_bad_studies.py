"""Studies that can't go well: what is wrong is said by name, and the rest goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizer.errors import SpecInvalid
from optimizer.evidence import EvidenceInvalid
from optimizer.result import StudyResult
from optimizer.spec import ModuleSource, OnnxSource, Spec, Techniques, read_spec
from optimizer.study import Options, optimize
from optimizer.techniques import load_technique
from tests.optimizer.synthetic import Narrow, NotANumber
from tests.optimizer.test_torch_source import INPUTS, OUTPUTS, Deciding, Flat, InPlace
from tests.optimizer.tiny_study import QUICK, FakeVerifier, write_study
from tests.optimizer.trials_bench import in_a_hurry

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")

PLUGIN = """
from tests.optimizer.synthetic import Narrow
from optimizer.recipe import Traits

class Taken(Narrow):
    traits = Traits(**{**vars(Narrow.traits), "name": "quantization"})

class Broken(Narrow):
    def __init__(self):
        raise RuntimeError("no licence")
"""


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return read_spec(in_a_hurry(write_study(tmp_path)))


def study(spec: Spec, directory: Path, trials: int = 10, **given: object) -> StudyResult:
    spec = replace(spec, budget=spec.budget.model_copy(update={"trials": trials}))
    options = Options(store=directory / "store.sqlite", verifier=FakeVerifier(), effort=QUICK)
    options = replace(options, **given)
    return optimize(spec, directory / "models", options)


def refusal(spec: Spec, directory: Path) -> str:
    with pytest.raises(SpecInvalid) as caught:
        study(spec, directory)
    assert not (directory / "models").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        pytest.param(Deciding(), "write it with torch.where or torch.cond", id="decides by data"),
        pytest.param(InPlace(), "double_", id="has a custom operator that works in place"),
    ],
)
def test_study_says_why_nothing_could_be_built_when_its_model(
    module: Flat, advice: str, spec: Spec, tmp_path: Path
) -> None:
    spec = replace(spec, model=ModuleSource(module, INPUTS, OUTPUTS))
    result = study(spec, tmp_path)
    assert result.outcome == "infeasible"
    assert result.rungs[0].n_dropped == len(result.variants) >= 1
    assert {row.status for row in result.variants} == {"dropped"}
    for row in result.variants:
        assert row.reasons[0].constraint == "built"
        assert row.reasons[0].detail.startswith("export failed: the dynamo exporter says: ")
        assert advice in row.reasons[0].detail
        assert "name the file as model.onnx in the spec" in row.reasons[0].detail


@pytest.mark.full  # takes a while
def test_study_goes_on_without_the_steps_whose_training_gives_nan(
    spec: Spec, tmp_path: Path
) -> None:
    techniques = {
        "narrow": Narrow(),
        "tune": NotANumber(),
        "export": load_technique("export"),
        "compilation": load_technique("compilation"),
    }
    result = study(spec, tmp_path, trials=5, techniques=techniques)
    assert result.outcome == "met"
    diverged = [row for row in result.variants if "tune" in [s.technique for s in row.recipe]]
    assert diverged
    for row in diverged:
        assert row.status == "dropped"
        assert row.reasons[0].constraint == "built"
        assert row.reasons[0].detail.startswith("tune failed: ")
        assert "NaN" in row.reasons[0].detail


def test_study_is_refused_before_its_store_when_the_data_has_one_class(
    spec: Spec, tmp_path: Path
) -> None:
    with np.load(tmp_path / "train.npz") as train:
        np.savez(tmp_path / "train.npz", image=train["image"], label=np.ones(64, np.int64))
    assert refusal(spec, tmp_path) == "data.train: every label is 1, want at least 2 classes"
    assert not (tmp_path / "store.sqlite").exists()


def test_study_says_what_was_left_out_when_the_model_is_onnx(spec: Spec, tmp_path: Path) -> None:
    techniques = Techniques(include=("pruning", "quantization", "compilation"))
    model = OnnxSource(written_onnx(tmp_path / "m.onnx"))
    result = study(replace(spec, model=model, techniques=techniques), tmp_path, trials=2)
    assert len(result.variants) == 2
    assert "pruning was left out: it takes torch models, got onnx" in result.notes


def written_onnx(path: Path) -> Path:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    weights = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "m",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def test_study_is_refused_before_its_store_when_the_report_to_learn_from_is_none(
    spec: Spec, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.touch()
    with pytest.raises(EvidenceInvalid) as caught:
        study(spec, tmp_path, from_report=report)
    assert str(caught.value) == (
        f"{report}: the document: isn't JSON; want the JSON report of trimserve loadtest"
    )
    assert not (tmp_path / "store.sqlite").exists()


def with_validation_of_train(spec: Spec) -> Spec:
    return replace(spec, data=spec.data.model_copy(update={"validation": spec.data.train}))


def with_too_much_calibration(spec: Spec) -> Spec:
    return replace(spec, data=spec.data.model_copy(update={"calibration_samples": 65}))


def with_too_few_classes(spec: Spec) -> Spec:
    return replace(spec, data=spec.data.model_copy(update={"n_classes": 2}))


def with_an_output_that_is_lost(spec: Spec) -> Spec:
    return replace(spec, task=spec.task.model_copy(update={"output": "lost"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(
            with_validation_of_train,
            "data: 64 samples of train are in validation too, want disjoint splits",
            id="it chooses by what it learns from",
        ),
        pytest.param(
            with_too_much_calibration,
            "data.calibration_samples: got 65, want at most train's 64",
            id="it calibrates with more than there is",
        ),
        pytest.param(
            with_too_few_classes, "want 0 to 1: correct it, or set data.n_classes",
            id="it has more classes than it says",
        ),
        pytest.param(
            with_an_output_that_is_lost, "task.output: got 'lost', want an output of logits",
            id="its task reads an output that the model hasn't",
        ),
    ],
)  # fmt: skip
def test_study_is_refused_by_name_when(
    change: Callable[[Spec], Spec], said: str, spec: Spec, tmp_path: Path
) -> None:
    assert said in refusal(change(spec), tmp_path)
    assert not (tmp_path / "store.sqlite").exists()


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        pytest.param("lost:Technique", "ModuleNotFoundError", id="its module isn't there"),
        pytest.param("plugin:Lost", "Lost", id="its class isn't there"),
        pytest.param("plugin:Broken", "RuntimeError: no licence", id="it can't be made"),
        pytest.param(
            "plugin:Taken", "the name quantization is taken, want another", id="its name is taken"
        ),
    ],
)
def test_study_is_refused_by_the_plugin_s_name_when(plugin: str, said: str, tmp_path: Path) -> None:
    path = in_a_hurry(write_study(tmp_path))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    plugins = f"techniques: {{plugins: ['{plugin}'], "
    path.write_text(path.read_text().replace("techniques: {", plugins))
    message = refusal(read_spec(path), tmp_path)
    assert message.startswith(f"techniques.plugins: {plugin}: ")
    assert said in message
