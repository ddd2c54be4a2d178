"""Storage: one contract for a local folder, memory:// and s3:// (a moto server on loopback)."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from uuid import uuid4

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from serve.artifact import MANIFEST, FileDigest, read_manifest, verify_files
from serve.engines import EngineSpec, Signature
from serve.errors import ArtifactInvalid, InvalidRequest
from serve.storage import Storage, open_storage
from serve.storage.cache import Cache
from serve.storage.digest import manifest_digest, parse_digest, version_digest
from serve.storage.listing import Limits, ModelListing, VersionListing, settled
from serve.storage.remote import DRIVERS, Network, RemoteStorage, without_credentials

IMPATIENT = Network(connect_timeout_s=0.5, read_timeout_s=5.0, n_attempts=1)
MODEL = b"weights" * 10
Open = Callable[..., Storage]


# --- places where a repository can lie


class Place(Protocol):
    """A repository that a test writes to, beside the storage that reads it."""

    url: str

    def put(self, name: str, content: bytes) -> None: ...
    def delete(self, name: str) -> None: ...


class Folder:
    def __init__(self, root: Path) -> None:
        self.url = str(root)
        root.mkdir()

    def put(self, name: str, content: bytes) -> None:
        path = Path(self.url, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def delete(self, name: str) -> None:
        path = Path(self.url, name)
        path.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()


class Memory:
    def __init__(self) -> None:
        self.url = f"memory://{uuid4().hex}/models"
        self.file_system = fsspec.filesystem("memory")
        self.file_system.mkdirs(self.url)

    def put(self, name: str, content: bytes) -> None:
        self.file_system.pipe_file(f"{self.url}/{name}", content)

    def delete(self, name: str) -> None:
        self.file_system.rm_file(f"{self.url}/{name}")


class Bucket:
    def __init__(self, endpoint: str) -> None:
        self.name = uuid4().hex
        self.url = f"s3://{self.name}/models"
        self.client = boto3.client("s3", endpoint_url=endpoint)
        self.client.create_bucket(Bucket=self.name)
        self.client.put_object(Bucket=self.name, Key="models/")  # an empty folder, as consoles do

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"models/{name}", Body=content)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=f"models/{name}")


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, which the environment names too, with credentials."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    return moto


def make_place(kind: str, request: pytest.FixtureRequest) -> Place:
    if kind == "a folder":
        return Folder(request.getfixturevalue("tmp_path") / "models")
    return Memory() if kind == "memory" else Bucket(request.getfixturevalue("s3"))


@pytest.fixture(params=["a folder", "memory", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    return make_place(request.param, request)


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> Place:
    return make_place(request.param, request)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """`open_storage` with a cache in the test's folder; closes what it opened."""
    with contextlib.ExitStack() as stack:

        def open_it(url: str | Path, **options: Any) -> Storage:
            storage = open_storage(
                url, **{"cache": tmp_path / "cache", "network": IMPATIENT, **options}
            )
            stack.callback(storage.close)
            return storage

        yield open_it


def manifest_of(model: str, version: str, files: Mapping[str, bytes]) -> bytes:
    digests = {
        name: FileDigest(hashlib.sha256(content).hexdigest(), len(content))
        for name, content in files.items()
    }
    # Parts that don't matter here are left to their defaults.
    return json.dumps(
        {
            "schema_version": 1,
            "model": model,
            "version": version,
            "signature": asdict(Signature((), ())),
            "engine": asdict(EngineSpec("onnxruntime", "model.onnx")),
            "batching": {},
            "files": {name: asdict(digest) for name, digest in digests.items()},
        }
    ).encode()


def publish(place: Place, model: str, version: str, files: Mapping[str, bytes]) -> bytes:
    """A version in trimserve's layout, the manifest last."""
    for name, content in files.items():
        place.put(f"{model}/{version}/{name}", content)
    manifest = manifest_of(model, version, files)
    place.put(f"{model}/{version}/{MANIFEST}", manifest)
    return manifest


def only_version(storage: Storage, model: str = "m") -> VersionListing:
    (version,) = storage.scan()[model].versions
    return version


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- finding


def test_scan_finds_both_layouts_when_they_lie_side_by_side(place: Place, opened: Open) -> None:
    publish(place, "ours", "2", {"model.onnx": MODEL})
    publish(place, "ours", "10", {"model.onnx": MODEL})
    place.put("theirs/1/model.onnx", MODEL)
    place.put("theirs/config.pbtxt", b'name: "theirs"\n')
    storage = opened(place.url)
    found = storage.scan()
    assert list(found) == ["ours", "theirs"]
    assert [(v.version, v.has_manifest) for v in found["ours"].versions] == [
        ("2", True), ("10", True)
    ]  # fmt: skip
    assert [(v.version, v.has_manifest) for v in found["theirs"].versions] == [("1", False)]
    assert (found["ours"].config, found["theirs"].config) == (None, 'name: "theirs"\n')
    assert storage.scan_model("theirs") == found["theirs"]
    assert storage.scan() == found


