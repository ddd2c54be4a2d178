"""Reading specs: what they become, and what their author is told."""

from pathlib import Path

import pytest
import torch

from optimizer.errors import SpecInvalid
from optimizer.spec import (
    ExportedSource,
    ModuleSource,
    OnnxSource,
    Spec,
    TorchSource,
    read_spec,
)

SLO = """\
apiVersion: trimserve/v1
kind: SLO
name: digits
latency: {threshold_ms: 20}
workload: {rate_per_s: 100}
accuracy: {max_drop_points: 2}
"""

SPEC = """\
apiVersion: trimserve/v1
kind: Optimization
name: digits
slo: slo.yaml
seed: 7
model:
  factory: model:build
  weights: weights.safetensors
  inputs:
    - {name: image, datatype: FP32, shape: [1, 8, 8]}
  outputs:
    - {name: logits}
data:
  format: numpy
  train: {path: train.npz, rows: [0, 100]}
  validation: {path: train.npz, rows: [100, 150]}
  test: {path: test.npz}
  calibration_samples: 32
  overlap: drop
objective: latency
budget: {wall_clock_s: 60, trials: 5}
techniques:
  exclude: [quantization]
target: {device: cpu, cores: 2, price_per_core_hour: 0.04}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("weights.safetensors", "train.npz", "test.npz", "model.onnx"):
        (tmp_path / name).touch()
    (tmp_path / "slo.yaml").write_text(SLO)
    return tmp_path


def read(folder: Path, text: str = SPEC, environ: dict[str, str] | None = None) -> Spec:
    path = folder / "spec.yaml"
    path.write_text(text)
    return read_spec(path, environ)


def problems(folder: Path, text: str, environ: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(SpecInvalid) as caught:
        read(folder, text, environ)
    return caught.value.problems


def changed(old: str, new: str) -> str:
    assert old in SPEC
    return SPEC.replace(old, new)


def test_spec_gives_typed_fields_and_absolute_paths(folder: Path) -> None:
    spec = read(folder)
    assert spec.source == folder / "spec.yaml"
    assert (spec.name, spec.seed, spec.objective) == ("digits", 7, "latency")
    assert spec.slo.accuracy is not None
    assert spec.slo.accuracy.max_drop_points == 2
    assert isinstance(spec.model, TorchSource)
    assert spec.model.weights == folder / "weights.safetensors"
    assert str(spec.model.factory) == "model:build"
    assert spec.model.factory.directory == folder
    assert spec.model.inputs[0].shape == (1, 8, 8)
    assert [tensor.name for tensor in spec.model.outputs] == ["logits"]
    assert spec.data.train.path == folder / "train.npz"
    assert spec.data.validation.rows == (100, 150)
    assert (spec.data.calibration_samples, spec.data.overlap) == (32, "drop")
    assert (spec.budget.wall_clock_s, spec.budget.trials) == (60, 5)
    assert spec.techniques.enabled == ("compilation", "torch_compilation")
    assert (spec.target.cores, spec.target.price_per_core_hour) == (2, 0.04)


def test_spec_names_an_onnx_model_when_it_is_given_alone(folder: Path) -> None:
    start, stop = SPEC.index("model:\n"), SPEC.index("data:\n")
    spec = read(folder, SPEC[:start] + "model: {onnx: model.onnx}\n" + SPEC[stop:])
    assert spec.model == OnnxSource(folder / "model.onnx")


def test_spec_asks_for_classification_when_no_task_is_named(folder: Path) -> None:
    task = read(folder).task
    assert (task.kind, task.metric, task.output, task.range) == (
        "classification",
        None,
        None,
        (0, 1),
    )


def test_spec_gives_the_metric_beside_it_when_the_task_is_custom(folder: Path) -> None:
    text = changed(
        "objective: latency", "task: {kind: custom, metric: 'own:score', range: [-1, 1]}"
    )
    task = read(folder, text).task
    assert task.metric is not None
    assert (str(task.metric), task.metric.directory) == ("own:score", folder)
    assert task.range == (-1, 1)


def test_spec_takes_folders_and_texts_when_the_format_has_them(folder: Path) -> None:
    (folder / "pictures").mkdir()
    start, stop = SPEC.index("data:\n"), SPEC.index("objective:")
    splits = "".join(f"  {name}: {{path: pictures}}\n" for name in ("train", "validation", "test"))
    image = "  image: {mean: [0.5], std: [0.5]}\n"
    data = read(
        folder, f"{SPEC[:start]}data:\n  format: image_folder\n{splits}{image}{SPEC[stop:]}"
    )
    assert data.data.test.path == folder / "pictures"
    splits = splits.replace("pictures", "test.npz")
    text = "  text: {tokenizer: test.npz, max_length: 64, mask: attention_mask}\n"
    data = read(folder, f"{SPEC[:start]}data:\n  format: parquet\n{splits}{text}{SPEC[stop:]}")
    assert data.data.text is not None
    assert data.data.text.inputs == ("input_ids", "attention_mask")
    assert data.data.text.tokenizer == folder / "test.npz"


def test_spec_resolves_paths_against_its_own_folder_when_run_elsewhere(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "spec.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert read_spec(folder / "spec.yaml").data.test.path == folder / "test.npz"


def test_spec_expands_variables_when_they_are_defined(folder: Path) -> None:
    text = changed("test: {path: test.npz}", 'test: {path: "${DATA}/test.npz"}')
    assert read(folder, text, {"DATA": str(folder)}).data.test.path == folder / "test.npz"


def test_spec_names_the_variable_when_it_is_not_defined(folder: Path) -> None:
    text = changed("test: {path: test.npz}", 'test: {path: "${DATA}/test.npz"}')
    assert problems(folder, text, {}) == (
        f"{folder}/spec.yaml:17: data.test.path: got '${{DATA}}/test.npz', "
        "want the environment variable DATA to be defined",
    )


def test_spec_reports_every_problem_with_line_and_key_at_once(folder: Path) -> None:
    text = SPEC.replace("weights.safetensors", "lost.safetensors").replace("test.npz", "lost.npz")
    text = text.replace("seed: 7", "seed: seven").replace("objective:", "objectiv:")
    found = problems(folder, text)
    where = f"{folder}/spec.yaml"
    lost = folder / "lost"
    assert set(found) == {
        f"{where}:5: seed: got 'seven', want a valid integer",
        f"{where}:8: model.weights: got 'lost.safetensors', "
        f"want an existing file, {lost}.safetensors is none",
        f"{where}:17: data.test.path: got 'lost.npz', "
        f"want an existing file or folder, {lost}.npz is none",
        f"{where}:20: objectiv: unknown key, did you mean 'objective'? allowed: apiVersion, "
        "budget, constraints, data, kind, model, name, objective, search, seed, slo, target, "
        "task, techniques, training",
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("name: digits\n", "name: ../digits\n", "name: got '../digits'", id="a path"),
        pytest.param("model:build", "model.build", "want 'module:function'", id="no function"),
        pytest.param(
            "weights: weights.safetensors", "weights: model.onnx", "can run code", id="no weights"
        ),
        pytest.param("  factory: model:build\n", "", "want factory", id="no factory"),
        pytest.param(
            "  factory: model:build\n",
            "  factory: model:build\n  onnx: model.onnx\n",
            "not both",
            id="two models",
        ),
        pytest.param("[1, 8, 8]", "[0, 8, 8]", "model.inputs.0.shape", id="an empty axis"),
        pytest.param("[1, 8, 8]", "[1, 8.0, 8]", "model.inputs.0.shape.1", id="a fraction"),
        pytest.param(
            "    - {name: logits}",
            "    - {name: logits}\n    - {name: logits}",
            "want every tensor name once",
            id="an output twice",
        ),
        pytest.param("FP32", "BYTES", "model.inputs.0.datatype", id="a datatype of strings"),
        pytest.param("[0, 100]", "[100, 100]", "0 <= start < stop", id="no rows"),
        pytest.param("[0, 100]", "[0, 50, 100]", "data.train.rows", id="three ends of rows"),
        pytest.param(
            "{path: test.npz}", "{call: 'model:test'}", "want path in test", id="a wrong origin"
        ),
        pytest.param(
            "{path: test.npz}",
            "{path: test.npz, call: 'model:test'}",
            "want either path or call",
            id="two origins",
        ),
        pytest.param(
            "format: numpy", "format: image_folder", "want a folder as train.path", id="no folder"
        ),
        pytest.param("{path: test.npz}", "{path: .}", "want a file as test.path", id="no file"),
        pytest.param(
            "  overlap: drop",
            "  overlap: drop\n  text: {tokenizer: test.npz, max_length: 8}",
            "want no text for the format numpy",
            id="texts in arrays",
        ),
        pytest.param(
            "objective: latency", "task: {kind: custom}", "want metric", id="no metric of its own"
        ),
        pytest.param(
            "objective: latency",
            "task: {metric: 'model:score', range: [0, 5]}",
            "task: got {'metric': 'model:score', 'range': [0, 5]}, "
            "want metric and range only for the kind custom",
            id="a metric for a built-in task",
        ),
        pytest.param(
            "objective: latency",
            "task: {kind: custom, metric: 'model:score', range: [1, 1]}",
            "task.range: got [1, 1], want [low, high], finite numbers with low < high",
            id="an empty range",
        ),
        pytest.param(
            "objective: latency", "task: {kind: regression}", "task.kind", id="an unknown task"
        ),
        pytest.param(
            "  overlap: drop",
            "  overlap: drop\n  image: {mean: [0.5, 0.5], std: [1.0]}",
            "want 1 (grey) or 3 (RGB) values",
            id="two channels",
        ),
        pytest.param(
            "  overlap: drop",
            "  overlap: drop\n  image: {mean: [0.5], std: [0.0]}",
            "data.image.std.0",
            id="no deviation",
        ),
        pytest.param(
            "  overlap: drop",
            "  overlap: drop\n  image: {mean: [0.5], std: [1.0], resize: 16, size: [32, 32]}",
            "want resize to be at least",
            id="a crop larger than the image",
        ),
        pytest.param("trials: 5", "trials: 0", "budget.trials", id="no trials"),
        pytest.param(
            "exclude: [quantization]", "exclude: [nas]", "techniques.exclude.0", id="unknown"
        ),
        pytest.param(
            "exclude: [quantization]",
            "include: [quantization, compilation]\n  exclude: [quantization]",
            "want quantization in include or exclude, not both",
            id="a contradiction",
        ),
        pytest.param(
            "exclude: [quantization]",
            "exclude: [compilation]",
            "want compilation among those left",
            id="nothing that the server could run",
        ),
        pytest.param(
            "objective: latency",
            "training: {pruning_rounds: 0}",
            "training.pruning_rounds: got 0",
            id="pruning in no round",
        ),
        pytest.param(
            "objective: latency",
            "training: {pruning_rounds: 2, pruning_round_epochs: 0}",
            "training.pruning_round_epochs: got 0",
            id="rounds without a training between them",
        ),
        pytest.param(
            "objective: latency",
            "training: {sparsity_epochs: 0}",
            "training.sparsity_epochs: got 0",
            id="sparsity training without epochs",
        ),
        pytest.param(
            "objective: latency",
            "training: {sparsity_strengths: [0.01, 0]}",
            "training.sparsity_strengths.1: got 0",
            id="a penalty without strength",
        ),
        pytest.param(
            "objective: latency",
            "training: {sparsity_strengths: [0.01, 0.01]}",
            "want every value once in sparsity_strengths",
            id="a strength twice",
        ),
        pytest.param(
            "objective: latency",
            "training: {sparsity_forms: [l2]}",
            "training.sparsity_forms.0: got 'l2'",
            id="an unknown penalty",
        ),
        pytest.param(
            "exclude: [quantization]",
            "architecture: {space: {kind: audio}}",
            "techniques.architecture.space.kind: got 'audio', want vision or encoder",
            id="an unknown kind of space",
        ),
        pytest.param("cores: 2", "cores: 0", "target.cores", id="no cores"),
        pytest.param(", price_per_core_hour: 0.04", "", "price_per_core_hour: missing", id="free"),
        pytest.param("device: cpu", "device: abacus", "target.device", id="an unknown device"),
    ],
)
def test_spec_is_refused_when_it_states(folder: Path, old: str, new: str, message: str) -> None:
    (found,) = problems(folder, changed(old, new))
    assert message in found
    assert found.startswith(f"{folder}/spec.yaml:")


def test_spec_names_the_slo_file_when_that_is_wrong(folder: Path) -> None:
    (folder / "slo.yaml").write_text(SLO.replace("threshold_ms: 20", "threshold_ms: -1"))
    (found,) = problems(folder, SPEC)
    assert found.startswith(f"{folder}/slo.yaml:4: latency.threshold_ms: got -1")


def test_spec_is_refused_when_its_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match="No such file"):
        read_spec(tmp_path / "none.yaml")


@pytest.mark.parametrize("example", ["digits", "cifar10"])
@pytest.mark.parametrize("name", ["spec.yaml", "architecture.yaml"])
def test_example_lacks_only_generated_files_when_nothing_was_made(
    example: str, name: str, tmp_path: Path
) -> None:
    """The folder is copied, so that files which `train.py` has left in it don't count."""
    source = Path(__file__).parents[2] / "examples" / example
    for file in source.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    environ = {"TRIMSERVE_DATA": str(tmp_path), "TRIMSERVE_WEIGHTS": str(tmp_path)}
    text = (source / name).read_text()
    found = problems(tmp_path, text, environ)
    assert len(found) == 4 + text.count("initial:")
    assert all("want an existing file" in problem for problem in found)


