"""Load tests of versions whose files can carry code."""

import os
import sys
from pathlib import Path

import pytest

from optimizer.service.app import Parts, Settings
from optimizer.service.auth import LOCAL
from optimizer.service.blobs import Blobs
from optimizer.service.jobs import Job, Kind, State
from optimizer.service.publishing import digest_of
from optimizer.service.records import Submission
from optimizer.service.worker import Worker, WorkerOptions
from serve.artifact import Batching, Manifest, read_manifest, write_version
from serve.engines import EngineSpec
from serve.engines.torch_archive import SIGNATURE_FILE
from tests.optimizer.service.conftest import SLO
from tests.optimizer.service.test_worker import OneJob
from tests.serve.torch_programs import SIGNATURE, write_program

pytestmark = pytest.mark.full


def load_tested(parts: Parts, settings: Settings, tmp_path: Path, digest: str | None) -> Job:
    """A job that load-tests a version in eager torch, which was published with that digest; None
    for the one that it has."""
    program = write_program(tmp_path)
    manifest = Manifest(
        "pair", "1", SIGNATURE, EngineSpec("torch", program.name), Batching(8), slo=SLO
    )
    files = {name: tmp_path / name for name in (program.name, SIGNATURE_FILE)}
    folder = write_version(tmp_path / "prod", manifest, files)
    asked = {
        "repository": "prod", "model": "pair", "version": "1", "slo": SLO,
        "digest": digest or digest_of(read_manifest(folder)),
    }  # fmt: skip
    job, _ = parts.ledger.submit(Submission("me", "m", asked, kind=Kind.LOAD_TEST))
    metrics = OneJob()
    options = WorkerOptions(
        "w", tmp_path / "work", str(tmp_path / "store.sqlite"),
        repositories={"prod": tmp_path / "prod"},
    )  # fmt: skip
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    Worker(
        parts.ledger, parts.uploads, Blobs(settings.blobs), settings.policy.stores, options,
        environ, metrics,
    ).run(metrics.stop)  # fmt: skip
    return parts.ledger.job(job.id)


def test_code_is_load_tested_when_a_job_has_published_it(
    parts: Parts, settings: Settings, tmp_path: Path
) -> None:
    ended = load_tested(parts, settings, tmp_path, None)
    assert ended.state is State.SUCCEEDED, ended.error
    assert parts.operations.result(LOCAL, ended.id)


def test_code_isnt_run_when_no_job_has_published_it(
    parts: Parts, settings: Settings, tmp_path: Path
) -> None:
    ended = load_tested(parts, settings, tmp_path, "0" * 64)
    assert ended.state is State.FAILED
    assert "torch files can carry code, and these aren't those that a job" in str(ended.error)
