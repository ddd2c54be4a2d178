"""REST throughput of the server on one core, against the bare ASGI server as the ceiling.

Both apps run pinned to core 0, wrk (Debian: `apt-get install wrk`) pinned to core 1, closed loop,
in interleaved rounds, since neighbours make absolute figures drift. Prints medians and ranges.

    python -m benchmarks.serving [--rounds 5] [--seconds 3]
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

CONNECTIONS = (1, 16, 64)
BARE = """
import uvicorn
async def app(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"256")]})
    await send({"type": "http.response.body", "body": bytes(256)})
uvicorn.run(app, port=PORT, http="httptools", loop="uvloop", ws="none", lifespan="off",
            log_level="critical", access_log=False)
"""
SCRIPT = """
wrk.method = "POST"
local head = '{"inputs":[{"name":"x","shape":[1,64],"datatype":"FP32","parameters":' ..
  '{"binary_data_size":256}}],"parameters":{"binary_data_output":true}}'
wrk.headers["Inference-Header-Content-Length"] = tostring(#head)
wrk.body = head .. string.rep("\\0", 256)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is missing: apt-get install wrk", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "linear.onnx"
        onnx.save(linear(), model)
        (Path(scratch) / "infer.lua").write_text(SCRIPT)
        rows = measure(Path(scratch), model, arguments.rounds, arguments.seconds)
    for (name, connections), figures in rows.items():
        rates, p50s, p99s = zip(*figures, strict=True)
        print(
            f"{name:10} c={connections:<3} {statistics.median(rates):8.0f} req/s "
            f"({min(rates):.0f} to {max(rates):.0f})  p50 {statistics.median(p50s):.2f} ms  "
            f"p99 {statistics.median(p99s):.2f} ms"
        )
    return 0


def measure(scratch, model, rounds, seconds):
    bare = subprocess.Popen(pinned(0, [sys.executable, "-c", BARE.replace("PORT", "18090")]))
    command = [
        sys.executable,
        "-m",
        "trimserve",
        "serve",
        "--model",
        str(model),
        "--http-port",
        "0",
        "--grpc-port",
        "0",
        "--metrics-port",
        "0",
    ]
    server = subprocess.Popen(
        pinned(0, command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = json.loads(server.stdout.readline())["http_port"]
        urls = {
            "bare ASGI": "http://127.0.0.1:18090/",
            "trimserve": f"http://127.0.0.1:{port}/v2/models/linear/infer",
        }
        rows = {(name, c): [] for name in urls for c in CONNECTIONS}
        for _ in range(rounds):
            for name, url in urls.items():
                for connections in CONNECTIONS:
                    rows[name, connections].append(wrk(scratch, url, connections, seconds))
        return rows
    finally:
        for process in (bare, server):
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def wrk(scratch, url, connections, seconds):
    """Requests/s, p50 and p99 in ms of one run."""
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--latency",
        "-s",
        str(scratch / "infer.lua"),
        url,
    ]
    text = subprocess.run(
        pinned(1, command), capture_output=True, text=True, check=True, timeout=seconds + 30
    ).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(text)
    units = {"us": 1e-3, "ms": 1.0, "s": 1e3}

    def quantile(label):
        value, unit = re.search(rf"{label}\s+([\d.]+)(us|ms|s)", text).groups()
        return float(value) * units[unit]

    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
    return rate, quantile("50%"), quantile("99%")


def pinned(core, command):
    return ["taskset", "-c", str(sorted(os.sched_getaffinity(0))[core]), *command]


def linear() -> onnx.ModelProto:
    """64 floats times a matrix: an engine that costs next to nothing."""
    weights = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    sides = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 64]) for name in "xy"
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "linear", sides[:1], sides[1:], [weights]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


if __name__ == "__main__":
    sys.exit(main())
