"""A small real inference server with faults to order: REST, gRPC and metrics on free ports.

Run as a subprocess; it prints its three ports as one JSON line and serves until it is ended.
It speaks just enough of the Open Inference Protocol for a load test, answers with nothing, and
blocks its event loop for a stall, so that everything behind the stall waits as on a real server.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import uvicorn
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from loadtest import oip_pb2

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
OUTPUTS: list[dict[str, Any]] = [{"name": "scores", "datatype": "FP32", "shape": [-1, 4]}]
INPUTS: list[dict[str, Any]] = [{"name": "x", "datatype": "FP32", "shape": [-1, 8]}]


class Restarting(Collector):
    """A process_start_time_seconds that moves at every scrape."""

    value = 1_000.0

    def collect(self) -> list[GaugeMetricFamily]:
        self.value += 1.0
        return [GaugeMetricFamily("process_start_time_seconds", "Start.", value=self.value)]


@dataclass
class Stub:
    """State of the one model "stub", shared by both transports."""

    options: argparse.Namespace
    seen: int = 0
    leaked: list[bytes] = field(default_factory=list)
    requests: Histogram = field(init=False)
    batch_rows: Histogram = field(init=False)
    registry: CollectorRegistry = field(init=False)
    free_s: float = 0.0

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "trimserve_request_duration_seconds",
            "Duration of a request.",
            ("model", "version", "transport", "code"),
            buckets=[0.001, *self.options.edge_s, 10.0],
            registry=self.registry if self.options.metrics != "none" else None,
        )
        self.batch_rows = Histogram(
            "trimserve_batch_rows", "Rows.", ("model", "version"), registry=self.registry
        )
        if self.options.metrics == "restarts":
            self.registry.register(Restarting())
        else:
            ProcessCollector(registry=self.registry)

    async def infer(self, transport: str, started: float) -> str:
        """Serve one request; gives its code, "ok" or the error's."""
        self.seen += 1
        if self.seen == self.options.stall_at:
            time.sleep(self.options.stall_s)
        if self.options.service_s > 0:
            # By the clock, so that a timer's lateness isn't added up along the queue.
            self.free_s = max(self.free_s, time.monotonic()) + self.options.service_s
            await asyncio.sleep(self.free_s - time.monotonic())
            self.batch_rows.labels("stub", "1").observe(2)
        slow = self.options.slow_every > 0 and self.seen % self.options.slow_every == 0
        latency_s = self.options.slow_s if slow else self.options.latency_s
        failed = self.options.fail_every > 0 and self.seen % self.options.fail_every == 0
        latency_s += self.options.drift_s * self.seen
        self.leaked.append(bytes(self.options.leak_bytes))
        if latency_s > 0:
            await asyncio.sleep(latency_s)
        code = "unavailable" if failed else "ok"
        if not (self.options.metrics == "lossy" and self.seen % 10 == 0):
            labels = ("stub", "1", transport, code)
            self.requests.labels(*labels).observe(time.perf_counter() - started)
        return code


