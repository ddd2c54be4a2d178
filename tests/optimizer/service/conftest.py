"""A service's parts on a file of its own."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optimizer.service.addresses import Stores
from optimizer.service.app import Parts, Settings, make_parts
from optimizer.service.auth import LOCAL
from optimizer.service.operations import Operations, Quotas
from optimizer.service.submitted import Policy
from optimizer.service.uploads import Limits

SLO: dict[str, Any] = {
    "apiVersion": "trimserve/v1",
    "kind": "SLO",
    "name": "tiny",
    "latency": {"quantile": 0.9, "threshold_ms": 50},
    "workload": {"arrivals": "poisson", "rate_per_s": 10},
    "success_ratio": 0.99,
    "window_s": 10,
}


def a_spec(onnx: str, data: str, **values: Any) -> dict[str, Any]:
    return {
        "apiVersion": "trimserve/v1",
        "kind": "Optimization",
        "name": "tiny",
        "slo": SLO,
        "model": {"onnx": onnx},
        "data": {"format": "numpy", "validation": {"path": data}, "test": {"path": data}},
        "budget": {"wall_clock_s": 60, "trials": 2},
        "target": {"price_per_core_hour": 0.04},
        **values,
    }


def uploaded(operations: Operations, name: str, content: bytes = b"content") -> str:
    digest = hashlib.sha256(content).hexdigest()
    upload = operations.begin_upload(LOCAL, name, len(content), digest)
    if not upload.complete:
        upload = operations.append_upload(LOCAL, upload.id, 0, content)
    assert upload.complete
    return f"upload:{upload.id}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "allowed").mkdir()
    return Settings(
        database=str(tmp_path / "jobs.sqlite"),
        blobs=str(tmp_path / "blobs"),
        scratch=tmp_path / "scratch",
        repositories={"prod": tmp_path / "prod"},
        policy=Policy(
            Stores([f"file://{tmp_path}/allowed", "s3://models/ok", "https://data.example.com/x"]),
            ("models:*",),
            max_wall_clock_s=600,
        ),
        quotas=Quotas(open_jobs=3),
        upload_limits=Limits(file_bytes=1_000, owner_bytes=1_500, chunk_bytes=100),
    )


@pytest.fixture
def parts(settings: Settings) -> Iterator[Parts]:
    made = make_parts(settings)
    yield made
    made.database.close()


@pytest.fixture
def spec(parts: Parts) -> dict[str, Any]:
    operations = parts.operations
    return a_spec(uploaded(operations, "m.onnx"), uploaded(operations, "d.npz"))
