"""curl, as people try a server: JSON, compressed answers, a raw tensor as the whole body."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.api import assert_close
from tests.serve.onnx_models import linear_by_hand
from tests.serve.running_server import HOST, PATIENCE_S, RunningServer
from tests.serve.versions import rows

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")

JSON_BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": rows(2).tolist()}]}
)


def curl(server: RunningServer, path: str, *arguments: str | Path) -> bytes:
    """What curl writes to its output; raises CalledProcessError where it fails."""
    url = f"http://{HOST}:{server.http_port}{path}"
    return subprocess.run(
        ["curl", "--silent", "--show-error", *map(str, arguments), url],
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    ).stdout


def status(server: RunningServer, path: str) -> int:
    answered = curl(server, path, "--output", "/dev/null", "--write-out", "%{http_code}")
    return int(answered)


def output(body: bytes) -> Any:
    """The one output of a JSON answer."""
    answer: dict[str, Any] = json.loads(body)
    (tensor,) = answer["outputs"]
    return np.array(tensor["data"]).reshape(tensor["shape"])


def fields(head: bytes) -> dict[str, str]:
    """Header fields of the last answer that curl dumped, names in small letters."""
    lines = head.decode().strip().split("\r\n\r\n")[-1].splitlines()[1:]
    pairs = (line.partition(":") for line in lines)
    return {name.lower(): value.strip() for name, _, value in pairs}


def test_curl_reads_metadata_when_asked_by_get(server: RunningServer) -> None:
    model = json.loads(curl(server, "/v2/models/linear"))
    assert (model["name"], model["inputs"][0]["shape"]) == ("linear", [-1, 4])


def test_curl_gets_a_status_when_it_fails_on_errors(server: RunningServer) -> None:
    assert status(server, "/v2/health/ready") == 200
    with pytest.raises(subprocess.CalledProcessError) as caught:
        curl(server, "/v2/models/absent/ready", "--fail")
    assert caught.value.returncode == 22  # curl's own, for a status of 400 or more


def test_curl_infers_when_it_sends_json(server: RunningServer) -> None:
    """With curl's own Content-Type, a form's: what comes is what counts."""
    answer = curl(server, "/v2/models/linear/infer", "--data", JSON_BODY)
    assert json.loads(answer)["model_name"] == "linear"
    assert_close(output(answer), linear_by_hand(rows(2)))


def test_curl_infers_when_it_waits_to_be_asked_for_the_body(server: RunningServer) -> None:
    answer = curl(
        server, "/v2/models/linear/infer", "--data", JSON_BODY, "--header", "Expect: 100-continue"
    )
    assert_close(output(answer), linear_by_hand(rows(2)))


def test_curl_infers_when_it_sends_chunks_from_a_pipe(
    server: RunningServer, tmp_path: Path
) -> None:
    body = tmp_path / "body"
    body.write_text(JSON_BODY)
    answer = curl(
        server, "/v2/models/linear/infer", "--data-binary", f"@{body}",
        "--header", "Transfer-Encoding: chunked",
    )  # fmt: skip
    assert_close(output(answer), linear_by_hand(rows(2)))


def test_curl_unfolds_the_answer_when_it_accepts_compression(
    server: RunningServer, tmp_path: Path
) -> None:
    x = np.full(1000, 1.5, np.float32)
    body, head = tmp_path / "body", tmp_path / "head"
    document = {"name": "x", "shape": [1000], "datatype": "FP32", "data": x.tolist()}
    body.write_text(json.dumps({"inputs": [document], "outputs": [{"name": "negated"}]}))
    answer = curl(
        server, "/v2/models/positive/infer", "--compressed", "--dump-header", head,
        "--json", f"@{body}",
    )  # fmt: skip
    assert fields(head.read_bytes())["content-encoding"] in ("gzip", "deflate")
    np.testing.assert_array_equal(output(answer), -x)


def test_curl_infers_when_the_body_is_one_raw_tensor(server: RunningServer, tmp_path: Path) -> None:
    x = rows(1)
    body, head, got = (tmp_path / name for name in ("body", "head", "got"))
    body.write_bytes(x.tobytes())
    curl(
        server, "/v2/models/linear/infer", "--data-binary", f"@{body}",
        "--header", "Content-Type: application/octet-stream",
        "--header", "Inference-Header-Content-Length: 0",
        "--dump-header", head, "--output", got,
    )  # fmt: skip
    length = int(fields(head.read_bytes())["inference-header-content-length"])
    answer = got.read_bytes()
    assert json.loads(answer[:length])["outputs"][0]["parameters"] == {"binary_data_size": 12}
    y = np.frombuffer(answer[length:], np.float32).reshape(1, 3)
    assert_close(y, linear_by_hand(x))


def test_curl_loads_and_unloads_when_it_may(server: RunningServer) -> None:
    for verb, ready in (("unload", 503), ("load", 200)):
        path = f"/v2/repository/models/labelled/{verb}"
        assert json.loads(curl(server, path, "--request", "POST")) == {}
        assert status(server, "/v2/models/labelled/ready") == ready