def rest_app(stub: Stub) -> Callable[[dict[str, Any], Receive, Send], Awaitable[None]]:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        started = time.perf_counter()
        sent = b""
        more = True
        while more:
            message = await receive()
            sent += message.get("body", b"")
            more = message.get("more_body", False)
        status, content = await rest_answer(stub, scope["path"], started)
        raw = b""
        length = dict(scope["headers"]).get(b"inference-header-content-length")
        if status == 200 and stub.options.scores and length is not None:
            scores = scores_of(sent[int(length) :])
            raw = scores.tobytes()
            output = {"name": "scores", "datatype": "FP32", "shape": list(scores.shape)}
            content["outputs"] = [{**output, "parameters": {"binary_data_size": len(raw)}}]
        header = json.dumps(content).encode()
        body = header + raw
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if raw:
            headers.append((b"inference-header-content-length", str(len(header)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


async def rest_answer(stub: Stub, path: str, started: float) -> tuple[int, dict[str, Any]]:
    if not path.startswith("/v2/models/stub"):
        return 404, {"error": f"no model at {path}"}
    if path.endswith("/infer"):
        if await stub.infer("rest", started) == "ok":
            return 200, {"model_name": "stub", "outputs": []}
        return 503, {"error": "told to fail"}
    if path.endswith("/ready"):
        return (503, {"error": "loading"}) if stub.options.not_ready else (200, {})
    return 200, {
        "name": "stub",
        "versions": ["1"],
        "platform": "stub",
        "inputs": INPUTS,
        "outputs": OUTPUTS,
    }


def scores_of(raw: bytes) -> npt.NDArray[np.float32]:
    """[rows, 4], highest where the first number of a row of x says: 0 to 3."""
    x = np.frombuffer(raw, "<f4").reshape(-1, 8)
    return np.eye(4, dtype="<f4")[np.clip(x[:, 0], 0, 3).astype(int)]


def grpc_handler(stub: Stub) -> Any:
    async def model_ready(request: oip_pb2.ModelReadyRequest, context: Any) -> Any:
        if request.name != "stub":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}")
        return oip_pb2.ModelReadyResponse(ready=not stub.options.not_ready)

    async def model_metadata(request: oip_pb2.ModelMetadataRequest, context: Any) -> Any:
        if request.name != "stub":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}")
        inputs = [oip_pb2.ModelMetadataResponse.TensorMetadata(**one) for one in INPUTS]
        outputs = [oip_pb2.ModelMetadataResponse.TensorMetadata(**one) for one in OUTPUTS]
        return oip_pb2.ModelMetadataResponse(
            name="stub", versions=["1"], inputs=inputs, outputs=outputs
        )

    async def model_infer(request: oip_pb2.ModelInferRequest, context: Any) -> Any:
        if await stub.infer("grpc", time.perf_counter()) != "ok":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "told to fail")
        answer = oip_pb2.ModelInferResponse(model_name=request.model_name)
        if stub.options.scores:
            scores = scores_of(request.raw_input_contents[0])
            answer.outputs.add(name="scores", datatype="FP32", shape=scores.shape)
            answer.raw_output_contents.append(scores.tobytes())
        return answer

    methods: dict[str, tuple[Any, Any]] = {
        "ModelReady": (model_ready, oip_pb2.ModelReadyRequest),
        "ModelMetadata": (model_metadata, oip_pb2.ModelMetadataRequest),
        "ModelInfer": (model_infer, oip_pb2.ModelInferRequest),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            call, message.FromString, lambda answer: answer.SerializeToString()
        )
        for name, (call, message) in methods.items()
    }
    return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)


async def stall(options: argparse.Namespace) -> None:
    """Block the loop at the end of each cycle, whatever the stalls before cost."""
    begun_s, n = time.monotonic(), 0
    while True:
        n += 1
        due_s = begun_s + n * options.stall_every_s - options.stall_s
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        time.sleep(options.stall_s)


async def serve(options: argparse.Namespace) -> None:
    stub = Stub(options)
    stalls = asyncio.create_task(stall(options)) if options.stall_every_s > 0 else None
    metrics, _ = start_http_server(options.metrics_port, addr="127.0.0.1", registry=stub.registry)
    rpc = grpc.aio.server()
    rpc.add_generic_rpc_handlers((grpc_handler(stub),))
    grpc_port = rpc.add_insecure_port(f"127.0.0.1:{options.grpc_port}")
    await rpc.start()
    # asyncio turns Nagle's algorithm off only where a socket names its protocol; without that
    # an answer in two writes takes 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", options.rest_port))
    listener.listen(4096)
    config = uvicorn.Config(
        rest_app(stub), log_level="warning", access_log=False, lifespan="off", backlog=4096
    )
    ports = {
        "rest": listener.getsockname()[1],
        "grpc": grpc_port,
        "metrics": metrics.server_port,
    }
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()
    await uvicorn.Server(config).serve(sockets=[listener])
    if stalls is not None:
        stalls.cancel()
    await rpc.stop(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--service-s", type=float, default=0.0, help="serve one at a time")
    parser.add_argument("--fail-every", type=int, default=0, help="fail each n-th request")
    parser.add_argument("--slow-every", type=int, default=0, help="--slow-s for each n-th request")
    parser.add_argument("--slow-s", type=float, default=1.0)
    parser.add_argument("--drift-s", type=float, default=0.0, help="more with every request")
    parser.add_argument("--leak-bytes", type=int, default=0, help="kept of every request")
    for transport in ("rest", "grpc", "metrics"):
        parser.add_argument(f"--{transport}-port", type=int, default=0)
    parser.add_argument("--stall-at", type=int, default=0, help="block at the n-th request")
    parser.add_argument("--stall-every-s", type=float, default=0.0, help="block once in so long")
    parser.add_argument("--stall-s", type=float, default=1.0)
    parser.add_argument("--scores", action="store_true", help="answer with an output")
    parser.add_argument("--not-ready", action="store_true")
    parser.add_argument("--edge-s", type=float, action="append", default=[])
    parser.add_argument(
        "--metrics", choices=("exact", "none", "lossy", "restarts"), default="exact"
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
