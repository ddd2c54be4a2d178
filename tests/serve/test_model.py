"""A loaded version: its checks of requests, and of itself while it loads."""

import logging
import math
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.slo import Slo
from serve.artifact import Batching, Profile, ServiceTime, read_manifest
from serve.batch_policy import Entry
from serve.batcher import Batch, Work
from serve.engines import EngineSpec
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.loading import load_model
from serve.machine import Machine
from serve.messages import InferRequest
from serve.model import Model
from serve.tensor import Array, Tensor
from tests.serve import onnx_models
from tests.serve.fake_engine import PATIENCE_S
from tests.serve.onnx_models import linear_by_hand
from tests.serve.versions import publish, rows, slo_document

Load = Callable[..., Model]


@pytest.fixture
def delivered() -> "queue.Queue[Batch]":
    return queue.Queue()


@pytest.fixture
def load(tmp_path: Path, delivered: "queue.Queue[Batch]") -> Iterator[Load]:
    """Publishes a model and loads it; all are closed at the end."""
    models: list[Model] = []

    def publish_and_load(builder: Any, override: Slo | None = None, **changes: Any) -> Model:
        directory = publish(tmp_path / "repository", builder, tmp_path, **changes)
        models.append(load_model(directory, read_manifest(directory), delivered.put, override))
        return models[-1]

    yield publish_and_load
    for model in models:
        model.close()


def request(
    *inputs: Tensor, outputs: tuple[str, ...] | None = None, deadline_s: float | None = None
) -> InferRequest:
    return InferRequest("m", "", inputs, outputs, deadline_s=deadline_s)


def entries(model: Model, given: InferRequest, arrival_s: float = 0.0) -> list[Entry[Work]]:
    """What the service makes of a request."""
    inputs = model.checked_inputs(given)
    return model.entries(inputs, model.n_rows(inputs), arrival_s, math.inf)


def real(name: str, array: Array) -> Tensor:
    return Tensor(name, "FP32", np.asarray(array, np.float32))


def whole(name: str, array: Any) -> Tensor:
    return Tensor(name, "INT64", np.asarray(array, np.int64))


# --- requests


def test_model_answers_like_the_engine_when_a_request_is_good(
    load: Load, delivered: "queue.Queue[Batch]"
) -> None:
    model = load(onnx_models.pair)
    good = request(real("a", rows(2, 2)), whole("b", [[1, 2], [3, 4]]), outputs=("doubled",))
    (entry,) = entries(model, good)
    model.batcher.submit(entry)
    (completion,) = delivered.get(timeout=PATIENCE_S).completions
    (output,) = model.tensors(good, completion.outputs)
    assert (output.name, output.datatype) == ("doubled", "INT64")
    assert output.array.tolist() == [[2, 4], [6, 8]]


def test_model_orders_inputs_like_its_signature_when_they_come_otherwise(load: Load) -> None:
    model = load(onnx_models.pair)
    given = request(whole("b", [[1, 2]]), real("a", rows(1, 2)))
    (entry,) = entries(model, given, arrival_s=5.0)
    assert list(entry.item.inputs) == ["a", "b"]
    assert (entry.n_rows, entry.arrival_s, entry.deadline_s) == (1, 5.0, math.inf)


A, B = real("a", rows(2, 2)), whole("b", [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        pytest.param(request(A), "inputs: .*also b", id="an input is missing"),
        pytest.param(request(), "inputs: .*also a, b", id="all inputs are missing"),
        pytest.param(request(A, B, A), "inputs.name: .*each input once", id="an input is twice"),
        pytest.param(
            request(A, B, real("c", rows(2, 2))), "inputs.name: got 'c', want one of a, b",
            id="an input is unknown",
        ),
        pytest.param(
            request(whole("a", [[1, 2]]), B), "inputs.a.datatype: got 'INT64', want FP32",
            id="a datatype is another",
        ),
        pytest.param(
            request(real("a", rows(2, 3)), B), r"inputs.a.shape: got \[2, 3\], want \[-1, 2\]",
            id="a dimension is another",
        ),
        pytest.param(
            request(real("a", rows(2, 2)[0]), B), "inputs.a.shape", id="a dimension is missing"
        ),
        pytest.param(
            request(real("a", rows(1, 2)), B), "inputs.shape: .*equal batch dimensions",
            id="the batch dimensions differ",
        ),
        pytest.param(
            request(real("a", rows(9, 2)), whole("b", np.ones((9, 2)))),
            r"inputs\.a\.shape: .* a batch of 1 to 8",
            id="the batch is too large",
        ),
        pytest.param(
            request(real("a", rows(0, 2)), whole("b", np.ones((0, 2)))),
            r"inputs\.a\.shape: .* a batch of 1 to 8",
            id="the batch is empty",
        ),
        pytest.param(
            request(A, B, outputs=("y",)), "outputs.name: got 'y', want one of sum, doubled",
            id="an output is unknown",
        ),
        pytest.param(
            request(A, B, outputs=("sum", "sum")), "outputs: .*each output once",
            id="an output is asked for twice",
        ),
    ],
)  # fmt: skip
def test_model_refuses_a_request_when(load: Load, bad: InferRequest, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}"):
        entries(load(onnx_models.pair), bad)