def test_scan_finds_nothing_when_the_repository_is_empty(place: Place, opened: Open) -> None:
    assert opened(place.url).scan() == {}


def test_scan_finds_a_model_without_versions_when_there_is_only_its_config(
    place: Place, opened: Open
) -> None:
    place.put("m/config.pbtxt", b"")
    assert opened(place.url).scan()["m"].versions == ()
    assert opened(place.url).scan()["m"].config == ""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("README.md", id="a file beside the models"),
        pytest.param(".hidden/1/model.onnx", id="a hidden model"),
        pytest.param("a model/1/model.onnx", id="a model with a space in its name"),
        pytest.param("m/0/model.onnx", id="version 0"),
        pytest.param("m/01/model.onnx", id="a version with a leading zero"),
        pytest.param("m/v1/model.onnx", id="a version that is no number"),
        pytest.param("m/1/.model.onnx.part", id="a hidden file"),
        pytest.param("m/1/.git/model.onnx", id="a file in a hidden folder"),
        pytest.param("m/1", id="a file named like a version"),
        pytest.param("m/release.json", id="a release without a model"),
        pytest.param("m/1/golden.npz", id="a write cut after its golden input"),
    ],
)
def test_scan_finds_no_model_when_there_is_only(place: Place, opened: Open, name: str) -> None:
    place.put(name, MODEL)
    storage = opened(place.url)
    assert storage.scan() == {}
    assert storage.scan_model(name.partition("/")[0]) is None


@pytest.mark.parametrize("name", ["missing", "", ".", "..", "../models", "m/1", "/etc", "*"])
def test_scan_model_finds_nothing_when_its_name_is(place: Place, opened: Open, name: str) -> None:
    place.put("m/1/model.onnx", MODEL)
    assert opened(place.url).scan_model(name) is None


def test_scan_skips_a_half_written_version_when_the_model_has_a_manifest_elsewhere(
    place: Place, opened: Open
) -> None:
    publish(place, "m", "1", {"model.onnx": MODEL})
    place.put("m/2/model.onnx", MODEL[:9])
    storage = opened(place.url)
    assert [v.version for v in storage.scan()["m"].versions] == ["1"]
    publish(place, "m", "2", {"model.onnx": MODEL})
    assert [v.version for v in storage.scan()["m"].versions] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"#" * 101, "over 100 bytes", id="it is too large"),
        pytest.param(b"\xff\xfe", "not UTF-8", id="it is no text"),
    ],
)
def test_scan_lists_the_problem_of_a_config_beside_the_others_when(
    place: Place, opened: Open, content: bytes, problem: str
) -> None:
    place.put("bad/config.pbtxt", content)
    place.put("bad/1/model.onnx", MODEL)
    place.put("good/1/model.onnx", MODEL)
    storage = opened(place.url, limits=Limits(max_config_bytes=100))
    found = storage.scan()
    assert problem in found["bad"].problem
    assert "bad/config.pbtxt" in found["bad"].problem
    assert not found["bad"].versions
    assert (found["good"].problem, len(found["good"].versions)) == ("", 1)
    assert storage.scan_model("bad") == found["bad"]


def test_scan_refuses_when_there_are_too_many_files(remote: Place, opened: Open) -> None:
    for number in range(6):
        remote.put(f"m/1/{number}", b"")
    with pytest.raises(ArtifactInvalid, match="holds over 3 files"):
        opened(remote.url, limits=Limits(max_files=3)).scan()


def test_scan_lists_the_problem_when_a_local_model_has_too_many_files(
    tmp_path: Path, opened: Open
) -> None:
    for name in ("big/1/a", "big/1/b", "small/1/a"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = opened(tmp_path / "models", limits=Limits(max_files=1)).scan()
    assert "holds over 1 files" in found["big"].problem
    assert not found["small"].problem


# --- polling


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        pytest.param(lambda p: p.put("m/1/model.onnx", MODEL + b"!"), {"version"},
                     id="a model file changes"),
        pytest.param(lambda p: p.put("m/1/model.onnx.data", b"!"), {"version"},
                     id="a model file appears"),
        pytest.param(lambda p: p.delete("m/1/data/weights"), {"version"}, id="a model file goes"),
        pytest.param(lambda p: p.put("m/config.pbtxt", b"max_batch_size: 8"), {"side"},
                     id="the config changes"),
        pytest.param(lambda p: p.put("m/labels.txt", b"dog\ncat\n"), {"side"},
                     id="labels change"),
        pytest.param(lambda p: p.delete("m/labels.txt"), {"side"}, id="labels go"),
        pytest.param(lambda p: p.put("m/release.json", b"{}"), set(), id="the release changes"),
        pytest.param(lambda p: p.put("m/1/.part", b"half"), set(), id="a hidden file appears"),
        pytest.param(lambda p: p.put("n/1/model.onnx", b""), set(), id="another model appears"),
    ],
)  # fmt: skip
def test_fingerprints_change_when(
    place: Place, opened: Open, change: Callable[[Place], None], changed: set[str]
) -> None:
    place.put("m/config.pbtxt", b"")
    place.put("m/labels.txt", b"cat")
    place.put("m/1/model.onnx", MODEL)
    place.put("m/1/data/weights", MODEL)
    storage = opened(place.url)
    before = storage.scan()["m"]
    change(place)
    after = storage.scan()["m"]
    different = {
        "version": before.versions[0].fingerprint != after.versions[0].fingerprint,
        "side": before.side_fingerprint != after.side_fingerprint,
    }
    assert {name for name, is_different in different.items() if is_different} == changed


