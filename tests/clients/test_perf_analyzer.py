"""perf_analyzer's calls, one after the other, and every field that it reads unchecked.

Its own binary needs a newer C library than many machines have; what it asks is known from its
source. It reads statistics before and after a window of requests and subtracts.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import pytest

from serve import oip_pb2 as pb
from tests.serve.running_server import PATIENCE_S, RunningServer, ask, channel_to, connect, method
from tests.serve.versions import rows

MODEL = "linear"
DURATIONS = (
    "success", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit",
    "cache_miss",
)  # fmt: skip
COMPUTE = ("compute_input", "compute_infer", "compute_output")
N_REQUESTS = 20


@dataclass(frozen=True)
class Counts:
    """One reading of a version's statistics: counts and nanoseconds by duration."""

    name: str
    version: object
    inference_count: int
    execution_count: int
    counts: Mapping[str, int]
    ns: Mapping[str, int]


class Target(Protocol):
    """What perf_analyzer asks, over one of its two protocols."""

    def metadata(self) -> Any: ...
    def config(self) -> Any: ...
    def extensions(self) -> list[str]: ...
    def statistics(self) -> list[Counts]: ...
    def infer(self, n_rows: int) -> None: ...


class Rest:
    """It indexes the parsed JSON without looking: a missing field ends the test with KeyError."""

    def __init__(self, server: RunningServer) -> None:
        self.connection = connect(server.http_port)

    def metadata(self) -> Any:
        return self._get(f"/v2/models/{MODEL}")

    def config(self) -> Any:
        return self._get(f"/v2/models/{MODEL}/config")

    def extensions(self) -> list[str]:
        return list(self._get("/v2")["extensions"])

    def statistics(self) -> list[Counts]:
        return [
            Counts(
                one["name"],
                one["version"],
                one["inference_count"],
                one["execution_count"],
                {name: one["inference_stats"][name]["count"] for name in DURATIONS},
                {name: one["inference_stats"][name]["ns"] for name in DURATIONS},
            )
            for one in self._get(f"/v2/models/{MODEL}/stats")["model_stats"]
        ]

    def infer(self, n_rows: int) -> None:
        x = rows(n_rows)
        given = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
        body = {"inputs": [given], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
        assert ask(self.connection, "POST", f"/v2/models/{MODEL}/infer", body).status == 200

    def _get(self, path: str) -> Any:
        answer = ask(self.connection, "GET", path)
        assert answer.status == 200
        return answer.json


class Grpc:
    """Fields of protobuf are always there, but messages may not be set."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    def metadata(self) -> Any:
        answer = self._call("ModelMetadata", pb.ModelMetadataRequest(name=MODEL))
        inputs = [{"name": t.name, "shape": list(t.shape)} for t in answer.inputs]
        return {"name": answer.name, "inputs": inputs, "outputs": answer.outputs}

    def config(self) -> Any:
        config = self._call("ModelConfig", pb.ModelConfigRequest(name=MODEL)).config
        return {
            "max_batch_size": config.max_batch_size,
            "input": [{"name": one.name, "optional": one.optional} for one in config.input],
            "model_transaction_policy": {"decoupled": config.model_transaction_policy.decoupled},
            "response_cache": {"enable": config.response_cache.enable},
            config.WhichOneof("scheduling_choice"): {},
        }

    def extensions(self) -> list[str]:
        return list(self._call("ServerMetadata", pb.ServerMetadataRequest()).extensions)

    def statistics(self) -> list[Counts]:
        answer = self._call("ModelStatistics", pb.ModelStatisticsRequest(name=MODEL))
        assert all(
            one.inference_stats.HasField(name) for one in answer.model_stats for name in DURATIONS
        )
        return [
            Counts(
                one.name,
                one.version,
                one.inference_count,
                one.execution_count,
                {name: getattr(one.inference_stats, name).count for name in DURATIONS},
                {name: getattr(one.inference_stats, name).ns for name in DURATIONS},
            )
            for one in answer.model_stats
        ]

    def infer(self, n_rows: int) -> None:
        x = rows(n_rows)
        message = pb.ModelInferRequest(model_name=MODEL, raw_input_contents=[x.tobytes()])
        message.inputs.add(name="x", datatype="FP32", shape=x.shape)
        assert self._call("ModelInfer", message).raw_output_contents

    def _call(self, name: str, request: Any) -> Any:
        return method(self.channel, name)(request, timeout=PATIENCE_S)


@pytest.fixture(params=["REST", "gRPC"])
def target(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Target]:
    if request.param == "gRPC":
        with channel_to(server.grpc_port) as channel:
            yield Grpc(channel)
    else:
        made = Rest(server)
        with contextlib.closing(made.connection):
            yield made


def reading(target: Target) -> Counts:
    """The statistics of the only version."""
    (found,) = target.statistics()
    return found


def test_perf_analyzer_learns_how_to_ask_when_it_starts(target: Target) -> None:
    metadata, config = target.metadata(), target.config()
    assert metadata["name"] == MODEL
    assert config["max_batch_size"] == 8
    # It takes the first dimension for the batch where there is a max batch size.
    assert [tensor["shape"] for tensor in metadata["inputs"]] == [[-1, 4]]
    assert [one["optional"] for one in config["input"]] == [False]
    assert config["model_transaction_policy"]["decoupled"] is False
    assert config["response_cache"]["enable"] is False
    assert "dynamic_batching" in config
    assert not {"sequence_batching", "ensemble_scheduling"} & set(config)
    assert "statistics" in target.extensions()


def test_statistics_have_every_field_when_it_reads_them(target: Target) -> None:
    target.infer(1)
    found = reading(target)
    assert (found.name, found.version) == (MODEL, "1")
    assert isinstance(found.version, str)
    numbers = [found.inference_count, found.execution_count, *found.counts.values()]
    assert all(isinstance(n, int) and n >= 0 for n in [*numbers, *found.ns.values()])
    assert len({found.counts[name] for name in COMPUTE}) == 1
    assert all(found.ns[name] > 0 for name in ("success", "queue", *COMPUTE))
    assert (found.counts["cache_hit"], found.counts["cache_miss"]) == (0, 0)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_statistics_differ_by_the_window_when_it_sends_requests(
    target: Target, n_rows: int
) -> None:
    before = reading(target)
    for _ in range(N_REQUESTS):
        target.infer(n_rows)
    after = reading(target)
    assert after.inference_count - before.inference_count == N_REQUESTS * n_rows
    # One at a time there is no company: each request is a batch.
    assert after.execution_count - before.execution_count == N_REQUESTS
    for name in ("success", "queue", *COMPUTE):
        assert after.counts[name] - before.counts[name] == N_REQUESTS, name
        assert after.ns[name] > before.ns[name], name
    for name in ("cache_hit", "cache_miss"):
        assert after.counts[name] == before.counts[name], name
    in_server = sum(after.ns[name] - before.ns[name] for name in ("queue", *COMPUTE))
    assert in_server <= after.ns["success"] - before.ns["success"], "phases are parts of the whole"
