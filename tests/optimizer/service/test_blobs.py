"""Uploads and what jobs made, in a folder, in an object store in memory, and in a real server's."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.service.app import Parts, Settings, make_parts
from optimizer.service.auth import LOCAL
from optimizer.service.blobs import Blobs
from optimizer.service.object_store import StoreUnavailable, without_credentials
from optimizer.service.status import status_of
from optimizer.service.uploads import OffsetWrong, UploadRefused
from tests.optimizer.service.s3 import S3Server, an_s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with an_s3_server() as started:
        yield started


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    server.use(monkeypatch, tmp_path)
    return server


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "blobs")
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    s3: S3Server = request.getfixturevalue("s3")
    return f"s3://{s3.bucket()}/some/prefix"


def test_only_what_counts_of_a_job_is_kept(url: str, tmp_path: Path) -> None:
    blobs = Blobs(url)
    made = tmp_path / "made"
    (made / "versions").mkdir(parents=True)
    (made / "versions" / "model.onnx").write_bytes(b"model")
    for job_id, claim in (("job", "lost"), ("job", "counts"), ("job", "later"), ("other", "lost")):
        blobs.store(job_id, claim, made)
    for _ in range(2):
        blobs.keep_only("job", "counts")
        assert list(blobs.files("job", "counts", "versions")) == ["model.onnx"]
        assert blobs.files("job", "lost", "versions") == {}
        assert blobs.files("job", "later", "versions") == {}
        assert list(blobs.files("other", "lost", "versions")) == ["model.onnx"]
    (path,) = blobs.files("job", "counts", "versions").values()
    blobs.fetch(path, tmp_path / "fetched" / "model.onnx")
    assert (tmp_path / "fetched" / "model.onnx").read_bytes() == b"model"
    assert blobs.read("job", "counts", "versions/model.onnx", 5) == b"model"
    assert blobs.read("job", "counts", "versions/none", 5) is None
    with pytest.raises(OSError, match="over 4 bytes"):
        blobs.read("job", "counts", "versions/model.onnx", 4)
    blobs.delete_job("job")
    assert blobs.files("job", "counts", "versions") == {}
    assert list(blobs.files("other", "lost", "versions")) == ["model.onnx"]


@pytest.fixture
def stored(url: str, settings: Settings) -> Iterator[Parts]:
    parts = make_parts(replace(settings, blobs=url))
    yield parts
    parts.database.close()


def test_an_upload_goes_on_where_it_was_and_counts_by_its_digest(
    stored: Parts, settings: Settings, url: str, tmp_path: Path
) -> None:
    operations, content = stored.operations, bytes(range(250))
    digest = hashlib.sha256(content).hexdigest()
    upload = operations.begin_upload(LOCAL, "m.onnx", 250, digest)
    operations.append_upload(LOCAL, upload.id, 0, content[:100])
    # Another process goes on with it, as a client does that has lost its connection.
    other = make_parts(replace(settings, blobs=url))
    again = other.operations.begin_upload(LOCAL, "m.onnx", 250, digest)
    assert (again.id, again.received_bytes) == (upload.id, 100)
    with pytest.raises(OffsetWrong, match="want one for 100"):
        other.operations.append_upload(LOCAL, upload.id, 200, content[200:])
    other.operations.append_upload(LOCAL, upload.id, 100, content[100:200])
    other.operations.append_upload(LOCAL, upload.id, 100, content[100:200])  # sent again
    done = other.operations.append_upload(LOCAL, upload.id, 200, content[200:])
    other.database.close()
    assert done.complete
    assert stored.uploads.fetch(upload.id, tmp_path / "inputs").read_bytes() == content
    operations.delete_upload(LOCAL, upload.id)
    with pytest.raises((OSError, StoreUnavailable)):
        list(stored.blobs.parts(upload.id, 250))


def test_an_upload_with_another_digest_leaves_nothing(stored: Parts) -> None:
    operations = stored.operations
    upload = operations.begin_upload(LOCAL, "m.onnx", 5, "0" * 64)
    with pytest.raises(UploadRefused, match="the upload is deleted"):
        operations.append_upload(LOCAL, upload.id, 0, b"other")
    with pytest.raises(FileNotFoundError):
        list(stored.blobs.parts(upload.id, 5))


def test_what_was_changed_in_the_store_isnt_taken(
    s3: S3Server, settings: Settings, tmp_path: Path
) -> None:
    bucket = s3.bucket()
    parts = make_parts(replace(settings, blobs=f"s3://{bucket}"))
    digest = hashlib.sha256(b"content").hexdigest()
    upload = parts.operations.begin_upload(LOCAL, "m.onnx", 7, digest)
    parts.operations.append_upload(LOCAL, upload.id, 0, b"content")
    (key,) = s3.objects(bucket)
    s3.client().put_object(Bucket=bucket, Key=key, Body=b"CONTENT")
    with pytest.raises(OSError, match="isn't what was uploaded"):
        parts.uploads.fetch(upload.id, tmp_path / "inputs")
    s3.client().delete_object(Bucket=bucket, Key=key)
    with pytest.raises(FileNotFoundError):
        parts.uploads.fetch(upload.id, tmp_path / "inputs")
    parts.database.close()


def test_a_service_doesnt_start_when_its_bucket_is_missing(
    s3: S3Server, settings: Settings
) -> None:
    with pytest.raises(StoreUnavailable, match=r"^s3://no-such-bucket/x: .*check the bucket"):
        make_parts(replace(settings, blobs="s3://no-such-bucket/x"))
    Blobs(f"s3://{s3.bucket()}").check()


def test_a_bucket_that_is_gone_is_no_missing_file(s3: S3Server, settings: Settings) -> None:
    bucket = s3.bucket()
    blobs = Blobs(f"s3://{bucket}")
    blobs.write_part("upload", 0, b"part")
    s3.client().delete_object(Bucket=bucket, Key=s3.objects(bucket)[0])
    s3.client().delete_bucket(Bucket=bucket)
    for call in (
        lambda: blobs.write_part("upload", 0, b"part"),
        lambda: list(blobs.parts("upload", 4)),
        lambda: blobs.files("job", "claim", "versions"),
    ):
        with pytest.raises(StoreUnavailable) as refused:
            call()
        assert status_of(refused.value).http == 503


def test_wrong_credentials_are_said_without_showing_them(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket()
    with s3.guarded():
        Blobs(f"s3://{bucket}").check()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-s3cr3t")
        with pytest.raises(StoreUnavailable, match="check the bucket, AWS_ENDPOINT_URL") as wrong:
            Blobs(f"s3://{bucket}").check()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGKEY")
        with pytest.raises(StoreUnavailable) as unknown:
            Blobs(f"s3://{bucket}").check()
    for error in (wrong.value, unknown.value):
        assert not {"wr0ng-s3cr3t", "AKIAWRONGKEY", s3.key} & set(str(error).split())
        assert "wr0ng" not in str(error)
        assert "AKIA" not in str(error)


def test_a_server_that_doesnt_answer_is_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        Blobs("s3://bucket").check()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        pytest.param("s3://", "with a bucket", id="no bucket"),
        pytest.param("zip::s3://bucket/a.zip", "want one address", id="a chain"),
        pytest.param("gopher://bucket", "gopher", id="an unknown protocol"),
    ],
)
def test_an_address_that_cant_be_used_is_refused(address: str, said: str) -> None:
    with pytest.raises(StoreUnavailable, match=said):
        Blobs(address)


def test_addresses_are_shown_without_credentials() -> None:
    assert without_credentials("ftp://me:s3cr3t@host/p?token=x") == "ftp://host/p"
    assert without_credentials("/a/folder") == "/a/folder"
