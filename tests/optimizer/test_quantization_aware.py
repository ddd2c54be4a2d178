"""Quantization-aware training: rounding as the graph rounds, and what training with it is worth."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from optimizer.builder import Builder
from optimizer.errors import SpecInvalid
from optimizer.model_source import source_digest
from optimizer.quantization.graph import Graph
from optimizer.quantization.histogram import NotFinite
from optimizer.quantization.qdq import Arithmetic, levels_of
from optimizer.quantization.ranges import Range
from optimizer.quantization.static import Settings, quantize_static
from optimizer.quantization.weights import quantize
from optimizer.recipe import Recipe
from optimizer.space import Categorical, Value, defaults
from optimizer.spec import TaskSpec, TrainingSpec, read_spec
from optimizer.store import Store
from optimizer.techniques import Context, load_technique
from optimizer.techniques.quantization_aware_training import QuantizationAwareTraining
from optimizer.torch_variant import load_torch
from optimizer.training.batches import Batch
from optimizer.training.fake_quantization import (
    fake_activation,
    fake_quantized,
    fake_weight,
    layers_of,
    settle,
)
from optimizer.training.loop import TrainingDiverged
from optimizer.variant import TorchModel, TorchVariant
from tests.optimizer.onnx_networks import ArraySplit, Network, random, run
from tests.optimizer.synthetic import Narrow
from tests.optimizer.test_recovery_technique import Dying, Killed
from tests.optimizer.tiny_study import write_study
from tests.optimizer.torch_bench import TorchBench, make_torch_bench

PLAIN = Arithmetic(signed=False, pairs_saturate=False, least_error=True)
SATURATING = replace(PLAIN, pairs_saturate=True)
ARITHMETICS = pytest.mark.parametrize(
    "arithmetic", [PLAIN, SATURATING, replace(PLAIN, signed=True)],
    ids=["unsigned activations", "pairs that saturate", "signed activations"],
)  # fmt: skip


class Residual(nn.Module):
    """A block whose sum is of a rectified and of a plain result; images are [n, 3, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.inner, self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Linear(288, 4)
        self.unused = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = torch.relu(self.first(self.stem(x)))
        x = torch.relu(self.second(self.inner(shortcut)) + shortcut)
        found: torch.Tensor = self.last(x.flatten(1))
        return found


def residual() -> Residual:
    """With running statistics as of a network that was trained."""
    torch.manual_seed(0)
    module = Residual()
    with torch.no_grad():
        for norm in (module.first, module.second):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
        for _ in range(20):
            module(torch.randn(64, 3, 6, 6))
    return module.eval()


def as_graph(module: Residual) -> Graph:
    """What its export is: with batch normalization folded into the weights."""
    network = Network(("n", 3, 6, 6))
    network.conv(*folded(module.stem, module.first))
    shortcut = network.add("Relu", network.last)
    network.conv(*folded(module.inner, module.second), pads=[1, 1, 1, 1])
    network.add("Relu", network.add("Add", network.last, shortcut))
    network.add("Flatten", network.last)
    weight, bias = (one.detach().numpy() for one in (module.last.weight, module.last.bias))
    network.add("Gemm", network.last, weight, bias, transB=1)
    return network.graph()


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = torch.zeros(len(factor)) if conv.bias is None else conv.bias
    bias = (bias - norm.running_mean) * factor + norm.bias
    return (conv.weight * factor.reshape(-1, 1, 1, 1)).detach().numpy(), bias.detach().numpy()


def run_plainly(graph: Graph, inputs: np.ndarray) -> np.ndarray:
    """In fp32 between the graph's roundings, so that no processor's kernel has a say."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(graph.to_bytes(), options, providers=providers)
    return np.asarray(session.run(None, {"x": inputs})[0])


def batches(*inputs: np.ndarray) -> Iterator[Batch]:
    for values in inputs:
        yield Batch(np.arange(len(values)), (torch.from_numpy(values),), None)


# --- the rounding


@ARITHMETICS
@pytest.mark.parametrize("shape", [(4, 70), (4, 3, 3, 3)], ids=["linear", "convolution"])
def test_weight_is_what_the_graph_restores(shape: tuple[int, ...], arithmetic: Arithmetic) -> None:
    weights = random(*shape)
    weights.reshape(len(weights), -1)[0, :2] = 6.0  # a pair that would saturate
    found = quantize(weights, 0, pairs_saturate=arithmetic.pairs_saturate, least_error=True)
    steps = found.scales.reshape(-1, *[1] * (weights.ndim - 1))
    levels = fake_weight(torch.from_numpy(weights), arithmetic).numpy() / steps
    np.testing.assert_allclose(levels, found.values, atol=1e-4)
    assert (np.abs(levels) < 127.5).all()


@ARITHMETICS
@pytest.mark.parametrize("ends", [(-1.3, 2.1), (0.0, 3.0), (-2.0, 0.0)], ids=str)
def test_activation_is_what_the_graph_restores(
    ends: tuple[float, float], arithmetic: Arithmetic
) -> None:
    values, levels = random(4000, scale=1.5), levels_of(Range(*ends), arithmetic.signed)
    low = -128 if arithmetic.signed else 0
    wanted = np.clip(np.round(values / np.float32(levels.scale)) + levels.zero, low, low + 255)
    given = fake_activation(torch.from_numpy(values), levels).numpy()
    np.testing.assert_allclose(given, (wanted - levels.zero) * levels.scale, atol=1e-6)


def test_gradients_pass_where_nothing_is_clipped_and_nowhere_else() -> None:
    values = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.1], requires_grad=True)
    fake_activation(values, levels_of(Range(0.0, 1.0), signed=False)).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 0]

    weights = torch.from_numpy(random(1, 4000)).requires_grad_()
    with torch.no_grad():
        weights[0, 0] = 5.0  # which the least error clips
    restored = fake_weight(weights, PLAIN)
    (2 * restored).sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    is_clipped = restored.detach().abs().max() < weights.detach().abs()
    assert 0 < int(is_clipped.sum()) < 40
    assert weights.grad[0, 0] == 0
    assert (weights.grad[~is_clipped] == 2).all()


@ARITHMETICS
def test_module_computes_what_its_graph_will_in_8_bits(arithmetic: Arithmetic) -> None:
    module, samples = residual(), random(64, 3, 6, 6)
    graph, inputs = as_graph(module), torch.from_numpy(samples)
    with torch.no_grad():
        exact = module(inputs).numpy()
        np.testing.assert_allclose(run(graph, samples), exact, atol=1e-5)
        with fake_quantized(module, batches(samples), arithmetic) as names:
            module.train()  # batch normalization stays as it is
            given = module(inputs).numpy()
    assert names == ("stem", "inner", "last")
    settings = Settings(arithmetic, corrects_biases=False)
    int8, _ = quantize_static(graph, ArraySplit({"x": samples}), settings)
    wanted = run_plainly(int8, samples)
    assert np.abs(given - wanted).mean() < 0.6 * np.abs(exact - wanted).mean()


@ARITHMETICS
def test_weights_that_settled_are_rounded_to_themselves_and_biases_stay(
    arithmetic: Arithmetic,
) -> None:
    module = residual()
    with torch.no_grad():
        module.inner.weight[0, 0] = 0.4  # of pairs that saturate
        module.inner.weight[1, 0, 0, 0] = 3.0
    settle(module, ["stem", "inner", "last"], arithmetic)
    graph, samples = as_graph(module), ArraySplit({"x": random(64, 3, 6, 6)})
    for name in ("conv0", "conv2", "gemm6"):
        weights = graph.weight(graph.node(name).input[1])
        found = quantize(weights, 0, pairs_saturate=arithmetic.pairs_saturate, least_error=True)
        np.testing.assert_allclose(found.restored(), weights, rtol=1e-4, atol=1e-6)
    corrected, plain = (
        run_plainly(quantize_static(graph, samples, Settings(arithmetic, corrects_biases=on))[0],
                    samples.inputs["x"])
        for on in (True, False)
    )  # fmt: skip
    np.testing.assert_allclose(corrected, plain, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True], ids=["it ends", "it fails"])
def test_nothing_is_left_in_the_module_when(fails: bool) -> None:
    module, inputs = residual(), torch.from_numpy(random(8, 3, 6, 6))
    shown, state = repr(module), {n: t.clone() for n, t in module.state_dict().items()}
    with torch.no_grad():
        before = module(inputs)
        try:
            with fake_quantized(module, batches(inputs.numpy()), PLAIN):
                assert not torch.equal(module(inputs), before)
                if fails:
                    raise KeyError("the loop")
        except KeyError:
            pass
        assert torch.equal(module(inputs), before)
    assert repr(module) == shown
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    for part in module.modules():
        assert "forward" not in vars(part)
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


class Own(nn.Linear):
    """Computes in its own way."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs * 2)


def test_layers_are_left_alone_when_they_have_a_way_of_their_own() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Own(4, 4))
    assert list(layers_of(module)) == ["0"]
    with (
        pytest.raises(ValueError, match="without a convolution or linear layer"),
        fake_quantized(module[1], batches(random(2, 4)), PLAIN),
    ):
        pass


