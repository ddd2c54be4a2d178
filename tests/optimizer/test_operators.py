"""Every engine computes what torch does, for every operator of a table."""

from pathlib import Path

import numpy as np
import pytest
import torch

from optimizer.spec import InputSpec, ModuleSource, OutputSpec
from optimizer.targets.aotinductor import AotInductorTarget
from optimizer.targets.torch import TorchTarget
from optimizer.variant import TorchModel
from serve.engines import Engine, EngineSpec, load_engine
from tests.optimizer.operators import OPERATORS, SHAPE, Operator

SIZES = (1, 2, 3, 8)
TOLERANCE = 1e-5
"""Relative to the largest value: fp32 in another order."""
every_operator = pytest.mark.parametrize("name", OPERATORS)


def batch(size: int) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(size, *SHAPE)).astype(np.float32)


def check(engine: Engine, operator: Operator, output: str = "y") -> None:
    module = operator.module()
    for size in SIZES:
        x = batch(size)
        with torch.inference_mode():
            want = module(torch.from_numpy(x)).numpy()
        got = engine.run({"x": x})[output]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=TOLERANCE * float(np.abs(want).max()), rtol=0)


def torch_model(module: torch.nn.Module, outputs: tuple[str, ...]) -> TorchModel:
    inputs = (InputSpec(name="x", datatype="FP32", shape=SHAPE),)
    names = tuple(OutputSpec(name=name) for name in outputs)
    return TorchModel(ModuleSource(module=module.eval(), inputs=inputs, outputs=names), "")


@every_operator
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(EngineSpec("onnxruntime", "model.onnx"), id="onnxruntime"),
        pytest.param(
            EngineSpec("onnxruntime", "model.onnx", options={"layout": "plain"}),
            id="onnxruntime in plain layout",
        ),
        pytest.param(EngineSpec("openvino", "model.onnx"), id="openvino"),
        pytest.param(EngineSpec("openvino", "model.onnx", batch_sizes=(2, 8)), id="fixed openvino"),
    ],
)
def test_engine_computes_what_torch_does(name: str, spec: EngineSpec, tmp_path: Path) -> None:
    OPERATORS[name].save(tmp_path / "model.onnx")
    check(load_engine(tmp_path, spec), OPERATORS[name])


@every_operator
def test_eager_torch_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    made = TorchTarget().compile(torch_model(OPERATORS[name].module(), ("y",)), {}, tmp_path)
    check(load_engine(tmp_path, made.spec), OPERATORS[name])


class Everything(torch.nn.Module):
    """All operators at once: a package takes long to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(one.module() for one in OPERATORS.values())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part(x) for part in self.parts)


@pytest.mark.full
def test_aotinductor_computes_what_torch_does(tmp_path: Path) -> None:
    target = AotInductorTarget()
    names = tuple(f"y{place}" for place in range(len(OPERATORS)))
    from torch._inductor import cpu_vec_isa

    instructions = str(cpu_vec_isa.pick_vec_isa()).lower() or "none"
    model = torch_model(Everything(), names)
    made = target.compile(model, {"instructions": instructions}, tmp_path)
    engine = load_engine(tmp_path, made.spec)
    for output, operator in zip(names, OPERATORS.values(), strict=True):
        check(engine, operator, output)