def test_scan_sees_versions_come_and_go_when_it_polls(place: Place, opened: Open) -> None:
    storage = opened(place.url)
    publish(place, "m", "1", {"model.onnx": MODEL})
    assert [v.version for v in storage.scan()["m"].versions] == ["1"]
    publish(place, "m", "2", {"model.onnx": MODEL})
    publish(place, "n", "1", {"model.onnx": MODEL})
    assert [v.version for v in storage.scan()["m"].versions] == ["1", "2"]
    for name in (MANIFEST, "model.onnx"):
        place.delete(f"m/1/{name}")
        place.delete(f"n/1/{name}")
    found = storage.scan()
    assert [v.version for v in found["m"].versions] == ["2"]
    assert "n" not in found
    assert storage.scan_model("n") is None


def test_scan_reads_the_new_config_when_it_changed(place: Place, opened: Open) -> None:
    storage = opened(place.url)
    for text in ("first", "second one"):
        place.put("m/config.pbtxt", text.encode())
        assert storage.scan()["m"].config == text


TRITON = VersionListing("1", has_manifest=False, fingerprint="a")
CHANGED = replace(TRITON, fingerprint="b")
OURS = VersionListing("1", has_manifest=True, fingerprint="a")


@pytest.mark.parametrize(
    ("now", "before", "accepted", "want"),
    [
        pytest.param(TRITON, None, None, None, id="stays out when it is new"),
        pytest.param(TRITON, TRITON, None, TRITON, id="counts when it was the same before"),
        pytest.param(CHANGED, TRITON, TRITON, TRITON, id="stays the old one when it changes"),
        pytest.param(CHANGED, CHANGED, TRITON, CHANGED, id="is the new one when it has changed"),
        pytest.param(TRITON, CHANGED, None, None, id="stays out when it still changes"),
        pytest.param(OURS, None, None, OURS, id="counts at once when it has a manifest"),
        pytest.param(None, TRITON, TRITON, None, id="goes at once when it is removed"),
    ],
)
def test_settled_version(
    now: VersionListing | None,
    before: VersionListing | None,
    accepted: VersionListing | None,
    want: VersionListing | None,
) -> None:
    def listing(version: VersionListing | None) -> dict[str, ModelListing]:
        return {"m": ModelListing("m", versions=(version,) if version else ())}

    assert settled(listing(now), listing(before), listing(accepted)) == listing(want)


def test_settled_keeps_what_was_accepted_when_the_model_cannot_be_read() -> None:
    good = {"m": ModelListing("m", "config", (TRITON,), "side")}
    bad = {"m": ModelListing("m", problem="no permission")}
    kept = settled(bad, good, good)
    assert kept == {"m": replace(good["m"], problem="no permission")}
    assert settled(good, bad, kept) == good
    assert settled(bad, {}, {}) == bad
    assert settled({}, good, good) == {}


# --- fetching


def test_fetch_gives_the_version_when_it_has_a_manifest(place: Place, opened: Open) -> None:
    files = {"model.onnx": MODEL, "data/weights.bin": b"", "golden.npz": b"g"}
    manifest = publish(place, "m", "3", files)
    storage = opened(place.url)
    folder = storage.fetch("m", only_version(storage))
    assert contents(folder) == {**files, MANIFEST: manifest}
    verify_files(folder, read_manifest(folder))


