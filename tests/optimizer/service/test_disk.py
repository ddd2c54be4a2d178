"""How much disk jobs may use, while they run and afterwards."""

import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from optimizer.service.app import Parts, Settings, make_service
from optimizer.service.auth import LOCAL
from optimizer.service.child import Order
from optimizer.service.disk import Usage, folder_bytes, usage
from optimizer.service.operations import Quotas
from optimizer.service.records import StorageExceeded, Submission
from optimizer.service.running import ChildLimits, Running
from optimizer.service.status import status_of
from optimizer.store import Store
from optimizer.store.artifacts import KEPT
from tests.optimizer.service.told import succeed, taken
from tests.optimizer.stored import variant
from tests.optimizer.study_result import met


def test_usage_counts_files_once_and_artifacts_by_their_digests(tmp_path: Path) -> None:
    made = tmp_path / "out" / "versions"
    made.mkdir(parents=True)
    (made / "model.onnx").write_bytes(b"x" * 100)
    (made / "linked").symlink_to(made / "model.onnx")
    report = tmp_path / "kept"
    report.write_text("a 1000\nb 10\na 1000\nnonsense\nc -5\nd ٣\n")
    found = usage((tmp_path / "out", tmp_path / "none"), report)
    assert found == Usage(100, 1_010)
    assert folder_bytes(tmp_path / "out") == 100
    assert str(found) == "1110 bytes of disk (100 of files, 1010 of artifacts)"
    assert usage((), tmp_path / "none") == Usage(0, 0)


def test_artifacts_that_are_kept_anew_are_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "kept"
    with Store(tmp_path / "store.sqlite") as store:
        variant(store, "before", b"1234")
        monkeypatch.setenv(KEPT, str(report))
        variant(store, "known", b"1234")
        variant(store, "one", b"12345")
        variant(store, "another", b"1234567")
    assert usage((), report) == Usage(0, 12)


def test_quota_of_stored_files_is_kept_at_submission_and_at_the_end(
    parts: Parts, settings: Settings, spec: dict[str, Any]
) -> None:
    ledger = parts.ledger
    parts.operations.quotas = Quotas(open_jobs=9, stored_bytes=1_000)
    first, _ = parts.operations.submit(LOCAL, spec)
    claim = taken(parts, first.id)
    ledger.keep(first.id, claim.lease.token, 900, 1_000)
    ledger.keep(first.id, claim.lease.token, 800, 1_000)  # again, of the same job
    succeed(parts, claim, met())
    second, _ = parts.operations.submit(LOCAL, spec)
    claim = taken(parts, second.id)
    with pytest.raises(StorageExceeded, match=r"got 201 bytes beside the 800 .* at most 1000"):
        ledger.keep(second.id, claim.lease.token, 201, 1_000)
    ledger.keep(second.id, claim.lease.token, 200, 1_000)
    with pytest.raises(StorageExceeded, match=r"got 1000 bytes, which is all .* at most 1000"):
        parts.operations.submit(LOCAL, spec)
    ledger.submit(Submission("you", "m", {}), max_stored_bytes=1_000)
    assert (ledger.stored_bytes(LOCAL.subject), ledger.stored_bytes("you")) == (1_000, 0)
    with TestClient(make_service(parts, settings), base_url="http://localhost") as client:
        refused = client.post("/v1/jobs", json={"spec": spec})
        assert refused.status_code == status_of(StorageExceeded(1, 0, 1)).http == 507
        overview = client.get("/v1/service").json()
        assert (overview["stored_bytes"], overview["max_stored_bytes"]) == (1_000, 1_000)
        metrics = client.get("/metrics").text
        assert 'trimserve_stored_bytes{kind="jobs"} 1000.0' in metrics
        assert 'trimserve_stored_bytes{kind="uploads"} 14.0' in metrics
        assert client.get(f"/v1/jobs/{first.id}").json()["job"]["stored_bytes"] == 800
        assert client.delete(f"/v1/jobs/{first.id}").status_code == 204
    assert ledger.stored_bytes() == 200
    parts.operations.submit(LOCAL, spec)


def test_a_child_is_ended_with_what_it_used_and_may_when_its_disk_is_full(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "big").write_bytes(b"x" * 5_000)
    order = Order("load_test", "no-slo", str(out), -1, -1)
    limits = ChildLimits(disk_bytes=4_999)
    child = Running(order, tmp_path / "order.json", limits, {"PATH": os.environ["PATH"]})
    try:
        assert child.broken_limit() == (
            "used 5000 bytes of disk (5000 of files, 0 of artifacts), allowed are 4999"
        )
        (tmp_path / "artifacts-kept").write_text("digest 7000\n")
        (out / "big").unlink()
        assert child.broken_disk_limit() == (
            "used 7000 bytes of disk (0 of files, 7000 of artifacts), allowed are 4999"
        )
    finally:
        child.stop()
