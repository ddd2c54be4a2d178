"""Calibration without data: inputs made from batch-norm statistics."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from optimizer.data.generated import DEFAULT_SAMPLES, NOTE, GeneratedSplit, generated_split
from optimizer.data.splits import Split
from optimizer.errors import SpecInvalid
from optimizer.execution.setup import Surroundings, enabled_techniques, read_data
from optimizer.model_source import source_digest
from optimizer.recipe import Recipe
from optimizer.space import defaults
from optimizer.spec import OnnxSource, Spec, read_spec
from optimizer.store import Store
from optimizer.study import Options, optimize
from optimizer.training.generation import can_generate, generate
from serve.machine import this_machine
from tests.optimizer.tiny_study import QUICK, write_study


def network() -> nn.Sequential:
    """Whose batch normalizations saw inputs of mean 3 and deviation 2 through a convolution."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4),
    )  # fmt: skip
    for part in made:
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    made.train()
    with torch.no_grad():
        for _ in range(8):
            made(3 + 2 * torch.randn(32, 2, 8, 8))
    return made.eval()


def apart(made: nn.Sequential, inputs: torch.Tensor) -> float:
    """How far what the normalizations see is from their statistics, of their deviations."""
    total, x = 0.0, inputs
    with torch.no_grad():
        for part in made:
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                deviation = part.running_var.sqrt()
                mean = ((x.mean((0, 2, 3)) - part.running_mean) / deviation).abs().mean()
                spread = (x.std((0, 2, 3)) / deviation - 1).abs().mean()
                total += float(mean + spread)
            x = part(x)
    return total


def test_generated_inputs_look_to_the_network_like_its_training_data() -> None:
    with torch.random.fork_rng(devices=[]):
        made = network()
        noise = torch.randn(32, 2, 8, 8)
        found = torch.from_numpy(generate(made, (2, 8, 8), 32, seed=0))
        real = 3 + 2 * torch.randn(32, 2, 8, 8)
    assert apart(made, found) < apart(made, noise) / 4
    assert apart(made, found) < 3 * apart(made, real) + 0.2


def test_generation_is_decided_by_its_seed_and_leaves_the_network_as_it_was() -> None:
    with torch.random.fork_rng(devices=[]):
        made = network()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made[0].weight.requires_grad_(False)
    one = generate(made, (2, 8, 8), 5, seed=1, n_steps=3)
    assert one.shape == (5, 2, 8, 8)
    assert one.dtype == np.float32
    assert np.array_equal(one, generate(made, (2, 8, 8), 5, seed=1, n_steps=3))
    assert not np.array_equal(one, generate(made, (2, 8, 8), 5, seed=2, n_steps=3))
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
    assert not made[0].weight.requires_grad
    assert made[3].weight.requires_grad
    assert not made.training


def test_generation_is_refused_without_batch_normalization() -> None:
    made = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert not can_generate(made)
    with pytest.raises(ValueError, match="the model has no batch normalization"):
        generate(made, (2, 8, 8), 4, seed=0)


# --- a study without training data


def without_train(directory: Path, techniques: str = "") -> Path:
    path = write_study(directory)
    text = path.read_text().replace("  train: {path: train.npz}\n", "")
    if techniques:
        text = text.replace("{exclude: [torch_compilation]}", techniques)
    path.write_text(text)
    (directory / "train.npz").unlink()
    return path


def test_spec_without_train_calibrates_on_generated_inputs(tmp_path: Path) -> None:
    spec = read_spec(without_train(tmp_path))
    splits = read_data(spec)
    assert splits.train is None
    assert isinstance(splits.calibration, GeneratedSplit)
    assert len(splits.calibration) == 16
    assert splits.calibration.read([3]).inputs["image"].shape == (1, 1, 8, 8)
    assert splits.calibration.read([3]).labels is None
    assert splits.n_classes == 4
    assert set(splits.n_dropped) == {"validation", "test"}