def test_fetch_gives_the_version_when_it_is_tritons(place: Place, opened: Open) -> None:
    files = {"model.onnx/model.onnx": MODEL, "model.onnx/weights.bin": MODEL * 9, "empty": b""}
    for name, content in files.items():
        place.put(f"m/1/{name}", content)
    place.put("m/config.pbtxt", b"")
    storage = opened(place.url)
    assert contents(storage.fetch("m", only_version(storage))) == files


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(lambda p: p.put("m/1/model.onnx", MODEL + b"!"), r"71 bytes, .* says 70",
                     id="a file is too long"),
        pytest.param(lambda p: p.put("m/1/model.onnx", MODEL[:-1]), r"69 bytes, .* says 70",
                     id="a file is cut"),
        pytest.param(lambda p: p.delete("m/1/model.onnx"), r"model\.onnx: missing",
                     id="a file is missing"),
        pytest.param(
            lambda p: p.put("m/1/manifest.json", manifest_of("m", "1", {"../../n/x": b""})),
            "leads out", id="a file's name leads out of the folder"),
        pytest.param(
            lambda p: p.put("m/1/manifest.json", manifest_of("m", "1", {"/etc/x": b""})),
            "leads out", id="a file's name is absolute"),
        pytest.param(lambda p: p.put("m/1/manifest.json", b"{"), "not valid JSON",
                     id="the manifest is cut"),
        pytest.param(lambda p: p.put("m/1/manifest.json", b""), "not valid JSON",
                     id="the manifest is empty"),
        pytest.param(lambda p: p.put("m/1/manifest.json", b" " * 4_000_001), "over 4000000 bytes",
                     id="the manifest is too large"),
    ],
)  # fmt: skip
def test_fetch_refuses_when(
    place: Place,
    opened: Open,
    tmp_path: Path,
    change: Callable[[Place], None],
    problem: str,
) -> None:
    publish(place, "m", "1", {"model.onnx": MODEL})
    change(place)
    storage = opened(place.url)
    with pytest.raises(ArtifactInvalid, match=problem):
        storage.fetch("m", only_version(storage))
    assert contents(tmp_path / "cache") == {}


@pytest.mark.parametrize("layout", ["trimserve's", "Triton's"])
def test_fetch_refuses_when_the_version_changed_since_it_was_listed(
    place: Place, opened: Open, layout: str
) -> None:
    place.put("m/1/model.onnx", MODEL)
    if layout == "trimserve's":
        publish(place, "m", "1", {"model.onnx": MODEL})
    storage = opened(place.url)
    listing = only_version(storage)
    place.put("m/1/model.onnx", MODEL + b"!")
    with pytest.raises(ArtifactInvalid, match="changed since it was listed"):
        storage.fetch("m", listing)


@pytest.mark.parametrize(
    ("model", "version"),
    [
        pytest.param("gone", "1", id="the model isn't there"),
        pytest.param("m", "2", id="the version isn't there"),
        pytest.param("../models/m", "1", id="the model's name leads out"),
        pytest.param("m", "../m/1", id="the version's name leads out"),
        pytest.param("m", "", id="the version has no name"),
    ],
)
def test_fetch_refuses_the_name_when(place: Place, opened: Open, model: str, version: str) -> None:
    place.put("m/1/model.onnx", MODEL)
    storage = opened(place.url)
    listing = replace(only_version(storage), version=version)
    with pytest.raises(ArtifactInvalid):
        storage.fetch(model, listing)


def test_fetch_side_files_gives_labels_when_they_are_named(place: Place, opened: Open) -> None:
    place.put("m/1/model.onnx", MODEL)
    place.put("m/labels.txt", b"cat")
    place.put("m/more/labels.txt", b"dog")
    storage = opened(place.url)
    folder = storage.fetch_side_files(storage.scan()["m"], ["labels.txt", "more/labels.txt"])
    assert (folder / "labels.txt").read_bytes() == b"cat"
    assert (folder / "more/labels.txt").read_bytes() == b"dog"


@pytest.mark.parametrize("name", ["missing", "../n/1/model.onnx", "/etc/passwd", ".hidden", ""])
def test_fetch_side_files_refuses_when_a_name_is(place: Place, opened: Open, name: str) -> None:
    for existing in ("m/1/model.onnx", "m/.hidden", "n/1/model.onnx"):
        place.put(existing, MODEL)
    storage = opened(place.url)
    with pytest.raises(ArtifactInvalid):
        storage.fetch_side_files(storage.scan()["m"], [name])


# --- local folders


@pytest.mark.parametrize("kind", ["a path", "text", "a file URL"])
def test_open_storage_takes_a_folder_when_it_is_given_as(
    tmp_path: Path, opened: Open, kind: str
) -> None:
    place = Folder(tmp_path / "my models")
    place.put("m/1/model.onnx", MODEL)
    root = Path(place.url)
    storage = opened({"a path": root, "text": str(root), "a file URL": root.as_uri()}[kind])
    assert storage.url == str(root)
    assert storage.fetch("m", only_version(storage)) == root / "m" / "1"  # nothing is copied
    storage.prune([])
    assert (root / "m" / "1" / "model.onnx").exists()


@pytest.mark.parametrize(
    "link", ["m", "m/1", "m/1/model.onnx", "m/1/data", "m/config.pbtxt", "m/labels.txt"]
)
def test_scan_lists_the_problem_when_a_link_leads_out_of_the_repository(
    tmp_path: Path, opened: Open, link: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "1").mkdir()
    place = Folder(tmp_path / "models")
    place.put("good/1/model.onnx", MODEL)
    path = Path(place.url, link)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside)
    storage = opened(place.url)
    found = storage.scan()
    assert "leads out of the repository" in found["m"].problem
    assert not found["good"].problem
    with pytest.raises(ArtifactInvalid):
        storage.fetch("m", VersionListing("1", False, ""))


