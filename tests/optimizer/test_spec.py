"""Reading specs: what they become, and what their author is told."""

from pathlib import Path

import pytest

from optimizer.errors import SpecInvalid
from optimizer.spec import OnnxSource, Spec, TorchSource, read_spec

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
    assert spec.techniques.enabled == ("compilation",)
    assert (spec.target.cores, spec.target.price_per_core_hour) == (2, 0.04)


def test_spec_names_an_onnx_model_when_it_is_given_alone(folder: Path) -> None:
    start, stop = SPEC.index("model:\n"), SPEC.index("data:\n")
    spec = read(folder, SPEC[:start] + "model: {onnx: model.onnx}\n" + SPEC[stop:])
    assert spec.model == OnnxSource(folder / "model.onnx")


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
        f"{where}:17: data.test.path: got 'lost.npz', want an existing file, {lost}.npz is none",
        f"{where}:20: objectiv: unknown key, did you mean 'objective'? allowed: apiVersion, "
        "budget, data, kind, model, name, objective, seed, slo, target, techniques",
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
        pytest.param("format: numpy", "format: parquet", "want image", id="no preprocessing"),
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
def test_example_lacks_only_generated_files_when_nothing_was_made(
    example: str, tmp_path: Path
) -> None:
    """The folder is copied, so that files which `train.py` has left in it don't count."""
    source = Path(__file__).parents[2] / "examples" / example
    for name in ("spec.yaml", "slo.yaml"):
        (tmp_path / name).write_text((source / name).read_text())
    environ = {"TRIMSERVE_DATA": str(tmp_path), "TRIMSERVE_WEIGHTS": str(tmp_path)}
    found = problems(tmp_path, (source / "spec.yaml").read_text(), environ)
    assert len(found) == 4
    assert all("want an existing file" in problem for problem in found)
