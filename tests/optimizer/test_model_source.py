"""Loading a model from its factory and weights or from ONNX, and checking it against data."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from optimizer.data.splits import Samples, load_splits
from optimizer.errors import SpecInvalid
from optimizer.importable import Importable
from optimizer.model_source import check_model, read_signature, source_digest
from optimizer.spec import InputSpec, OnnxSource, OutputSpec, TorchSource, read_spec
from optimizer.torch_source import load_source

MODEL = """\
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))

class Pair(nn.Module):
    def forward(self, x):
        return x[:, :3], x

class Mapping(nn.Module):
    def forward(self, x):
        return {"logits": x}

class Number(nn.Module):
    def forward(self, x):
        return len(x)

class Keyword(nn.Module):
    def forward(self, x, *, mask):
        return x

class Infinite(nn.Module):
    def forward(self, x):
        return x[:, :3] / 0

class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float16))

class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(dim=0)

def broken():
    raise RuntimeError("no such layer")

def number():
    return 3
"""

WEIGHTS = {
    "0.weight": torch.arange(12.0).reshape(3, 4),
    "0.bias": torch.ones(3),
    "1.weight": torch.ones(3),
    "1.bias": torch.zeros(3),
    "1.running_mean": torch.zeros(3),
    "1.running_var": torch.ones(3),
    "1.num_batches_tracked": torch.tensor(1),
}


@pytest.fixture
def source(tmp_path: Path) -> TorchSource:
    (tmp_path / "model.py").write_text(MODEL)
    return torch_source(tmp_path, "build", WEIGHTS)


def torch_source(
    folder: Path,
    function: str,
    weights: dict[str, torch.Tensor],
    outputs: tuple[str, ...] = ("logits",),
) -> TorchSource:
    path = folder / f"{function}.safetensors"
    save_file(weights, path)
    return TorchSource(
        factory=Importable("model", function, folder),
        weights=path,
        inputs=(InputSpec(name="x", shape=(4,)),),
        outputs=tuple(OutputSpec(name=name) for name in outputs),
    )


def samples(n: int = 2, width: int = 4, dtype: type = np.float32) -> Samples:
    inputs = {"x": np.arange(n * width).reshape(n, width).astype(dtype)}
    return Samples(inputs, np.zeros(n, dtype=np.int64), digest="")


def refusal(source: TorchSource | OnnxSource, data: Samples, n_classes: int) -> str:
    with pytest.raises(SpecInvalid) as caught:
        check_model(source, data, n_classes)
    return str(caught.value)


def write_onnx(path: Path, batch: str | int = "batch", n_classes: int = 3) -> OnnxSource:
    """A linear layer of [batch, 4] to [batch, n_classes]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, n_classes])],
        [
            helper.make_tensor(
                "w", TensorProto.FLOAT, [4, n_classes], np.ones(4 * n_classes).tolist()
            )
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return OnnxSource(path)


def test_torch_model_has_the_weights_and_is_in_eval_mode(source: TorchSource) -> None:
    module = load_source(source)
    assert not any(part.training for part in module.modules())
    assert torch.equal(module.state_dict()["0.weight"], WEIGHTS["0.weight"])
    check_model(source, samples(), n_classes=3)


def test_torch_model_names_keys_when_weights_do_not_fit(source: TorchSource) -> None:
    weights = {key: value for key, value in WEIGHTS.items() if key != "1.bias"}
    weights |= {"0.weight": torch.ones(3, 5), "head.bias": torch.ones(1)}
    bad = torch_source(source.factory.directory, "build", weights)
    with pytest.raises(SpecInvalid) as caught:
        load_source(bad)
    assert str(caught.value) == (
        f"model.weights: {bad.weights} doesn't fit the factory: missing 1.bias; "
        "unexpected head.bias; 0.weight is [3, 5], want [3, 4]"
    )


def test_torch_model_loads_when_tied_weights_are_stored_once(source: TorchSource) -> None:
    tied = torch_source(source.factory.directory, "Tied", {"second.weight": torch.eye(4)})
    module = load_source(tied)
    assert torch.equal(module.state_dict()["first.weight"], torch.eye(4))


def test_torch_model_is_refused_when_weights_are_no_safetensors(source: TorchSource) -> None:
    source.weights.write_bytes(b"PK\x03\x04pickled")
    with pytest.raises(SpecInvalid, match="not safetensors"):
        load_source(source)


@pytest.mark.parametrize(
    ("module", "function", "message"),
    [
        pytest.param("model", "broken", "RuntimeError: no such layer", id="raises"),
        pytest.param("model", "number", "returned int, want a torch.nn.Module", id="no module"),
        pytest.param("model", "absent", "AttributeError", id="isn't there"),
        pytest.param("nowhere_at_all", "build", "want a module beside the spec", id="no file"),
    ],
)
def test_torch_model_is_refused_when_the_factory(
    source: TorchSource, module: str, function: str, message: str
) -> None:
    factory = Importable(module, function, source.factory.directory)
    bad = TorchSource(factory, source.weights, source.inputs, source.outputs)
    with pytest.raises(SpecInvalid, match=message) as caught:
        load_source(bad)
    assert str(caught.value).startswith("model.factory: ")


def test_model_is_refused_when_outputs_do_not_fit_the_labels(
    source: TorchSource, tmp_path: Path
) -> None:
    expected = (
        "model: output logits has the shape [2, 3] for 2 samples, "
        "but the labels are of 10 classes, want [2, 10]"
    )
    assert refusal(source, samples(), n_classes=10) == expected
    assert refusal(write_onnx(tmp_path / "model.onnx"), samples(), n_classes=10) == expected


def test_model_is_accepted_when_data_has_no_labels(source: TorchSource) -> None:
    check_model(source, samples(), n_classes=0)


@pytest.mark.parametrize(
    ("function", "outputs", "message"),
    [
        pytest.param("Pair", ("logits",), "returned 2 tensors, the spec names 1: logits"),
        pytest.param("Mapping", ("probs",), "returned the keys logits; model.outputs names probs"),
        pytest.param("Number", ("logits",), "returned int, want tensors, a tuple or a dict of"),
        pytest.param("Keyword", ("logits",), "needs mask by keyword, want all inputs by position"),
        pytest.param("Infinite", ("logits",), "has 6 of 6 values NaN or infinite for 2 samples"),
        pytest.param("Pooled", ("logits",), "the shape [4] for 2 samples, want [2, ...]"),
    ],
)
def test_model_is_refused_when_it_returns(
    source: TorchSource, function: str, outputs: tuple[str, ...], message: str
) -> None:
    bad = torch_source(source.factory.directory, function, {}, outputs)
    assert message in refusal(bad, samples(), n_classes=3)


def test_model_is_accepted_when_it_returns_a_dict_with_the_names_of_the_spec(
    source: TorchSource,
) -> None:
    check_model(torch_source(source.factory.directory, "Mapping", {}), samples(), n_classes=4)


def test_model_is_refused_when_it_is_half_precision(source: TorchSource) -> None:
    weights = {"scale": torch.ones(1, dtype=torch.float16)}
    half = torch_source(source.factory.directory, "Half", weights)
    with pytest.raises(SpecInvalid, match=r"has scale in float16, want float32"):
        load_source(half)


def test_model_takes_its_first_output_for_logits_when_it_has_several(source: TorchSource) -> None:
    pair = torch_source(source.factory.directory, "Pair", {}, ("logits", "features"))
    check_model(pair, samples(), n_classes=3)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_model_is_refused_when_inputs_do_not_fit_the_data(
    source: TorchSource, tmp_path: Path, kind: str
) -> None:
    model = source if kind == "torch" else write_onnx(tmp_path / "model.onnx")
    assert "input x wants [n, 4], the data has [2, 5]" in refusal(model, samples(width=5), 3)
    assert "input x wants FP32, the data has int64" in refusal(model, samples(dtype=np.int64), 3)
    other = Samples({"y": np.ones((2, 4), dtype=np.float32)}, None, digest="")
    assert "input x isn't in the data, which has y" in refusal(model, other, 3)


def test_model_is_refused_with_shapes_when_it_cannot_compute(source: TorchSource) -> None:
    wide = TorchSource(
        source.factory, source.weights, (InputSpec(name="x", shape=(5,)),), source.outputs
    )
    assert "can't compute a batch of [[2, 5]]" in refusal(wide, samples(width=5), 3)


def test_onnx_model_gives_its_signature(tmp_path: Path) -> None:
    signature = read_signature(write_onnx(tmp_path / "model.onnx"))
    assert signature.inputs == (InputSpec(name="x", datatype="FP32", shape=(4,)),)
    assert signature.output_names == ("logits",)
    check_model(write_onnx(tmp_path / "model.onnx"), samples(), n_classes=3)


def test_onnx_model_is_refused_when_its_batch_is_fixed(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match="want a symbolic first axis for the batch"):
        read_signature(write_onnx(tmp_path / "model.onnx", batch=1))


def test_onnx_model_is_refused_when_the_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(SpecInvalid, match="can't be opened"):
        read_signature(OnnxSource(tmp_path / "model.onnx"))


def test_digest_changes_when_weights_or_code_or_factory_do(source: TorchSource) -> None:
    folder = source.factory.directory
    digests = {source_digest(source)}
    other = TorchSource(
        Importable("model", "other", folder), source.weights, source.inputs, source.outputs
    )
    digests.add(source_digest(other))
    digests.add(source_digest(torch_source(folder, "build", WEIGHTS | {"0.bias": torch.zeros(3)})))
    (folder / "model.py").write_text(MODEL.replace("BatchNorm1d(3)", "BatchNorm1d(3, eps=1e-3)"))
    digests.add(source_digest(other))
    assert len(digests) == 4


def test_digest_changes_when_weights_beside_an_onnx_file_do(tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "model.onnx")
    model = onnx.load(source.path)
    raw = numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]), "w")
    model.graph.initializer[0].CopyFrom(raw)
    onnx.save(
        model, source.path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    before = source_digest(source)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert source_digest(source) != before


def test_digest_is_the_same_when_a_model_is_moved(
    source: TorchSource, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("moved")
    (folder / "model.py").write_text(MODEL)
    assert source_digest(torch_source(folder, "build", WEIGHTS)) == source_digest(source)


def test_spec_data_and_model_source_import_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import optimizer.spec, optimizer.stats, optimizer.data.splits, optimizer.model_source"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.data
@pytest.mark.skipif(
    not {"TRIMSERVE_DATA", "TRIMSERVE_WEIGHTS"} <= os.environ.keys(),
    reason="TRIMSERVE_DATA and TRIMSERVE_WEIGHTS don't name the CIFAR-10 files",
)
@pytest.mark.parametrize(("network", "n_correct"), [("resnet20", 4407), ("resnet56", 4483)])
def test_cifar10_network_has_its_accuracy_on_test(network: str, n_correct: int) -> None:
    """4,407 and 4,483 of 5,000; some images lie so near a boundary that the CPU decides."""
    spec = read_spec(Path(__file__).parents[2] / "examples" / "cifar10" / "spec.yaml")
    assert isinstance(spec.model, TorchSource)
    source = TorchSource(
        Importable("resnet", network, spec.model.factory.directory),
        spec.model.weights.with_name(f"{network}-cifar10.safetensors"),
        spec.model.inputs,
        spec.model.outputs,
    )
    test = load_splits(spec.data, ["image"], spec.seed).test.read()
    module = load_source(source)
    with torch.inference_mode():
        batches = torch.from_numpy(test.inputs["image"]).split(250)
        predicted = torch.cat([module(batch) for batch in batches]).argmax(dim=1).numpy()
    assert abs(int((predicted == test.labels).sum()) - n_correct) <= 3