def test_fetch_side_files_refuses_when_a_link_leads_out(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "secret").touch()
    place = Folder(tmp_path / "models")
    place.put("m/1/model.onnx", MODEL)
    storage = opened(place.url)
    listing = storage.scan()["m"]
    Path(place.url, "m/labels.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactInvalid, match="leads out of the repository"):
        storage.fetch_side_files(listing, ["labels.txt"])


def test_scan_follows_a_link_when_it_stays_in_the_repository(tmp_path: Path, opened: Open) -> None:
    place = Folder(tmp_path / "models")
    place.put(".revisions/7/model.onnx", MODEL)
    place.put("m/labels.txt", b"cat")
    Path(place.url, "m/1").symlink_to("../.revisions/7")
    (tmp_path / "alias").symlink_to("models")
    storage = opened(tmp_path / "alias")
    assert contents(storage.fetch("m", only_version(storage))) == {"model.onnx": MODEL}


def test_scan_lists_the_problem_when_links_run_in_a_circle(tmp_path: Path, opened: Open) -> None:
    place = Folder(tmp_path / "models")
    place.put("m/1/model.onnx", MODEL)
    Path(place.url, "m/1/again").symlink_to("..")
    assert "folders deep" in opened(place.url).scan()["m"].problem


def test_scan_skips_a_link_when_it_leads_to_nothing(tmp_path: Path, opened: Open) -> None:
    place = Folder(tmp_path / "models")
    place.put("m/1/model.onnx", MODEL)
    Path(place.url, "m/1/gone").symlink_to("nowhere")
    storage = opened(place.url)
    assert storage.fetch("m", only_version(storage)).is_dir()


def test_scan_lists_the_problem_when_a_config_is_a_folder(tmp_path: Path, opened: Open) -> None:
    place = Folder(tmp_path / "models")
    place.put("m/config.pbtxt/file", MODEL)
    place.put("good/1/model.onnx", MODEL)
    found = opened(place.url).scan()
    assert "config.pbtxt: Is a directory" in found["m"].problem
    assert not found["good"].problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_scan_lists_the_problem_when_a_model_may_not_be_read(tmp_path: Path, opened: Open) -> None:
    place = Folder(tmp_path / "models")
    place.put("m/1/model.onnx", MODEL)
    place.put("good/1/model.onnx", MODEL)
    Path(place.url, "m").chmod(0)
    found = opened(place.url).scan()
    Path(place.url, "m").chmod(0o755)
    assert "Permission denied" in found["m"].problem
    assert not found["good"].problem


# --- addresses


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("memory://nothing/here", id="a remote folder isn't there"),
        pytest.param("/nothing/here", id="a local folder isn't there"),
        pytest.param("file:///nothing/here", id="a file URL's folder isn't there"),
    ],
)
def test_scan_refuses_when(url: str, opened: Open) -> None:
    storage = opened(url)
    with pytest.raises(ArtifactInvalid, match=r"nothing/here: .*want"):
        storage.scan()
    with pytest.raises(ArtifactInvalid, match="nothing/here"):
        storage.scan_model("m")


def test_scan_refuses_when_the_repository_is_a_file(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "file").touch()
    place = Memory()
    place.put("file", MODEL)
    for url in (str(tmp_path / "file"), f"{place.url}/file"):
        with pytest.raises(ArtifactInvalid, match=r"file: .*want"):
            opened(url).scan()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        pytest.param("nonsense://x", "nonsense", id="the protocol is unknown"),
        pytest.param("gs://bucket/x", "gcsfs", id="another protocol's driver is missing"),
        pytest.param("simplecache::s3://bucket/x", "chain", id="it is a chain"),
        pytest.param("file://host/x", "file:///", id="a file URL names a host"),
    ],
)
def test_open_storage_refuses_when(url: str, problem: str, opened: Open) -> None:
    with pytest.raises(ArtifactInvalid, match=problem):
        opened(url)


