"""Blocks: which a network has, and that the model of one computes what torch's layer does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from optimizer.blocks import Block, block_inputs, blocks_of, write_block
from optimizer.importable import Importable
from serve.engines import load_engine
from serve.machine import Machine, this_machine

EXAMPLES = Path(__file__).parents[2] / "examples"


class Reshaped(nn.Module):
    """Takes [n, *shape] by one layer; `modes` are those of its parts when it ran."""

    def __init__(self, layer: nn.Module, frozen: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.frozen = frozen or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.frozen(self.layer(x))
        return out


class Raising(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no way through")


def only_block(layer: nn.Module, shape: tuple[int, ...]) -> Block:
    ((block, count),) = blocks_of(Reshaped(layer), [torch.zeros(1, *shape)]).items()
    assert count == 1
    return block


def test_blocks_of_a_resnet_are_its_convolutions_and_its_linear() -> None:
    network = Importable("resnet", "resnet20", EXAMPLES / "cifar10").call()

    found = blocks_of(network, [torch.zeros(2, 3, 32, 32)])

    def conv(shape: tuple[int, ...], n_outputs: int, stride: int = 1) -> Block:
        return Block(
            "conv", shape, n_outputs, (3, 3), (stride, stride), (1, 1, 1, 1), (1, 1), 1, bias=False
        )

    assert found == {
        conv((3, 32, 32), 16): 1,
        conv((16, 32, 32), 16): 6,
        conv((16, 32, 32), 32, stride=2): 1,
        conv((32, 16, 16), 32): 5,
        conv((32, 16, 16), 64, stride=2): 1,
        conv((64, 8, 8), 64): 5,
        Block("linear", (64,), 10): 1,
    }


def test_block_counts_as_often_as_it_runs_when_a_layer_is_shared() -> None:
    layer = nn.Linear(4, 4)
    assert blocks_of(nn.Sequential(layer, layer), [torch.zeros(1, 4)]).total() == 2


@pytest.mark.parametrize("fails", [False, True], ids=["it runs", "it fails"])
def test_module_stays_as_it_was_when(fails: bool) -> None:
    norm = nn.BatchNorm2d(4).eval()  # frozen, in a module that trains
    module = Reshaped(nn.Conv2d(1, 4, 3), nn.Sequential(norm, Raising() if fails else nn.ReLU()))
    module.train()
    norm.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    if fails:
        with pytest.raises(RuntimeError, match="no way through"):
            blocks_of(module, [torch.ones(2, 1, 8, 8)])
    else:
        blocks_of(module, [torch.ones(2, 1, 8, 8)])

    assert module.training
    assert module.layer.training
    assert not norm.training
    assert not any(part._forward_hooks for part in module.modules())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_keys_are_equal_for_equal_shapes_only() -> None:
    def conv(**changes: int) -> nn.Conv2d:
        return nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **changes})

    blocks = [
        only_block(conv(), (4, 8, 8)),
        only_block(conv(), (4, 9, 9)),
        only_block(conv(bias=False), (4, 8, 8)),
        only_block(conv(groups=2), (4, 8, 8)),
        only_block(conv(stride=2), (4, 8, 8)),
        only_block(conv(dilation=2), (4, 8, 8)),
        only_block(conv(padding=1), (4, 8, 8)),
        only_block(conv(out_channels=16), (4, 8, 8)),
        only_block(nn.Linear(8, 8), (4, 8)),
        only_block(nn.Linear(8, 8), (8,)),
        replace(only_block(nn.Linear(8, 8), (8,)), precision="int8"),
    ]
    assert len({block.key for block in blocks}) == len(blocks)
    assert only_block(conv(), (4, 8, 8)).key == blocks[0].key


LAYERS = [
    pytest.param(nn.Conv2d(4, 6, 3), (4, 9, 7), id="conv"),
    pytest.param(nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (4, 9, 7), id="stride"),
    pytest.param(nn.Conv2d(4, 6, 3, padding="same"), (4, 9, 7), id="same, odd kernel"),
    pytest.param(nn.Conv2d(4, 6, (4, 3), padding="same"), (4, 9, 7), id="same, even kernel"),
    pytest.param(nn.Conv2d(4, 6, 2, padding="same", dilation=3), (4, 9, 7), id="same, dilated"),
    pytest.param(nn.Conv2d(4, 6, 3, padding="valid"), (4, 9, 7), id="valid"),
    pytest.param(nn.Conv2d(4, 6, 3, dilation=2, bias=False), (4, 9, 7), id="dilation, no bias"),
    pytest.param(nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 9, 7), id="depthwise"),
    pytest.param(nn.Conv1d(4, 6, 5, stride=2, padding=2), (4, 17), id="one axis"),
    pytest.param(nn.Linear(6, 5), (6,), id="linear"),
    pytest.param(nn.Linear(6, 5, bias=False), (3, 2, 6), id="linear with leading axes, no bias"),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_model_of_a_block_computes_what_the_layer_does_when_weights_are_the_same(
    layer: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    block = only_block(layer, shape)
    made = write_block(block, "onnxruntime", tmp_path, this_machine())
    with torch.no_grad():
        for tensor in onnx.load(tmp_path / made.spec.file).graph.initializer:
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            is_matrix = tensor.name == "w" and isinstance(layer, nn.Linear)
            parameter = layer.get_parameter({"w": "weight", "b": "bias"}[tensor.name])
            parameter.copy_(values.T if is_matrix else values)
    inputs = block_inputs(block, 3, seed=1)
    assert inputs["x"].shape == (3, *shape)
    with torch.inference_mode():
        wanted = layer(torch.from_numpy(inputs["x"])).relu().numpy()

    for spec in (
        made.served(1, 1, ()),
        write_block(block, "openvino", tmp_path, this_machine()).served(1, 1, (3,)),
    ):
        engine = load_engine(tmp_path, spec)
        given = engine.run(inputs)["z"]
        engine.close()
        assert given.shape == wanted.shape
        np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("system", "flags", "activations"),
    [
        pytest.param("Linux x86_64", ("avx2",), TensorProto.UINT8, id="pairs saturate"),
        pytest.param("Linux aarch64", (), TensorProto.INT8, id="signed by signed"),
    ],
)
@pytest.mark.parametrize(("layer", "shape"), [LAYERS[0], LAYERS[7], LAYERS[9]])
def test_int8_block_computes_nearly_what_the_fp32_one_does_in_the_machines_layout(
    layer: nn.Module,
    shape: tuple[int, ...],
    system: str,
    flags: tuple[str, ...],
    activations: int,
    tmp_path: Path,
) -> None:
    machine = Machine("a processor", flags, 2, system, {})
    block = only_block(layer, shape)
    inputs = block_inputs(block, 3, seed=1)

    def run(precision: str) -> np.ndarray:
        made = write_block(replace(block, precision=precision), "onnxruntime", tmp_path, machine)
        assert made.spec.precision == precision
        engine = load_engine(tmp_path, made.served(1, 1, ()))
        given = engine.run(inputs)["z"]
        engine.close()
        return np.asarray(given)

    wanted, given = run("fp32"), run("int8")
    graph = onnx.load(tmp_path / "model.onnx").graph
    types = {one.name: one.data_type for one in graph.initializer}
    zeros = [node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert zeros
    assert {types[zero] for zero in zeros} == {activations}
    assert given.dtype == np.float32
    error = np.abs(given - wanted).mean() / np.abs(wanted).mean()
    assert 0 < error < 0.05


def test_block_of_unknown_precision_is_refused(tmp_path: Path) -> None:
    block = Block("linear", (8,), 4, precision="int3")
    with pytest.raises(ValueError, match="precision: got int3, want fp32 or int8"):
        write_block(block, "onnxruntime", tmp_path, this_machine())
