"""The contract that every engine keeps, and what is particular to each."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from serve.engines import (
    ENGINES,
    RUNS_CODE,
    EngineSpec,
    EngineUnavailable,
    Signature,
    engine_module,
    load_engine,
)
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.padding import PaddedInput, Padding
from serve.tensor import TensorSpec
from tests.serve import onnx_models
from tests.serve.onnx_models import linear_by_hand
from tests.serve.versions import rows

ONNX_ENGINES = sorted(set(ENGINES) - RUNS_CODE)
"""Those that load ONNX files; test_torch_engines.py has the others."""
every_engine = pytest.mark.parametrize("engine", ONNX_ENGINES)


def spec_of(engine: str, path: Path, **changes: Any) -> EngineSpec:
    made = EngineSpec(engine, path.name, batch_sizes=(1, 2, 4) if engine == "openvino" else ())
    return replace(made, **changes)


# --- the contract


@every_engine
def test_engine_gives_the_same_numbers_when_batch_sizes_change(engine: str, tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of(engine, path))
    for n_rows in (1, 2, 3, 4, 5, 8, 13, 1, 4):
        x = rows(n_rows, seed=n_rows)
        np.testing.assert_allclose(loaded.run({"x": x})["y"], linear_by_hand(x), atol=1e-5)
    loaded.close()


@every_engine
def test_engine_results_stay_when_it_runs_again(engine: str, tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of(engine, path))
    first = loaded.run({"x": rows(2)})["y"]
    kept = first.copy()
    loaded.run({"x": rows(2, seed=9)})
    np.testing.assert_array_equal(first, kept)
    loaded.close()


@every_engine
def test_engine_takes_inputs_when_they_are_read_only(engine: str, tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of(engine, path))
    for n_rows in (2, 3):  # without and with padding
        x = np.frombuffer(rows(n_rows).tobytes(), np.float32).reshape(n_rows, 4)
        np.testing.assert_allclose(loaded.run({"x": x})["y"], linear_by_hand(x), atol=1e-5)
    loaded.close()


@every_engine
def test_engine_names_its_signature_when_loaded(engine: str, tmp_path: Path) -> None:
    path = onnx_models.pair(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of(engine, path))
    assert loaded.signature == Signature(
        (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1, 2))),
        (TensorSpec("sum", "FP32", (-1, 2)), TensorSpec("doubled", "INT64", (-1, 2))),
        batched=True,
    )
    loaded.close()


@every_engine
def test_engine_matches_tensors_by_name_when_there_are_several(engine: str, tmp_path: Path) -> None:
    path = onnx_models.pair(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of(engine, path))
    a, b = rows(3, 2), np.array([[1, -2], [2**30 - 1, 4], [5, 6]])  # OpenVINO keeps 32 bits
    outputs = loaded.run({"b": b, "a": a})
    np.testing.assert_array_equal(outputs["doubled"], 2 * b)
    np.testing.assert_allclose(outputs["sum"], a + b.astype(np.float32), rtol=1e-6)
    loaded.close()


@every_engine
def test_engine_runs_as_it_is_when_the_model_has_no_batch_axis(engine: str, tmp_path: Path) -> None:
    path = onnx_models.fixed(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of(engine, path))
    assert loaded.signature == Signature(
        (TensorSpec("x", "FP32", (3,)),), (TensorSpec("y", "FP32", (3,)),), batched=False
    )
    x = np.array([1.0, -2.0, 0.5], np.float32)
    np.testing.assert_array_equal(loaded.run({"x": x})["y"], -x)
    loaded.close()


@every_engine
def test_engine_takes_any_length_when_an_axis_is_variable(engine: str, tmp_path: Path) -> None:
    path = onnx_models.ragged(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of(engine, path))
    assert loaded.signature.inputs[0].shape == (-1, -1)
    for n_rows, length in ((1, 3), (2, 7), (3, 1), (6, 5)):
        x = rows(n_rows, length)
        want = x.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(loaded.run({"x": x})["total"], want, atol=1e-5)
    loaded.close()


@every_engine
def test_engine_refuses_an_option_when_it_is_unknown(engine: str, tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    with pytest.raises(ArtifactInvalid, match=r"options\.colour.*want one of"):
        load_engine(tmp_path, spec_of(engine, path, options={"colour": "red"}))


@every_engine
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"not a model", id="it is no model"),
        pytest.param(b"", id="it is empty"),
        pytest.param(None, id="it is missing"),
    ],
)
def test_engine_refuses_a_file_when(engine: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactInvalid, match=r"model\.onnx: .* can't load it"):
        load_engine(tmp_path, spec_of(engine, path))


@every_engine
def test_profile_names_the_kernels_when_a_model_has_run(engine: str, tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    kernels = engine_module(engine).profile(tmp_path, spec_of(engine, path), {"x": rows(2)}, 3)
    products = [k for k in kernels if k.operator in ("Gemm", "FusedGemm", "FullyConnected")]
    assert [kernel.precision for kernel in products] == ["fp32"]
    assert all(kernel.node and kernel.kernel and kernel.duration_s >= 0 for kernel in kernels)


# --- onnxruntime


@pytest.mark.parametrize(
    ("options", "field"),
    [
        pytest.param({"provider": "tpu"}, "provider", id="the provider is unknown"),
        pytest.param({"provider": "cuda"}, "provider", id="this build lacks the provider"),
        pytest.param({"optimization": "most"}, "optimization", id="the level is unknown"),
        pytest.param({"arena": "yes"}, "arena", id="a switch is text"),
    ],
)
def test_onnxruntime_refuses_when(options: Mapping[str, Any], field: str, tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if has_cuda and options.get("provider") == "cuda":
        pytest.skip("this build has the CUDA provider")
    with pytest.raises(ArtifactInvalid, match=rf"engine\.options\.{field}"):
        load_engine(tmp_path, spec_of("onnxruntime", path, options=options))


@pytest.mark.parametrize(("provider", "is_loaded"), [("cpu", False), ("cuda", True)])
def test_onnxruntime_loads_cudas_libraries_before_a_session_that_needs_them(
    provider: str,
    is_loaded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a build that says that it has the provider, and no GPU."""

    class Stopped(Exception):
        pass

    def preload(directory: str) -> None:
        assert directory == ""  # the packages of pip, then the system's folders
        sys.stdout.write("loaded\n")

    def session(*arguments: object, **options: object) -> None:
        sys.stderr.write("session\n")
        raise Stopped

    path = onnx_models.linear(tmp_path / "model.onnx")
    names = ["CPUExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(ArtifactInvalid, match="can't load it"):
        load_engine(tmp_path, spec_of("onnxruntime", path, options={"provider": provider}))
    said = capsys.readouterr()
    assert (said.out, said.err.split()) == ("", [*["loaded"] * is_loaded, "session"])


def test_onnxruntime_keeps_numbers_when_options_change(tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    options = {"optimization": "none", "arena": False, "spinning": True, "provider": "cpu"}
    loaded = load_engine(tmp_path, spec_of("onnxruntime", path, threads=2, options=options))
    np.testing.assert_allclose(loaded.run({"x": rows(3)})["y"], linear_by_hand(rows(3)), atol=1e-5)
    loaded.close()


def test_onnxruntime_carries_bytes_when_they_are_utf8(tmp_path: Path) -> None:
    path = onnx_models.text(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of("onnxruntime", path))
    assert loaded.signature.inputs == (TensorSpec("words", "BYTES", (-1, 2)),)
    words = np.array([[b"a", "é".encode()], [b"", b"long " * 50]], object)
    assert loaded.run({"words": words})["echo"].tolist() == words.tolist()
    with pytest.raises(InvalidRequest, match=r"^inputs\.words.*UTF-8"):
        loaded.run({"words": np.array([[b"\xff", b""]], object)})
    loaded.close()


def test_onnxruntime_takes_scalars_when_the_model_has_them(tmp_path: Path) -> None:
    path = onnx_models.work(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of("onnxruntime", path))
    assert loaded.signature == Signature(
        (TensorSpec("n", "INT64", ()),), (TensorSpec("done", "INT64", ()),), batched=False
    )
    done = loaded.run({"n": np.array(5)})["done"]
    assert (np.shape(done), int(done)) == ((), 5)  # type: ignore[call-overload]
    loaded.close()


# --- openvino


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param({"options": {"hint": "FAST"}}, r"options\.hint", id="the hint is unknown"),
        pytest.param({"precision": "fp4"}, "precision", id="the precision is unknown"),
    ],
)
def test_openvino_refuses_when(changes: Mapping[str, Any], field: str, tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    with pytest.raises(ArtifactInvalid, match=f"{field}.*want one of"):
        load_engine(tmp_path, spec_of("openvino", path, **changes))


def test_openvino_computes_in_fp32_when_it_is_told_to(tmp_path: Path) -> None:
    """bf16 where the CPU has it would be off by thousandths."""
    path = onnx_models.linear(tmp_path / "model.onnx")
    for precision in ("fp32", "int8"):
        loaded = load_engine(tmp_path, spec_of("openvino", path, precision=precision))
        np.testing.assert_allclose(
            loaded.run({"x": rows(4)})["y"], linear_by_hand(rows(4)), atol=1e-6
        )
        loaded.close()


def test_openvino_computes_the_rest_of_a_quantized_model_in_bf16_when_it_is_told_to(
    tmp_path: Path,
) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    spec = spec_of("openvino", path, precision="int8", options={"rest": "bf16"})
    loaded = load_engine(tmp_path, spec)
    np.testing.assert_allclose(loaded.run({"x": rows(4)})["y"], linear_by_hand(rows(4)), atol=0.1)
    loaded.close()
    with pytest.raises(ArtifactInvalid, match=r"options\.rest.*want it only for int8 and int4"):
        load_engine(tmp_path, spec_of("openvino", path, options={"rest": "bf16"}))


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 9])
def test_openvino_gives_the_same_numbers_when_each_thread_has_a_stream(
    n_rows: int, tmp_path: Path
) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    spec = spec_of("openvino", path, threads=2, options={"streams": "threads"})
    loaded = load_engine(tmp_path, spec)
    x = rows(n_rows, seed=n_rows)
    np.testing.assert_allclose(loaded.run({"x": x})["y"], linear_by_hand(x), atol=1e-5)
    loaded.close()