def test_open_storage_names_the_extra_when_the_driver_of_s3_is_missing() -> None:
    program = """
import sys
sys.modules["s3fs"] = None  # importing it raises ImportError
from serve.errors import ArtifactInvalid
from serve.storage import open_storage
try:
    open_storage("s3://bucket/models")
except ArtifactInvalid as error:
    print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert "pip install 'trimserve[s3]'" in ended.stdout


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/models/", "s3://bucket/models"),
        ("ftp://me:secret@host:21/models", "ftp://host:21/models"),
        ("ftp://me:p@ss@host/models", "ftp://host/models"),
        ("https://host/models?token=secret#secret", "https://host/models"),
        ("memory://models", "memory://models"),
    ],
)
def test_address_is_shown_without_credentials_when_it_is(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


# --- S3


def test_scan_refuses_when_the_bucket_is_missing(s3: str, opened: Open) -> None:
    storage = opened("s3://there-is-no-such-bucket/models")
    with pytest.raises(ArtifactInvalid, match=r"s3://there-is-no.*check the bucket"):
        storage.scan()
    with pytest.raises(ArtifactInvalid, match="check the bucket"):
        storage.scan_model("m")


def test_scan_refuses_when_the_prefix_holds_nothing(s3: str, opened: Open) -> None:
    place = Bucket(s3)
    with pytest.raises(ArtifactInvalid, match="no such folder"):
        opened(f"s3://{place.name}/other").scan()


def test_scan_reads_the_whole_bucket_when_there_is_no_prefix(s3: str, opened: Open) -> None:
    place = Bucket(s3)
    place.client.put_object(Bucket=place.name, Key="m/1/model.onnx", Body=MODEL)
    storage = opened(f"s3://{place.name}")
    assert contents(storage.fetch("m", only_version(storage))) == {"model.onnx": MODEL}


def test_scan_skips_keys_when_they_would_lead_out_of_the_cache(s3: str, opened: Open) -> None:
    place = Bucket(s3)
    for key in ("m/1/../../evil", "m/1//evil", "m/1/a\\..\\evil", "m/1/model.onnx"):
        place.put(key, MODEL)
    storage = opened(place.url)
    assert contents(storage.fetch("m", only_version(storage))) == {"model.onnx": MODEL}


def test_scan_refuses_when_the_credentials_are_wrong(
    s3: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Bucket(s3)
    place.put("m/1/model.onnx", MODEL)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage = opened(place.url)
    with checking_credentials(s3), pytest.raises(ArtifactInvalid, match="AWS_SECRET_ACCESS_KEY"):
        storage.scan()


@contextlib.contextmanager
def checking_credentials(endpoint: str) -> Iterator[None]:
    """While inside, the server knows no user and so refuses everyone."""

    def allow(n_requests: bytes) -> None:
        request = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", n_requests, {"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request).close()

    allow(b"0")
    try:
        yield
    finally:
        allow(b"inf")


def test_scan_refuses_when_nobody_listens_at_the_endpoint(
    s3: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as bound:  # a port that is taken and refuses connections
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bound.getsockname()[1]}")
        storage = opened("s3://bucket/models")
        with pytest.raises(ArtifactInvalid, match="AWS_ENDPOINT_URL"):
            storage.scan()


def test_scan_refuses_when_the_endpoint_does_not_answer(
    s3: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:  # takes connections, and answers nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        storage = opened("s3://bucket/models", network=Network(0.2, 0.2, 1))
        with pytest.raises(ArtifactInvalid, match="AWS_ENDPOINT_URL"):
            storage.scan()


# --- what is read, and changes in the middle of it


class FakeFileSystem:
    """Files by path; it notes what is read, and can give other content than it lists."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.content: dict[str, bytes] = {}
        self.n_reads = 0
        self.at_open: Callable[[], None] = lambda: None

    def find(self, path: str, detail: bool, **options: Any) -> dict[str, dict[str, Any]]:
        return {
            name: {"type": "file", "size": len(content), "ETag": hash(content)}
            for name, content in self.files.items()
            if name.startswith(f"{path}/")
        }

    def isdir(self, path: str) -> bool:
        return True

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.n_reads += 1
        return self.files[path][start:end]

    def open(self, path: str, mode: str, **options: Any) -> BinaryIO:
        self.n_reads += 1
        self.at_open()
        return BytesIO(self.content.get(path, self.files[path]))


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[tuple[FakeFileSystem, RemoteStorage]]:
    file_system = FakeFileSystem({"r/m/1/model.onnx": MODEL, "r/m/config.pbtxt": b"config"})
    cache = Cache(tmp_path / "cache")
    storage = RemoteStorage("s3://r", DRIVERS["s3"], file_system, "r", cache, Limits())
    yield file_system, storage
    storage.close()


Fake = tuple[FakeFileSystem, RemoteStorage]


def test_scan_reads_no_file_when_nothing_changed(fake: Fake) -> None:
    file_system, storage = fake
    storage.scan()
    assert file_system.n_reads == 1
    assert storage.scan()["m"].config == "config"
    assert storage.scan_model("m") == storage.scan()["m"]
    assert file_system.n_reads == 1
    file_system.files["r/m/config.pbtxt"] = b"another"
    assert storage.scan()["m"].config == "another"
    assert file_system.n_reads == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(MODEL + b"!", "more bytes, want 70", id="longer than listed"),
        pytest.param(MODEL[1:], "69 bytes, want 70", id="shorter than listed"),
        pytest.param(b"", "0 bytes, want 70", id="empty"),
    ],
)
def test_fetch_refuses_when_what_arrives_is(
    fake: Fake, tmp_path: Path, content: bytes, problem: str
) -> None:
    file_system, storage = fake
    listing = only_version(storage)
    file_system.content["r/m/1/model.onnx"] = content
    with pytest.raises(ArtifactInvalid, match=problem):
        storage.fetch("m", listing)
    assert contents(tmp_path / "cache") == {}