MODEL_KEY = SPEC[SPEC.index("model:") : SPEC.index("data:")]


@pytest.mark.parametrize(
    ("keys", "inputs", "outputs"),
    [
        pytest.param("exported: net.pt2", 0, 0, id="as the program has them"),
        pytest.param("exported: net.pt2, outputs: [{name: logits}]", 0, 1, id="outputs named"),
    ],
)
def test_exported_program_is_a_source_of_its_own(
    folder: Path, keys: str, inputs: int, outputs: int
) -> None:
    (folder / "net.pt2").touch()
    source = read(folder, changed(MODEL_KEY, f"model: {{{keys}}}\n")).model
    assert isinstance(source, ExportedSource)
    assert source.path == folder / "net.pt2"
    assert (len(source.inputs), len(source.outputs)) == (inputs, outputs)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        pytest.param("exported: model.onnx", "want a .pt2 file", id="another file"),
        pytest.param("exported: net.pt2, onnx: model.onnx", "not both", id="onnx beside it"),
        pytest.param(
            "exported: net.pt2, weights: weights.safetensors", "not both", id="weights beside it"
        ),
    ],
)
def test_exported_program_is_refused_when(folder: Path, keys: str, problem: str) -> None:
    (folder / "net.pt2").touch()
    (found,) = problems(folder, changed(MODEL_KEY, f"model: {{{keys}}}\n"))
    assert problem in found


def test_model_may_be_left_out_when_it_is_given_as_an_object(folder: Path) -> None:
    text = changed(MODEL_KEY, "")
    (found,) = problems(folder, text)
    assert found == f"{folder / 'spec.yaml'}:1: model: missing, it must be given"
    model = ModuleSource(torch.nn.Identity(), (), ())
    assert read_spec(folder / "spec.yaml", model=model).model is model