def test_openvino_takes_any_number_of_rows_when_no_batch_size_is_given(tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "model.onnx")
    loaded = load_engine(tmp_path, spec_of("openvino", path, batch_sizes=()))
    np.testing.assert_allclose(loaded.run({"x": rows(3)})["y"], linear_by_hand(rows(3)), atol=1e-5)
    loaded.close()


def test_openvino_compiles_every_bucket_when_lengths_are_padded(tmp_path: Path) -> None:
    path = onnx_models.ragged(tmp_path / "model.onnx")
    padding = Padding((PaddedInput("x"),), (2, 5))
    loaded = load_engine(tmp_path, spec_of("openvino", path), padding)
    for n_rows, length in ((1, 2), (3, 5), (4, 2), (9, 5)):
        x = rows(n_rows, length, seed=n_rows)
        want = x.astype(np.float64).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(loaded.run({"x": x})["total"], want, atol=1e-5)
    with pytest.raises(KeyError):  # the batcher fills up to a bucket before
        loaded.run({"x": rows(1, 3)})
    loaded.close()


# --- the table of engines


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("tensorflow", "unknown, want one of onnxruntime", id="it is not in the table"),
        pytest.param("", "unknown", id="it is empty"),
    ],
)
def test_engine_module_is_unavailable_when(name: str, message: str) -> None:
    with pytest.raises(EngineUnavailable, match=message):
        engine_module(name)
