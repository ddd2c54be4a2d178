"""What a model is compiled to: torch's own engines, and what is said of the others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimizer.parity import check_parity
from optimizer.space import defaults
from optimizer.targets import aotinductor, available, joint_space, missing
from optimizer.targets.aotinductor import AotInductorTarget
from optimizer.targets.onnxruntime import CPU, CUDA, TENSORRT
from optimizer.targets.openvino import OpenVinoTarget
from optimizer.targets.torch import TorchTarget
from optimizer.techniques import Context
from optimizer.variant import EngineModel
from serve.engines import engine_module, load_engine
from serve.errors import ArtifactInvalid
from serve.machine import Machine
from tests.optimizer.workbench import MAX_BATCH_SIZE, Workbench, make_workbench

ALL = (
    CPU, OpenVinoTarget(), CUDA, TENSORRT, TorchTarget(), aotinductor.CPU, aotinductor.CUDA
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_workbench(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def package(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> EngineModel:
    target = AotInductorTarget()
    reason = target.why_not(bench.context)
    if reason is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("package")
    parameters = defaults(target.space(bench.torch, bench.context))
    return target.compile(bench.torch, parameters, directory)


def elsewhere(bench: Workbench) -> Context:
    machine = Machine("another processor", ("avx512f",), 2, "Linux x86_64", {})
    return replace(bench.context, machine=machine)


def test_targets_are_available_or_say_why_not(bench: Workbench) -> None:
    found = {target.shown for target in available(ALL, bench.context)}
    reasons = missing(ALL, bench.context)
    assert found.isdisjoint(reasons)
    assert len(found) + len(reasons) == len(ALL)
    assert {"ONNX Runtime", "OpenVINO", "eager torch"} <= found


def test_targets_on_torch_refuse_with_a_reason_when_the_target_is_another_machine(
    bench: Workbench,
) -> None:
    reasons = missing(ALL, elsewhere(bench))
    assert "agent" in reasons["eager torch"]
    assert {"ONNX Runtime", "OpenVINO"}.isdisjoint(reasons)


def test_aotinductor_refuses_with_a_reason_when_there_is_no_compiler(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = AotInductorTarget().why_not(bench.context)
    assert reason is not None
    assert "no C++ compiler" in reason


@pytest.mark.parametrize("provider", [CUDA, TENSORRT], ids=lambda target: target.provider)
@pytest.mark.gpu
def test_onnxruntime_computes_the_same_when_it_runs_on_a_gpu(
    provider: object, bench: Workbench, tmp_path: Path
) -> None:
    assert isinstance(provider, type(CUDA))
    reason = provider.why_not(bench.context)
    if reason is not None:
        pytest.skip(reason)
    made = provider.compile(bench.onnx, {}, tmp_path)
    check_parity(made, bench.onnx, bench.inputs, MAX_BATCH_SIZE)


@pytest.mark.gpu
def test_aotinductor_computes_the_same_when_it_runs_on_a_gpu(
    bench: Workbench, tmp_path: Path
) -> None:
    reason = aotinductor.CUDA.why_not(bench.context)
    if reason is not None:
        pytest.skip(reason)
    made = aotinductor.CUDA.compile(bench.torch, {}, tmp_path)
    check_parity(made, bench.torch, bench.inputs, MAX_BATCH_SIZE)


def test_options_of_a_target_exist_only_when_its_engine_is_chosen(bench: Workbench) -> None:
    space = joint_space([CPU, OpenVinoTarget()], bench.onnx, bench.context)
    assert "precision" in defaults(space, engine="openvino")
    assert "precision" not in defaults(space, engine="onnxruntime")


def test_the_rest_of_a_quantized_model_is_a_choice_where_the_processor_has_bf16(
    bench: Workbench, tmp_path: Path
) -> None:
    def choices(precision: str, flags: tuple[str, ...]) -> bool:
        machine = replace(bench.context.machine, flags=flags)
        model = replace(bench.onnx, precision=precision)
        return "rest" in OpenVinoTarget().space(model, replace(bench.context, machine=machine))

    assert choices("int8", ("amx_bf16",))
    assert not choices("int8", ("avx2",))
    assert not choices("fp32", ("amx_bf16",))
    made = OpenVinoTarget().compile(bench.onnx, {"precision": "int8", "rest": "bf16"}, tmp_path)
    assert made.spec.options == {"rest": "bf16"}
    assert OpenVinoTarget().describe({"rest": "bf16"}) == "OpenVINO, the rest bf16"


def test_eager_torch_computes_what_the_module_does(bench: Workbench, tmp_path: Path) -> None:
    made = TorchTarget().compile(bench.torch, {}, tmp_path)
    check_parity(made, bench.torch, bench.inputs, MAX_BATCH_SIZE)


@pytest.mark.full
def test_aotinductor_computes_what_the_module_does(package: EngineModel, bench: Workbench) -> None:
    check_parity(package, bench.torch, bench.inputs, MAX_BATCH_SIZE)


@pytest.mark.full
def test_aotinductor_fuses_activations_into_convolutions_when_it_is_compiled(
    package: EngineModel, bench: Workbench
) -> None:
    module = engine_module("aotinductor")
    kernels = module.profile(package.directory, package.served(1, 1, ()), bench.inputs, 3)
    operators = [kernel.operator for kernel in kernels]
    assert operators.count("convolution_pointwise") == 2  # with bias and activation
    assert not any("batch_norm" in operator for operator in operators)
    assert {kernel.precision for kernel in kernels} == {"fp32"}


@pytest.mark.full
def test_aotinductor_refuses_a_package_when_it_is_damaged(
    package: EngineModel, tmp_path: Path
) -> None:
    content = (package.directory / package.spec.file).read_bytes()
    (tmp_path / "signature.json").write_bytes((package.directory / "signature.json").read_bytes())
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (flipped, content[:-1], content[:middle], content[64:]):
        (tmp_path / package.spec.file).write_bytes(damaged)
        with pytest.raises(ArtifactInvalid, match="can't load it"):
            load_engine(tmp_path, package.spec)


@pytest.mark.full
def test_aotinductor_runs_on_as_many_threads_as_it_is_told_when_they_change(
    package: EngineModel, bench: Workbench
) -> None:
    engines = [load_engine(package.directory, package.served(1, n, ())) for n in (1, 2)]
    first, second = (engine.run(bench.inputs) for engine in engines)
    for name, values in first.items():
        np.testing.assert_allclose(second[name], values, atol=1e-5)


@pytest.mark.full
def test_aotinductor_gives_equal_packages_without_this_machine_s_paths(
    package: EngineModel, bench: Workbench, tmp_path: Path
) -> None:
    target = AotInductorTarget()
    parameters = defaults(target.space(bench.torch, bench.context))
    again = target.compile(bench.torch, parameters, tmp_path)
    assert again.digest == package.digest
    content = (package.directory / package.spec.file).read_bytes()
    assert b"site-packages" not in content
    assert str(tmp_path.parent).encode() not in content
