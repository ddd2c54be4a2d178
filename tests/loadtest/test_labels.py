"""Accuracy under load: labels beside recorded inputs, answers read on both transports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import oip_pb2
from loadtest.answers import grpc_numbers, rest_numbers
from loadtest.cli import main
from loadtest.inputs import InputsInvalid, read_labelled_file
from loadtest.labels import UNGRADED, AnswerKey, LabelsInvalid, choose_output
from loadtest.plan import load_plan, save_plan
from loadtest.report import from_json
from loadtest.session import Settings, make_plan
from loadtest.signature import Signature, TensorSpec
from loadtest.slo import Slo
from loadtest.target import parse_target

X = TensorSpec("x", "FP32", (-1, 8))
SCORES = TensorSpec("scores", "FP32", (-1, 4))
SIGNATURE = Signature((X,), (SCORES, TensorSpec("text", "BYTES", (-1, 1))))
SLO_TEXT = """\
apiVersion: trimserve/v1
kind: SLO
name: stub
latency: {quantile: 0.9, threshold_ms: 200}
workload: {rate_per_s: 100, rows: 2}
success_ratio: 0.99
"""


def write_inputs(folder: Path, **arrays: object) -> Path:
    path = folder / "inputs.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def rows(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Inputs whose first number is their class, 0 to 3."""
    x = np.random.default_rng(1).standard_normal((n, 8)).astype(np.float32)
    classes = np.arange(n) % 4
    x[:, 0] = classes
    return x, classes


def make_settings(path: Path, **changes: object) -> Settings:
    slo = Slo.model_validate(
        {
            "apiVersion": "trimserve/v1",
            "kind": "SLO",
            "name": "s",
            "latency": {"threshold_ms": 50},
            "workload": {"rate_per_s": 100, "rows": 3},
            "window_s": 2,
        }
    )
    values = {"inputs": path, "labels": "y", "label_output": "scores", **changes}
    target = parse_target("http://127.0.0.1:1")
    return Settings(slo=slo, model="m", targets=(target,), **values)  # type: ignore[arg-type]


def test_answer_key_counts_rows_whose_highest_score_is_their_class() -> None:
    key = AnswerKey("scores", np.array([[0, 1, 2]]))
    scores = np.array([[0.9, 0.1, 0], [0.9, 0.1, 0], [0, np.nan, 1]])
    assert key.n_right(0, scores) == 1
    for odd in (None, scores[:2], scores.ravel(), scores[:, :0]):
        assert key.n_right(0, odd) == UNGRADED


@pytest.mark.parametrize("binary", [True, False])
def test_numbers_are_read_from_rest_when_behind_another_output(binary: bool) -> None:
    values = np.array([[1.5, -2], [0, 4]], np.float32)
    other = np.arange(3, dtype=np.int64)
    outputs = [
        {"name": "other", "datatype": "INT64", "shape": [3]},
        {"name": "scores", "datatype": "FP32", "shape": [2, 2]},
    ]
    raw = b""
    for one, array in zip(outputs, (other, values), strict=True):
        if binary:
            one["parameters"] = {"binary_data_size": array.nbytes}
            raw += array.tobytes()
        else:
            one["data"] = array.ravel().tolist()
    header = json.dumps({"outputs": outputs}).encode()
    found = rest_numbers(header + raw, len(header) if binary else None, "scores")
    np.testing.assert_array_equal(found, values)
    assert rest_numbers(header + raw, len(header) if binary else None, "none") is None
    for broken in (b"", b"[]", b'{"outputs": [3]}', header + raw[:-1] if binary else header[:-1]):
        assert rest_numbers(broken, len(header) if binary else None, "scores") is None


@pytest.mark.parametrize("raw", [True, False])
def test_numbers_are_read_from_grpc(raw: bool) -> None:
    values = np.array([[1.5, -2], [0, 4]], np.float32)
    reply = oip_pb2.ModelInferResponse()
    output = reply.outputs.add(name="scores", datatype="FP32", shape=[2, 2])
    if raw:
        reply.raw_output_contents.append(values.tobytes())
    else:
        output.contents.fp32_contents.extend(values.ravel().tolist())
    np.testing.assert_array_equal(grpc_numbers(reply.SerializeToString(), None, "scores"), values)
    assert grpc_numbers(reply.SerializeToString(), None, "none") is None
    assert grpc_numbers(b"\xff", None, "scores") is None


def test_numbers_are_read_from_bfloat16() -> None:
    reply = oip_pb2.ModelInferResponse()
    reply.outputs.add(name="scores", datatype="BF16", shape=[1, 2])
    reply.raw_output_contents.append(bytes([0x80, 0x3F, 0x20, 0xC0]))
    found = grpc_numbers(reply.SerializeToString(), None, "scores")
    np.testing.assert_array_equal(found, [[1.0, -2.5]])


def test_plan_has_the_classes_of_the_rows_that_it_sends(tmp_path: Path) -> None:
    x, classes = rows(41)
    plan = make_plan(make_settings(write_inputs(tmp_path, x=x, y=classes)), SIGNATURE)
    assert plan.key is not None
    assert plan.key.classes.shape == (len(plan.payloads["rest"]), 3)
    for payload, wanted in zip(plan.payloads["rest"], plan.key.classes, strict=True):
        sent = np.frombuffer(payload.body[payload.json_bytes :], np.float32).reshape(3, 8)
        np.testing.assert_array_equal(sent[:, 0], wanted)
    first = plan.key.classes.ravel()[:41]
    np.testing.assert_array_equal(np.bincount(first), np.bincount(classes))
    save_plan(plan, tmp_path)
    again = load_plan(tmp_path).key
    assert again is not None
    assert again.output == "scores"
    np.testing.assert_array_equal(again.classes, plan.key.classes)