def test_layers_of_an_encoder_are_rounded_in_eval_mode_too() -> None:
    torch.manual_seed(0)
    module, samples = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), random(4, 5, 8)
    with torch.no_grad():
        before = module(torch.from_numpy(samples))
        with fake_quantized(module, batches(samples), PLAIN) as names:
            given = module(torch.from_numpy(samples))
    # Its attention reads the projections' weights past their layers.
    assert names == ("linear1", "linear2")
    assert 0 < float((given - before).abs().mean()) < 0.02


def test_activations_that_are_no_numbers_are_refused() -> None:
    with (
        pytest.raises(NotFinite, match="NaN or infinite"),
        fake_quantized(nn.Linear(4, 4), batches(np.full((2, 4), np.nan, np.float32)), PLAIN),
    ):
        pass


# --- the technique

HARD = """nn.Sequential(
    nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
    nn.Flatten(), nn.Linear(256, 4))"""
SMALL = 0.01


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    return make_torch_bench(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> TorchBench:
    """Of a network with a small channel, whose weights are far larger than the others for it."""
    directory = tmp_path_factory.mktemp("hard")
    made = make_torch_bench(directory, HARD)
    state = load_file(directory / "tiny.safetensors")
    state["0.weight"][0] *= SMALL
    state["0.bias"][0] *= SMALL
    state["2.weight"][:, 0] /= SMALL
    save_file(state, directory / "tiny.safetensors")
    return replace(made, torch=TorchModel(made.torch.source, source_digest(made.torch.source)))


def context(bench: TorchBench, **training: object) -> Context:
    quick = {"epochs": 6.0, "short_epochs": 1.0, "batch_size": 16, "learning_rate": 0.05}
    return replace(bench.context, training=TrainingSpec(**{**quick, **training}))  # type: ignore[arg-type]


def trained(model: TorchModel, at: Context, directory: Path, **given: Value) -> TorchVariant:
    directory.mkdir()
    technique = QuantizationAwareTraining()
    assert technique.check(model, at) is None
    parameters = defaults(technique.space(model, at), **{"effort": "full", **given})
    return technique.apply(model, parameters, at, directory)


def hard_graph(module: nn.Module) -> Graph:
    weights = [one.detach().numpy() for one in module.parameters()]
    network = Network(("n", 1, 8, 8))
    for index in (0, 2):
        network.conv(weights[index], weights[index + 1], pads=[1, 1, 1, 1])
        network.add("Relu", network.last)
    network.add("Flatten", network.last)
    network.add("Gemm", network.last, weights[4], weights[5], transB=1)
    return network.graph()


def test_static_int8_loses_less_when_the_network_was_trained_for_it(
    hard: TorchBench, tmp_path: Path
) -> None:
    samples, unseen = random(128, 1, 8, 8, seed=1), random(128, 1, 8, 8, seed=2)
    at = replace(
        context(hard, epochs=12, learning_rate=0.03),
        train=ArraySplit({"image": samples}),
        task=TaskSpec.model_construct(kind="custom"),
        machine=replace(hard.context.machine, flags=("avx2",)),  # whose pairs saturate
    )
    base, made = load_torch(hard.torch), load_torch(trained(hard.torch, at, tmp_path / "made"))
    wanted = run(hard_graph(base), unseen)

    def error(module: nn.Module) -> float:
        split = ArraySplit({"x": samples})
        int8, _ = quantize_static(hard_graph(module), split, Settings(SATURATING))
        return float(np.square(run_plainly(int8, unseen) - wanted).mean())

    before, after = error(base), error(made)
    assert after < 0.7 * before


def test_training_gives_equal_digests_and_a_module_without_a_trace(
    bench: TorchBench, tmp_path: Path
) -> None:
    at = context(bench)
    one, other = (trained(bench.torch, at, tmp_path / name) for name in ("one", "other"))
    assert one.digest == other.digest
    module, base = load_torch(one), load_torch(bench.torch)
    assert repr(module) == repr(base)
    old, new = base.state_dict(), module.state_dict()
    assert list(old) == list(new)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    # Batch normalization's statistics are those of the base.
    assert moved == {name for name in old if "running" not in name and "num_batches" not in name}


def test_untrained_network_is_the_base_itself(bench: TorchBench, tmp_path: Path) -> None:
    made = trained(bench.torch, context(bench), tmp_path / "made", effort="recalibrate")
    old, new = (load_torch(one).state_dict() for one in (bench.torch, made))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_narrowed_network_is_recovered_first(bench: TorchBench, tmp_path: Path) -> None:
    directory = tmp_path / "narrow"
    directory.mkdir()
    narrow = Narrow().apply(bench.torch, {"width": 0.5}, bench.context, directory)
    at = replace(context(bench), checkpoints=tmp_path / "checkpoints")
    made = trained(narrow, at, tmp_path / "made")
    assert not list((tmp_path / "checkpoints").iterdir())
    old, new = (load_torch(one).state_dict()["1.running_mean"] for one in (narrow, made))
    assert not torch.equal(old, new)


def test_training_goes_on_where_it_was_killed_when_it_was_rounding(
    bench: TorchBench, tmp_path: Path
) -> None:
    directory = tmp_path / "narrow"
    directory.mkdir()
    narrow = Narrow().apply(bench.torch, {"width": 0.5}, bench.context, directory)
    at, kept = context(bench), tmp_path / "kept"
    whole = trained(narrow, at, tmp_path / "whole")
    # Two reads to recalibrate, twelve steps to recover, one to observe, and some to train.
    split = Dying(bench, n_reads=22)
    with pytest.raises(Killed):
        trained(narrow, replace(at, train=split, checkpoints=kept), tmp_path / "killed")
    assert len(list(kept.iterdir())) == 2
    counted = Dying(bench, n_reads=1000)
    again = trained(narrow, replace(at, train=counted, checkpoints=kept), tmp_path / "again")
    assert again.digest == whole.digest
    assert counted.n_reads < 15
    assert not list(kept.iterdir())


def test_training_for_int8_is_an_option_only_where_quantization_is(
    bench: TorchBench, tmp_path: Path
) -> None:
    names = ("quantization_aware_training", "recovery", "export", "quantization")
    every = {name: load_technique(name) for name in names}
    with Store(tmp_path / "store.sqlite") as store:
        for known, wanted in (
            (every, {"quantization_aware_training", "export"}),
            ({n: one for n, one in every.items() if n != "quantization"}, {"export"}),
        ):
            builder = Builder(store, bench.torch, known, context(bench), bench.inputs)
            options = builder.options(Recipe(bench.torch.kind))
            assert {option.traits.name for option in options} == wanted


def test_spec_refuses_training_for_int8_when_quantization_is_left_out(tmp_path: Path) -> None:
    path, plain = write_study(tmp_path), "techniques: {exclude: [torch_compilation]}"
    include = "include: [quantization_aware_training, compilation]"
    path.write_text(path.read_text().replace(plain, f"techniques: {{{include}}}"))
    with pytest.raises(SpecInvalid, match="want quantization among those left"):
        read_spec(path)
    path.write_text(path.read_text().replace("include: [", "include: [quantization, "))
    assert read_spec(path).techniques.enabled == (
        "quantization_aware_training", "quantization", "compilation",
    )  # fmt: skip


def test_training_that_diverges_is_told_by_the_loop(bench: TorchBench, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"lower training\.learning_rate"):
        trained(bench.torch, context(bench, learning_rate=1e30), tmp_path / "made")


def test_training_says_what_it_did_and_how_the_target_wants_it(bench: TorchBench) -> None:
    technique, at = QuantizationAwareTraining(), context(bench)
    space = technique.space(bench.torch, at)
    assert space["activations"].default in ("uint8", "int8")
    assert isinstance(space["reduce_range"].default, bool)
    words = technique.describe(defaults(space, effort="short", alpha=0.1))
    assert words == "distilled 1 epochs (short, 0.1 of labels) for int8"
    assert space["alpha"] == Categorical((0.0, 0.1, 0.5))
    asked = technique.space(bench.torch, context(bench, alphas=(1.0, 0.5)))
    assert asked["alpha"] == Categorical((1.0, 0.5))
    assert technique.describe(defaults(space)) == "before training for int8"