def calibration_of(spec: Spec, store: Store) -> Split:
    """As a process has it that starts anew."""
    around = Surroundings(spec, read_data(spec), this_machine(), enabled_techniques(spec))
    return around.builder(store).context.calibration


def test_generated_inputs_are_kept_with_the_store(tmp_path: Path) -> None:
    spec = read_spec(without_train(tmp_path))
    with Store(tmp_path / "store.sqlite") as store:
        first = calibration_of(spec, store).read().inputs["image"]
        (kept,) = store.checkpoints.glob("generated-*.npy")
        np.save(kept, first + 1)  # so that it shows who reads it
        assert np.array_equal(calibration_of(spec, store).read().inputs["image"], first + 1)


def test_generated_inputs_are_made_anew_when_their_file_is_damaged(tmp_path: Path) -> None:
    spec = read_spec(without_train(tmp_path))
    with Store(tmp_path / "store.sqlite") as store:
        first = calibration_of(spec, store).read().inputs["image"]
        (kept,) = store.checkpoints.glob("generated-*.npy")
        kept.write_bytes(kept.read_bytes()[:100])
        assert np.array_equal(calibration_of(spec, store).read().inputs["image"], first)


def test_id_of_int8_changes_with_what_it_was_calibrated_on(tmp_path: Path) -> None:
    spec = read_spec(without_train(tmp_path))
    model, source = spec.model, str(spec.source)
    digests = {
        generated_split(model, source, n, seed).digest for n, seed in ((16, 0), (17, 0), (16, 1))
    }
    assert len(digests) == 3
    assert len(generated_split(model, source, None, 0)) == DEFAULT_SAMPLES
    assert source_digest(model)


def test_study_says_that_its_int8_was_calibrated_on_generated_inputs(tmp_path: Path) -> None:
    path = without_train(tmp_path)
    options = Options(effort=QUICK, verify=False, isolate=False, store=tmp_path / "store.sqlite")
    result = optimize(path, tmp_path / "models", options)
    assert NOTE in result.notes
    int8 = [one for one in result.variants if one.precision == "int8"]
    assert int8
    assert all("on generated inputs" in one.label for one in int8)
    assert all(one.quality is not None for one in int8 if not one.reasons)
    assert "train" not in result.data_digests
    assert "calibration" in json.loads(json.dumps(dict(result.data_digests)))


def test_training_is_refused_without_training_data(tmp_path: Path) -> None:
    path = without_train(tmp_path, "{include: [pruning, quantization, compilation]}")
    spec = read_spec(path)
    surroundings = Surroundings(spec, read_data(spec), this_machine(), enabled_techniques(spec))
    with Store(tmp_path / "store.sqlite") as store:
        builder = surroundings.builder(store)
        pruning = builder.techniques["pruning"]
        space = pruning.space(builder.base, builder.context)
        pruned = Recipe(builder.base.kind).then(pruning.traits, defaults(space, multiple=1))
        builder.options(pruned)
    assert builder.refusals["recovery"] == "there is no training data"


def test_model_without_batch_normalization_wants_training_data(tmp_path: Path) -> None:
    path = without_train(tmp_path)
    (tmp_path / "tiny.py").write_text(
        "from torch.nn import Flatten, Linear, Sequential\n\n"
        "def build():\n    return Sequential(Flatten(), Linear(64, 4))\n"
    )
    weights = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).state_dict()
    save_file(weights, tmp_path / "tiny.safetensors")
    spec = read_spec(path)
    surroundings = Surroundings(spec, read_data(spec), this_machine(), enabled_techniques(spec))
    said = "data.train: missing, and calibration inputs can't be generated: the model has no batch"
    with pytest.raises(SpecInvalid, match=said):
        surroundings.check()


def test_onnx_model_wants_training_data(tmp_path: Path) -> None:
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["x"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, ["batch", 3])],
            [onnx.helper.make_tensor_value_info("y", 1, ["batch", 3])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(SpecInvalid, match="can only be generated for a torch model"):
        generated_split(OnnxSource(tmp_path / "m.onnx"), "spec.yaml", None, 0)