def test_model_takes_shapes_as_they_are_when_it_has_no_batch_axis(load: Load) -> None:
    model = load(onnx_models.fixed)
    assert entries(model, request(real("x", rows(1, 3)[0])))[0].n_rows == 1
    with pytest.raises(InvalidRequest, match=r"inputs\.x\.shape: got \[1, 3\], want \[3\]"):
        entries(model, request(real("x", rows(1, 3))))


def test_model_takes_empty_and_long_rows_when_an_axis_is_variable(load: Load) -> None:
    model = load(onnx_models.ragged)
    for length in (0, 1, 1000):
        (entry,) = entries(model, request(real("x", rows(2, length))))
        assert (entry.n_rows, entry.lane) == (2, ((length,),))


@pytest.mark.parametrize(
    ("embedded", "given", "target_s"),
    [
        pytest.param(None, None, math.inf, id="there is none"),
        pytest.param(50.0, None, 10.05, id="the version's"),
        pytest.param(50.0, 20.0, 10.02, id="the command line's, which overrules the version's"),
        pytest.param(None, 20.0, 10.02, id="the command line's alone"),
    ],
)
def test_target_follows_the_slo_when_it_is(
    load: Load, embedded: float | None, given: float | None, target_s: float
) -> None:
    override = Slo.model_validate(slo_document(given)) if given else None
    model = load(onnx_models.pair, override, slo=slo_document(embedded) if embedded else None)
    (entry,) = entries(model, request(A, B), arrival_s=10.0)
    assert entry.target_s == pytest.approx(target_s)


# --- loading


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        pytest.param(
            {"golden_outputs": {"y": np.full((2, 3), 0.5, np.float32)}}, "output 'y' differs by",
            id="the golden output isn't reproduced",
        ),
        pytest.param(
            {"golden_outputs": {"y": np.full((2, 3), np.nan, np.float32)}}, "output 'y' differs by",
            id="the golden output is NaN",
        ),
        pytest.param(
            {"golden_outputs": {"y": np.zeros((1, 3), np.float32)}}, "output 'y' differs by inf",
            id="the golden output has another shape",
        ),
        pytest.param(
            {"golden_outputs": {"other": rows(2, 3)}}, "output 'other' isn't the model's",
            id="the golden output has another name",
        ),
        pytest.param(
            {"golden": {"x": rows(2, 5)}, "golden_outputs": {"y": rows(2, 3)}}, "doesn't run",
            id="the golden input doesn't fit",
        ),
        pytest.param(
            {"engine": EngineSpec("onnxruntime", "model.onnx", options={"colour": "red"})},
            r"engine\.options\.colour", id="an engine option is unknown",
        ),
        pytest.param(
            {"slo": {**slo_document(5.0), "colour": "red"}}, r"slo\.colour",
            id="the SLO has an unknown key",
        ),
    ],
)  # fmt: skip
def test_load_refuses_when(load: Load, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArtifactInvalid, match=problem):
        load(onnx_models.linear, **{"golden": {"x": rows(2)}, **changes})


def test_load_refuses_when_the_signature_is_of_another_model(load: Load) -> None:
    other = load(onnx_models.pair).signature
    with pytest.raises(ArtifactInvalid, match=r"signature: .* declared, .* in file"):
        load(onnx_models.linear, signature=other)


def test_load_refuses_when_a_model_without_batch_axis_should_batch(load: Load) -> None:
    with pytest.raises(ArtifactInvalid, match=r"batching\.max_batch_size: got 8, want 0"):
        load(onnx_models.fixed, batching=Batching(8))


def test_load_refuses_when_a_file_was_tampered_with(
    tmp_path: Path, delivered: "queue.Queue[Batch]"
) -> None:
    directory = publish(tmp_path / "repository", onnx_models.linear, tmp_path)
    onnx_models.linear(directory / "model.onnx", seed=1)
    with pytest.raises(ArtifactInvalid, match="sha256"):
        load_model(directory, read_manifest(directory), delivered.put)


def test_load_accepts_when_the_golden_output_is_reproduced(load: Load) -> None:
    model = load(onnx_models.linear, golden={"x": rows(3)})
    assert model.platform == "onnxruntime_onnx"


def test_load_warns_when_it_was_measured_on_another_machine(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    there = Machine("abacus", (), 1, "wood", {})
    with caplog.at_level(logging.WARNING):
        load(onnx_models.linear, profile=Profile((ServiceTime(1, 0.1, 0.2, 5),), there))
    assert "measured on another machine" in caplog.text
    assert "abacus" in caplog.text


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(EngineSpec("onnxruntime", "model.onnx", instances=2), id="instances are two"),
        pytest.param(
            EngineSpec("openvino", "model.onnx", batch_sizes=(1, 4)), id="batches are padded"
        ),
    ],
)
def test_model_answers_all_when(
    load: Load, delivered: "queue.Queue[Batch]", spec: EngineSpec
) -> None:
    model = load(onnx_models.linear, engine=spec)
    for n in range(20):
        one = request(real("x", rows(1 + n % 5, seed=n)))
        (entry,) = entries(model, one)
        entry.item.context = one
        model.batcher.submit(entry)
    done = 0
    while done < 20:
        for completion in delivered.get(timeout=PATIENCE_S).completions:
            assert completion.error is None
            context = completion.work.context
            assert isinstance(context, InferRequest)
            want = linear_by_hand(context.inputs[0].array)
            np.testing.assert_allclose(completion.outputs["y"], want, atol=1e-5)
            done += 1
