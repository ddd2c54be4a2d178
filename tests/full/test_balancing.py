"""What Kubernetes does with pods, done with servers here: one ends, several share the calls."""

import re
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from tests.k8s.kustomizations import K8S
from tests.k8s.resolved import resolved
from tests.k8s.test_manifests import option, server
from tests.serve import onnx_models
from tests.serve.running_server import (
    PATIENCE_S,
    RunningServer,
    ask,
    channel_to,
    connect,
    method,
    running,
)
from tests.serve.under_load import INFER, LINEAR, infer_message

pytestmark = [pytest.mark.full, pytest.mark.alone]
PAUSE_S = 0.01
COUNT = re.compile(rb'^trimserve_request_duration_seconds_count\{.*code="ok".*\} (\d+)', re.M)


class Traffic(threading.Thread):
    """Requests to the address that the balancer names, one after another, until `is_over`."""

    def __init__(self, serving: list[RunningServer], is_over: threading.Event) -> None:
        super().__init__()
        self.serving, self.is_over = serving, is_over
        self.failures: list[str] = []
        self.n_answered = 0


class RestTraffic(Traffic):
    """Keeps a connection, though the balancer has looked away, until the server asks to leave."""

    def run(self) -> None:
        rest = connect(self.serving[0].http_port)
        while not self.is_over.wait(PAUSE_S):
            try:
                answer = ask(rest, "POST", INFER, LINEAR)
            except OSError as error:
                self.failures.append(repr(error))
                rest = connect(self.serving[0].http_port)
                continue
            if answer.status != 200:
                self.failures.append(str(answer.body))
            self.n_answered += 1
            if answer.headers["connection"] == "close":
                rest.close()
                rest = connect(self.serving[0].http_port)
        rest.close()


class GrpcTraffic(Traffic):
    """A channel to one pod, and a new one when the balancer names another."""

    def run(self) -> None:
        while not self.is_over.is_set():
            pod = self.serving[0]
            with channel_to(pod.grpc_port) as channel:
                infer = method(channel, "ModelInfer")
                while self.serving[0] is pod and not self.is_over.wait(PAUSE_S):
                    try:
                        infer(infer_message(), timeout=PATIENCE_S)
                        self.n_answered += 1
                    except grpc.RpcError as error:
                        self.failures.append(f"{error.code()}: {error.details()}")


def test_no_request_fails_when_a_pod_ends_with_the_manifests_timings(tmp_path: Path) -> None:
    """The balancer looks away a second before the pod is told to end; kept connections stay."""
    pod, container = server(resolved(K8S / "overlays/cpu"))
    sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = [
        f"{name}={option(container, name)}" for name in ("--drain-delay-s", "--drain-timeout-s")
    ]
    model = ["--model", str(onnx_models.linear(tmp_path / "linear.onnx"))]
    with (
        running(tmp_path / "old", *model, *drain) as old,
        running(tmp_path / "new", *model, *drain) as new,
    ):
        serving, is_over = [old], threading.Event()
        traffic: list[Traffic] = [RestTraffic(serving, is_over) for _ in range(4)]
        traffic += [GrpcTraffic(serving, is_over) for _ in range(4)]
        for one in traffic:
            one.start()
        time.sleep(sleep_s - 1)
        serving[0] = new
        time.sleep(1)
        began_s = time.monotonic()
        old.terminate()
        assert old.wait() == 0
        left_s = pod["terminationGracePeriodSeconds"] - sleep_s
        assert time.monotonic() - began_s < left_s
        time.sleep(1)
        is_over.set()
        for one in traffic:
            one.join(PATIENCE_S)
    assert [one.failures for one in traffic] == [[]] * len(traffic)
    assert min(one.n_answered for one in traffic) > 0


def n_answered(host: str, port: int) -> int:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=PATIENCE_S) as answer:
        return sum(int(one) for one in COUNT.findall(answer.read()))


def test_round_robin_spreads_calls_evenly_over_three_addresses(tmp_path: Path) -> None:
    model = ["--model", str(onnx_models.linear(tmp_path / "linear.onnx"))]
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    with ExitStack() as stack:
        pods = {
            host: stack.enter_context(running(tmp_path / host, *model, f"--host={host}"))
            for host in hosts
        }
        addresses = ",".join(f"{host}:{one.grpc_port}" for host, one in pods.items())
        policy = [("grpc.lb_policy_name", "round_robin"), ("grpc.use_local_subchannel_pool", 1)]
        channel = stack.enter_context(grpc.insecure_channel(f"ipv4:{addresses}", policy))
        infer = method(channel, "ModelInfer")

        def counts() -> list[int]:
            return [n_answered(host, one.metrics_port) for host, one in pods.items()]

        deadline_s = time.monotonic() + PATIENCE_S
        while not all(counts()):  # until the channel is connected to each
            assert time.monotonic() < deadline_s
            infer(infer_message(), timeout=PATIENCE_S)
        before = counts()
        for _ in range(300):
            infer(infer_message(), timeout=PATIENCE_S)
        shares = [after - was for after, was in zip(counts(), before, strict=True)]
    assert sum(shares) == 300
    assert all(90 <= share <= 110 for share in shares), shares