@pytest.mark.parametrize(
    ("labels", "arrays", "message"),
    [
        ("z", {}, "no array 'z'"),
        ("yy", {}, "did you mean 'y'"),
        ("x", {}, "an input of the model"),
        ("y", {"y": np.arange(3)}, "got shape [3], want [40]"),
        ("y", {"y": np.zeros((40, 1), np.int64)}, "got shape [40, 1]"),
        ("y", {"y": np.zeros(40)}, "got float64, want integers"),
        ("y", {"y": np.full(40, 4)}, "got classes 4 to 4, want 0 to 3"),
        ("y", {"y": np.full(40, -1)}, "got classes -1 to -1"),
    ],
)
def test_labels_are_refused_when_they_do_not_fit(
    tmp_path: Path, labels: str, arrays: dict[str, object], message: str
) -> None:
    x, classes = rows()
    path = write_inputs(tmp_path, **{"x": x, "y": classes, **arrays})
    with pytest.raises(LabelsInvalid) as caught:
        read_labelled_file(path, SIGNATURE, labels, SCORES)
    assert message in str(caught.value)


def test_array_that_is_neither_input_nor_labels_is_refused(tmp_path: Path) -> None:
    x, classes = rows()
    path = write_inputs(tmp_path, x=x, y=classes, w=classes)
    with pytest.raises(InputsInvalid, match="'w' is no input"):
        read_labelled_file(path, SIGNATURE, "y", SCORES)


@pytest.mark.parametrize(
    ("outputs", "name", "message"),
    [
        (SIGNATURE.outputs, None, "missing, and the model's outputs are scores, text"),
        (SIGNATURE.outputs, "score", "did you mean 'scores'"),
        (SIGNATURE.outputs, "text", "is BYTES"),
        ((), None, "none, so it can't be graded"),
        ((TensorSpec("y", "FP32", (-1, 3, 4)),), None, "want numbers [rows, classes]"),
    ],
)
def test_output_is_refused_when_it_cannot_be_graded(
    outputs: tuple[TensorSpec, ...], name: str | None, message: str
) -> None:
    with pytest.raises(LabelsInvalid) as caught:
        choose_output(Signature((X,), outputs), name)
    assert message in str(caught.value)


@pytest.mark.alone
def test_loadtest_shows_the_accuracy_when_there_are_labels(
    start_stub: Callable[..., Any], tmp_path: Path
) -> None:
    x, classes = rows()
    labels = np.where(np.arange(40) < 10, (classes + 1) % 4, classes)
    slo, file, page = (tmp_path / name for name in ("slo.yaml", "report.json", "report.html"))
    slo.write_text(SLO_TEXT, "utf-8")
    inputs = str(write_inputs(tmp_path, x=x, y=labels))
    stub = start_stub("--edge-s", "0.2", "--scores")
    common = [str(slo), "--model", "stub", "--inputs", inputs, "--metrics-url", stub.metrics_url]
    for url in (stub.rest_url, stub.grpc_url):
        arguments = [*common, "--target", url, "--labels", "y", "--warmup-s", "0"]
        arguments += ["--duration-s", "2", "--json", str(file), "--html", str(page)]
        main(arguments)
        report = from_json(file.read_text("utf-8"))
        assert report.accuracy is not None
        assert report.accuracy.n_rows == 2 * report.requests.n_ok == 400
        assert 0.6 < report.accuracy.accuracy < 0.9
        assert "answers_ungraded" not in [one.reason.kind for one in report.reasons]
        assert "Accuracy under load" in page.read_text("utf-8")


@pytest.mark.alone
def test_loadtest_is_inconclusive_when_answers_lack_the_output(
    start_stub: Callable[..., Any], tmp_path: Path
) -> None:
    x, classes = rows()
    slo, file = tmp_path / "slo.yaml", tmp_path / "report.json"
    slo.write_text(SLO_TEXT, "utf-8")
    stub = start_stub("--edge-s", "0.2")
    code = main(
        [
            *(str(slo), "--model", "stub", "--target", stub.rest_url, "--json", str(file)),
            *("--inputs", str(write_inputs(tmp_path, x=x, y=classes)), "--labels", "y"),
            *("--no-server-metrics", "--warmup-s", "0", "--duration-s", "1"),
        ]
    )
    report = from_json(file.read_text("utf-8"))
    assert code == 3
    assert "answers_ungraded" in [one.reason.kind for one in report.reasons]
    assert report.accuracy is None


def test_labels_are_a_usage_error_when_they_come_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slo = tmp_path / "slo.yaml"
    slo.write_text(SLO_TEXT, "utf-8")
    good = [str(slo), "--model", "m", "--target", "http://127.0.0.1:1"]
    assert main([*good, "--labels", "y"]) == 2
    assert "--labels: got it without --inputs" in capsys.readouterr().err
    assert main([*good, "--label-output", "y"]) == 2
    assert "--label-output: got it without --labels" in capsys.readouterr().err