def test_fetch_refuses_when_a_file_arrives_with_another_digest(fake: Fake) -> None:
    file_system, storage = fake
    file_system.files["r/m/1/manifest.json"] = manifest_of("m", "1", {"model.onnx": MODEL})
    listing = only_version(storage)
    file_system.content["r/m/1/model.onnx"] = MODEL[::-1]
    with pytest.raises(ArtifactInvalid, match=r"model\.onnx: sha256 .* want"):
        storage.fetch("m", listing)


def test_fetch_refuses_when_a_version_without_digests_changes_meanwhile(fake: Fake) -> None:
    file_system, storage = fake
    listing = only_version(storage)
    file_system.at_open = lambda: file_system.files.update({"r/m/1/model.onnx": MODEL[::-1]})
    file_system.content["r/m/1/model.onnx"] = MODEL
    with pytest.raises(ArtifactInvalid, match="changed since it was listed"):
        storage.fetch("m", listing)


def test_fetch_refuses_when_the_version_is_larger_than_allowed(remote: Place, opened: Open) -> None:
    publish(remote, "ours", "1", {"model.onnx": MODEL})
    remote.put("theirs/1/model.onnx", MODEL)
    remote.put("theirs/labels.txt", MODEL)
    storage = opened(remote.url, limits=Limits(max_version_bytes=69, max_side_bytes=69))
    for model in ("ours", "theirs"):
        with pytest.raises(ArtifactInvalid, match="70 bytes to download, at most 69"):
            storage.fetch(model, only_version(storage, model))
    with pytest.raises(ArtifactInvalid, match="70 bytes to download, at most 69"):
        storage.fetch_side_files(storage.scan()["theirs"], ["labels.txt"])


# --- the cache


@pytest.mark.parametrize("layout", ["trimserve's", "Triton's"])
def test_fetch_downloads_nothing_when_the_cache_has_the_version(
    remote: Place, opened: Open, layout: str
) -> None:
    remote.put("m/1/model.onnx", MODEL)
    if layout == "trimserve's":
        publish(remote, "m", "1", {"model.onnx": MODEL})
    first, second = opened(remote.url), opened(remote.url)
    folder = first.fetch("m", only_version(first))
    (folder / "model.onnx").write_bytes(MODEL[::-1])  # of the same size, to know it again
    assert second.fetch("m", only_version(second)) == folder
    assert (folder / "model.onnx").read_bytes() == MODEL[::-1]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "model.onnx").write_bytes(b"cut"), id="cut"),
        pytest.param(lambda folder: (folder / "model.onnx").unlink(), id="missing"),
    ],
)
@pytest.mark.parametrize("layout", ["trimserve's", "Triton's"])
def test_fetch_downloads_again_when_a_file_in_the_cache_is(
    remote: Place, opened: Open, layout: str, damage: Callable[[Path], None]
) -> None:
    remote.put("m/1/model.onnx", MODEL)
    if layout == "trimserve's":
        publish(remote, "m", "1", {"model.onnx": MODEL})
    storage = opened(remote.url)
    folder = storage.fetch("m", only_version(storage))
    damage(folder)
    assert storage.fetch("m", only_version(storage)) == folder
    assert (folder / "model.onnx").read_bytes() == MODEL


def test_fetch_keeps_versions_apart_when_one_is_replaced(remote: Place, opened: Open) -> None:
    storage = opened(remote.url)
    remote.put("m/1/model.onnx", MODEL)
    old = storage.fetch("m", only_version(storage))
    remote.put("m/1/model.onnx", MODEL + b"new")
    new = storage.fetch("m", only_version(storage))
    assert (old / "model.onnx").read_bytes() == MODEL
    assert (new / "model.onnx").read_bytes() == MODEL + b"new"


def test_fetch_gives_one_folder_when_processes_download_at_once(
    remote: Place, opened: Open, tmp_path: Path
) -> None:
    publish(remote, "m", "1", {"model.onnx": MODEL})
    storages = [opened(remote.url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda storage: storage.fetch("m", only_version(storage)), storages))
    assert len(folders) == 1
    assert [path.name for path in (tmp_path / "cache" / "m").iterdir()] == [folders.pop().name]


