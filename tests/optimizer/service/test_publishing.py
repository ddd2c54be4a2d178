"""Publishing that is interrupted, or asked for again."""

import shutil
from pathlib import Path

import pytest
from sqlalchemy import update

from optimizer.service import schema
from optimizer.service.app import Parts
from optimizer.service.auth import LOCAL
from optimizer.service.ledger import Submission
from optimizer.service.publishing import LOCK, Publication, alone
from optimizer.service.repeats import KeyReused
from serve.artifact import MANIFEST, read_manifest, verify_files
from tests.optimizer.service.told import succeed, taken
from tests.optimizer.study_result import met

TRITON = "config.pbtxt"


@pytest.fixture
def job_id(parts: Parts) -> str:
    """Of a job that has found something."""
    job, _ = parts.ledger.submit(Submission("me", "m", {"spec": {}}))
    succeed(parts, taken(parts, job.id), met())
    return job.id


def interrupted(parts: Parts, publication: Publication) -> None:
    """As if its process had died a while ago."""
    with parts.database.writing() as connection:
        connection.execute(update(schema.publications).values(state="writing", updated_s=1.0))


def whole(folder: Path) -> None:
    verify_files(folder, read_manifest(folder))


def test_the_same_key_publishes_once(parts: Parts, job_id: str) -> None:
    operations = parts.operations
    first = operations.publish(LOCAL, job_id, "prod", key="k")
    again = operations.publish(LOCAL, job_id, "prod", key="k")
    assert (again.id, again.version, again.state) == (first.id, "1", "done")
    with pytest.raises(KeyReused):
        operations.publish(LOCAL, job_id, "prod", "other", key="k")
    assert operations.publish(LOCAL, job_id, "prod").version == "2"
    audited = [one.action for one in operations.audit(LOCAL, None, 10)]
    assert audited.count("publish") == 2


def test_a_publication_is_finished_from_wherever_its_process_died(
    parts: Parts, job_id: str, tmp_path: Path
) -> None:
    operations = parts.operations
    done = operations.publish(LOCAL, job_id, "prod")
    model = tmp_path / "prod" / done.model
    config = (model / TRITON).read_bytes()
    for left in ([], ["model.onnx"], ["model.onnx", "golden.npz", MANIFEST]):
        whole(model / "1")
        for path in (model / "1").iterdir():
            if path.name not in left:
                path.unlink()
        (model / TRITON).unlink()
        interrupted(parts, done)
        operations.sweep(None)
        assert operations.publisher.get(done.id).state == "done"
        whole(model / "1")
        assert (model / TRITON).read_bytes() == config


def test_a_publication_that_another_process_writes_is_left_to_it(
    parts: Parts, job_id: str, tmp_path: Path
) -> None:
    operations = parts.operations
    done = operations.publish(LOCAL, job_id, "prod")
    model = tmp_path / "prod" / done.model
    shutil.rmtree(model / "1")
    interrupted(parts, done)
    with alone(model):
        operations.sweep(None)
        assert operations.publisher.get(done.id).state == "writing"
        assert not (model / "1").exists()
    interrupted(parts, done)
    operations.sweep(None)
    whole(model / "1")
    assert (model / LOCK).exists()
