"""Publishing that is interrupted, or asked for again, to a folder and to an object store."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy import update

from optimizer.service import schema
from optimizer.service.app import Parts, Settings, make_parts
from optimizer.service.auth import LOCAL
from optimizer.service.object_store import StoreUnavailable
from optimizer.service.publishing import Publication
from optimizer.service.records import Submission
from optimizer.service.repeats import KeyReused
from optimizer.service.repositories import LOCK, FolderRepository, ObjectRepository
from serve.artifact import GOLDEN, MANIFEST, read_manifest, verify_files
from serve.errors import ArtifactInvalid
from serve.storage import open_storage
from tests.optimizer.service.s3 import S3Server, an_s3_server
from tests.optimizer.service.told import succeed, taken
from tests.optimizer.study_result import met
from tests.serve.test_artifact import MANIFEST_OF_A

TRITON = "config.pbtxt"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with an_s3_server() as started:
        yield started


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    server.use(monkeypatch, tmp_path)
    return server.bucket()


@pytest.fixture
def job_id(parts: Parts) -> str:
    return found_something(parts)


def found_something(parts: Parts) -> str:
    """The id of a job that has."""
    job, _ = parts.ledger.submit(Submission("me", "m", {"spec": {}}))
    succeed(parts, taken(parts, job.id), met())
    return job.id


def interrupted(parts: Parts, publication: Publication) -> None:
    """As if its process had died a while ago."""
    with parts.database.writing() as connection:
        connection.execute(update(schema.publications).values(state="writing", updated_s=1.0))


def whole(folder: Path) -> None:
    verify_files(folder, read_manifest(folder))


def served(url: str, model: str, tmp_path: Path) -> dict[str, Path]:
    """What a server finds and fetches there: version -> folder, compared with its digests."""
    storage = open_storage(url, tmp_path / "cache")
    listing = storage.scan().get(model)
    found = {}
    for version in listing.versions if listing is not None else ():
        found[version.version] = storage.fetch(model, version)
        whole(found[version.version])
    return found


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
    with FolderRepository(tmp_path / "prod").alone(done.model):
        operations.sweep(None)
        assert operations.publisher.get(done.id).state == "writing"
        assert not (model / "1").exists()
    interrupted(parts, done)
    operations.sweep(None)
    whole(model / "1")
    assert (model / LOCK).exists()


@pytest.mark.full
def test_a_bucket_gets_what_a_folder_gets_and_a_server_reads_it(
    settings: Settings, server: S3Server, bucket: str, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/models"
    repositories: dict[str, Path | str] = {"prod": url, "folder": tmp_path / "prod"}
    parts = make_parts(replace(settings, repositories=repositories))
    operations, job_id = parts.operations, found_something(parts)
    first = operations.publish(LOCAL, job_id, "prod", key="k")
    assert operations.publish(LOCAL, job_id, "prod", key="k").id == first.id
    with ThreadPoolExecutor(3) as threads:
        more = list(threads.map(lambda _n: operations.publish(LOCAL, job_id, "prod"), range(3)))
    assert {one.state for one in (first, *more)} == {"done"}
    found = served(url, first.model, tmp_path)
    assert sorted(found) == sorted(one.version for one in (first, *more)) == ["1", "2", "3", "4"]

    local = tmp_path / "prod" / operations.publish(LOCAL, job_id, "folder").model
    assert {path.name for path in found["1"].iterdir()} == {p.name for p in (local / "1").iterdir()}
    assert (found["1"] / MANIFEST).read_bytes() == (local / "1" / MANIFEST).read_bytes()
    config = server.client().get_object(Bucket=bucket, Key=f"models/{first.model}/{TRITON}")
    assert b"versions: [ 4 ]" in config["Body"].read()

    test, _ = operations.load_test(LOCAL, first.id)
    assert parts.ledger.spec(test.id)["repository"] == "prod"
    copied = ObjectRepository(url).local(first.model, "1", tmp_path / "copy")
    whole(copied / first.model / "1")
    parts.database.close()


@pytest.mark.full
def test_a_publication_to_a_bucket_is_finished_from_wherever_its_process_died(
    settings: Settings, server: S3Server, bucket: str, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/models"
    parts = make_parts(replace(settings, repositories={"prod": url}))
    operations = parts.operations
    done = operations.publish(LOCAL, found_something(parts), "prod")
    for left in ([], [".publishing", GOLDEN], [".publishing", GOLDEN, "model.onnx", MANIFEST]):
        for key in server.objects(bucket):
            if key.rpartition("/")[2] not in left:
                server.client().delete_object(Bucket=bucket, Key=key)
        interrupted(parts, done)
        operations.sweep(None)
        assert operations.publisher.get(done.id).state == "done"
        assert list(served(url, done.model, tmp_path)) == ["1"]
    parts.database.close()


def test_a_service_doesnt_start_when_its_repository_cant_be_written(
    settings: Settings, bucket: str
) -> None:
    with pytest.raises(StoreUnavailable, match="s3://no-such-bucket/models"):
        make_parts(replace(settings, repositories={"prod": "s3://no-such-bucket/models"}))


class Failing(MemoryFileSystem):
    """Takes `n_left` objects more."""

    protocol = "failing"
    n_left = 10**6

    def _count(self) -> None:
        Failing.n_left -= 1
        if Failing.n_left < 0:
            raise OSError("the network is gone")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        self._count()
        super().pipe_file(path, value, mode, **more)

    def put_file(self, lpath: str, rpath: str, *more: Any, **options: Any) -> None:
        self._count()
        super().put_file(lpath, rpath, *more, **options)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name in ("model.onnx", GOLDEN):
        (tmp_path / name).write_bytes(name.encode())
    return {name: tmp_path / name for name in ("model.onnx", GOLDEN)}


def test_a_reader_sees_no_version_until_all_of_it_is_there(
    files: dict[str, Path], tmp_path: Path
) -> None:
    fsspec.register_implementation("failing", Failing, clobber=True)
    url = f"failing://{tmp_path.name}/models"
    repository, model = ObjectRepository(url), MANIFEST_OF_A.model
    fsspec.filesystem("failing").mkdirs(url)
    for n in range(4):  # the marker, the golden input, the model, the manifest
        Failing.n_left = n
        with pytest.raises(StoreUnavailable, match="the network is gone"):
            repository.write("me", MANIFEST_OF_A, files)
        assert served(url, model, tmp_path) == {}
        assert repository.manifest(model, MANIFEST_OF_A.version) is None
        assert repository.newest(model) is None
    Failing.n_left = 10**6
    repository.write("me", MANIFEST_OF_A, files)
    assert list(served(url, model, tmp_path)) == [MANIFEST_OF_A.version]
    assert repository.newest(model) == MANIFEST_OF_A.version


def test_two_services_cant_mix_in_one_version(
    bucket: str, files: dict[str, Path], tmp_path: Path
) -> None:
    url, model = f"s3://{bucket}/models", MANIFEST_OF_A.model
    ours, theirs = ObjectRepository(url), ObjectRepository(url)
    ours.write("ours", MANIFEST_OF_A, files)
    ours.write("ours", MANIFEST_OF_A, files)  # as who finishes it does
    other = tmp_path / "other"
    other.write_bytes(b"another model")
    with pytest.raises(ArtifactInvalid, match="another service publishes this version"):
        theirs.write("theirs", MANIFEST_OF_A, files | {"model.onnx": other})
    with pytest.raises(ArtifactInvalid, match="versions are immutable"):
        ours.write("ours", replace(MANIFEST_OF_A, variant_id="another"), files)
    found = served(url, model, tmp_path)
    assert (found[MANIFEST_OF_A.version] / "model.onnx").read_bytes() == b"model.onnx"
    assert theirs.next_version(model) == str(int(MANIFEST_OF_A.version) + 1)
