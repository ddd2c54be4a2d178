"""The service by its commands: a job whose worker is killed, published and load-tested, and traced
from one end to the other."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from optimizer.client import Client
from optimizer.service import jobs_pb2 as pb
from serve.artifact import read_manifest
from tests.full.traces import receiver

pytestmark = [pytest.mark.full, pytest.mark.alone]

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
SLO: dict[str, Any] = {
    "apiVersion": "trimserve/v1",
    "kind": "SLO",
    "name": "loose",
    "latency": {"quantile": 0.9, "threshold_ms": 2000},
    "workload": {"rate_per_s": 40},
    "success_ratio": 0.9,
    "window_s": 10,
    "accuracy": {"max_drop_points": 5},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model.py", "train.py", "spec.yaml"):
        shutil.copy(DIGITS / name, tmp_path)
    (tmp_path / "slo.yaml").write_text(json.dumps(SLO))
    spec = (tmp_path / "spec.yaml").read_text()
    (tmp_path / "spec.yaml").write_text(spec.replace("trials: 12", "trials: 4"))
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True, timeout=300)
    return tmp_path


@contextlib.contextmanager
def a_service(folder: Path, **variables: str) -> Iterator[dict[str, int]]:
    command = [
        sys.executable, "-m", "trimserve", "service", "--data", "service", "--port", "0",
        "--repository", f"prod={folder / 'prod'}", "--allow-factory", "model:build",
    ]  # fmt: skip
    environ = {
        **os.environ,
        **variables,
        "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=log
        )
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            process.stdout.close()


def worker_of(folder: Path) -> psutil.Process:
    return next(
        one
        for one in psutil.process_iter(["cmdline"])
        if "worker" in (one.info["cmdline"] or [])
        and str(folder / "prod") in str(one.info["cmdline"])
    )


def test_a_job_outlives_its_worker_and_is_published_and_load_tested(folder: Path) -> None:
    with receiver() as traces:
        told = lived_through(folder, {"OTEL_EXPORTER_OTLP_ENDPOINT": traces.url})
    (submitted,) = (
        span
        for _, span in traces.spans
        if span.name == "submit job" and told in {one.value.string_value for one in span.attributes}
    )
    names = traces.of(submitted.trace_id)
    # Of all its processes; the worker that was killed has taken its last spans with it.
    assert names["POST /v1/jobs"] == names["publish version"] == "trimserve-service"
    of_worker = {"run job", "claim job", "run process", "study", "trial", "timed", "store files",
                 "apply compilation", "load test"}  # fmt: skip
    assert of_worker <= names.keys(), sorted(names)
    assert {names[name] for name in of_worker} == {"trimserve-worker"}
    assert any(name.startswith("measure ") for name in names)


def lived_through(folder: Path, variables: dict[str, str]) -> str:
    """The job's id."""
    with a_service(folder, **variables) as ports:
        url = f"http://127.0.0.1:{ports['http_port']}"
        submitted = subprocess.run(
            [sys.executable, "-m", "trimserve", "jobs", "submit", "spec.yaml", "--no-verify",
             "--url", url],
            cwd=folder, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        job_id = submitted.stdout.strip()
        with Client(url) as client:
            numbers = []
            for event in client.follow(job_id):
                numbers.append(event["number"])
                if event["kind"] == "trial_ended" and len(numbers) < 12:
                    worker = worker_of(folder)
                    children = worker.children(recursive=True)
                    worker.kill()
                    break
            _, alive = psutil.wait_procs(children, timeout=10)
            assert alive == []
            numbers += [event["number"] for event in client.follow(job_id, after=numbers[-1])]
            assert numbers == list(range(1, len(numbers) + 1))
            job = client.job(job_id)["job"]
            assert (job["state"], job["outcome"], job["attempt"]) == ("succeeded", "unverified", 2)
            assert json.loads(client.result(job_id))["outcome"] == "unverified"
            assert client.report(job_id).startswith(b"<!doctype html>")

            published = client.publish(job_id, "prod")
            manifest = read_manifest(folder / "prod" / "digits" / published["version"])
            assert manifest.slo is not None
            assert client.publish(job_id, "prod", "other")["model"] == "other"

            test = client.load_test(published["id"])
            ended = client.wait(test["id"])
            assert (ended["state"], ended["outcome"]) == ("succeeded", "met"), client.logs(
                test["id"]
            )

            again = client.clone(job_id, {"budget": {"trials": 200}})
            for event in client.follow(again["id"]):
                if event["kind"] == "trial_ended":
                    break
            asked_s = time.monotonic()
            client.cancel(again["id"])
            assert client.wait(again["id"])["state"] == "cancelled"
            assert time.monotonic() - asked_s < 30.0

        with grpc.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
            follow = channel.unary_stream(
                "/trimserve.jobs.v1.Jobs/Follow",
                request_serializer=pb.FollowRequest.SerializeToString,
                response_deserializer=pb.Event.FromString,
            )
            told = list(follow(pb.FollowRequest(id=job_id), timeout=60))
            assert [event.number for event in told] == numbers
            get = channel.unary_unary(
                "/trimserve.jobs.v1.Jobs/Get",
                request_serializer=pb.JobRequest.SerializeToString,
                response_deserializer=pb.Details.FromString,
            )
            assert get(pb.JobRequest(id=job_id), timeout=30).job.outcome == "unverified"
            with pytest.raises(grpc.RpcError) as refused:
                get(pb.JobRequest(id="none"), timeout=30)
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    return job_id