def test_prune_removes_what_nobody_uses_when_asked(
    remote: Place, opened: Open, tmp_path: Path
) -> None:
    for version in "123":
        publish(remote, "m", version, {"model.onnx": MODEL})
    remote.put("m/labels.txt", b"cat")
    mine, other = opened(remote.url), opened(remote.url)
    model = mine.scan()["m"]
    first, second, third = (mine.fetch("m", version) for version in model.versions)
    labels = mine.fetch_side_files(model, ["labels.txt"])
    assert other.fetch("m", model.versions[1]) == second
    mine.prune([first, labels])
    assert [first.is_dir(), second.is_dir(), third.is_dir(), labels.is_dir()] == [
        True, True, False, True  # the second is in use elsewhere
    ]  # fmt: skip
    other.close()
    mine.prune([first])
    assert set((tmp_path / "cache" / "m").iterdir()) == {first}
    assert contents(mine.fetch("m", model.versions[2])).keys() == {"model.onnx", MANIFEST}


def test_prune_removes_only_its_own_when_other_files_lie_in_the_cache(
    opened: Open, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "m"
    for name in (".draft-left-by-a-crash", "entry-old", "notes", "1"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").touch()
    (tmp_path / "cache" / "file").touch()
    opened(Memory().url).prune([])
    assert {path.name for path in folder.iterdir()} == {"notes", "1"}
    assert (tmp_path / "cache" / "file").exists()


def test_prune_leaves_a_download_alone_when_it_is_under_way(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path), Cache(tmp_path)

    def write(folder: Path) -> None:
        (folder / "first").touch()
        other.prune([])
        (folder / "second").touch()

    assert contents(cache.fill("m", "1", write)).keys() == {"first", "second"}
    cache.close()


def test_cache_gives_the_entry_of_who_was_faster_when_two_fill_it(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path), Cache(tmp_path)

    def write(folder: Path) -> None:
        (folder / "mine").touch()
        other.fill("m", "1", lambda theirs: (theirs / "theirs").touch())

    entry = cache.fill("m", "1", write)
    assert contents(entry).keys() == {"theirs"}
    assert list((tmp_path / "m").iterdir()) == [entry]
    other.close()
    other.prune([])
    assert entry.is_dir()  # held by the one that came second
    cache.close()
    other.prune([])
    assert not entry.exists()


def test_cache_says_what_it_wants_when_its_folder_is_a_file(
    remote: Place, opened: Open, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    remote.put("m/1/model.onnx", MODEL)
    storage = opened(remote.url, cache=tmp_path / "file")
    with pytest.raises(ArtifactInvalid, match="want a cache folder on a local disk"):
        storage.fetch("m", only_version(storage))


def test_close_removes_the_copies_when_no_cache_was_given(remote: Place) -> None:
    remote.put("m/1/model.onnx", MODEL)
    storage = open_storage(remote.url, network=IMPATIENT)
    folder = storage.fetch("m", only_version(storage))
    assert contents(folder) == {"model.onnx": MODEL}
    storage.close()
    assert not folder.exists()


# --- digests


def test_digest_is_the_same_when_a_version_is_local_or_fetched(place: Place, opened: Open) -> None:
    manifest = publish(place, "ours", "1", {"model.onnx": MODEL})
    place.put("theirs/1/model.onnx", MODEL)
    place.put("theirs/1/data/weights", b"w")
    storage = opened(place.url)
    ours = storage.fetch("ours", only_version(storage, "ours"))
    assert version_digest(ours) == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    assert version_digest(ours) == manifest_digest(manifest)
    rows = (
        f'[["data/weights","{hashlib.sha256(b"w").hexdigest()}",1],'
        f'["model.onnx","{hashlib.sha256(MODEL).hexdigest()}",70]]'
    )
    theirs = storage.fetch("theirs", only_version(storage, "theirs"))
    assert version_digest(theirs) == f"sha256:{hashlib.sha256(rows.encode()).hexdigest()}"


def test_version_digest_changes_when_a_file_is_renamed_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(MODEL)
    first = version_digest(tmp_path)
    path.write_bytes(MODEL[::-1])
    second = version_digest(tmp_path)
    path.rename(tmp_path / "other.onnx")
    assert len({first, second, version_digest(tmp_path)}) == 3


def test_version_digest_refuses_when_there_is_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ArtifactInvalid):
            version_digest(folder)


def test_parse_digest_gives_it_back_when_it_is_one() -> None:
    text = "sha256:" + "0af" * 21 + "0"
    assert parse_digest(text) == text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="it is empty"),
        pytest.param("0" * 64, id="it has no prefix"),
        pytest.param("sha256:" + "0" * 63, id="it is short"),
        pytest.param("sha256:" + "0" * 65, id="it is long"),
        pytest.param("sha256:" + "A" * 64, id="it has capitals"),
        pytest.param("sha256:" + "g" * 64, id="it isn't hexadecimal"),
        pytest.param("sha512:" + "0" * 64, id="it is another hash"),
        pytest.param("sha256:" + "0" * 64 + "\n", id="a line follows"),
    ],
)
def test_parse_digest_refuses_when(text: str) -> None:
    with pytest.raises(InvalidRequest, match="digest"):
        parse_digest(text)
