"""Shared memory: tritonclient's regions are read and written, and nothing beyond them."""

import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.utils.shared_memory as client
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import InvalidRequest, NotSupported, ShuttingDown
from serve.shared_memory import MAX_NAME_LENGTH, Region, SharedMemory
from serve.tensor import Array

PREFIX = "app_"
BIG = 2**63  # more than the kernel's offsets hold


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in place of /dev/shm: an object of 100 bytes, and others that aren't the app's."""
    folder = tmp_path / "shm"
    folder.mkdir()
    (folder / "app_a").write_bytes(bytes(range(100)))
    for name in ("other", PREFIX):
        (folder / name).write_bytes(b"a secret of another program")
    return folder


@pytest.fixture
def memory(root: Path) -> Iterator[SharedMemory]:
    memory = SharedMemory(PREFIX, max_regions=4, max_region_bytes=1000, root=root)
    yield memory
    memory.close()


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- with tritonclient as the peer


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm here")
def test_tensors_go_both_ways_when_tritonclient_made_the_region() -> None:
    key = f"trimserve_test_{uuid.uuid4().hex}"
    memory = SharedMemory("trimserve_test_")
    sent: list[Array] = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7, 8], np.int64)]
    region = client.create_shared_memory_region("io", f"/{key}", 64)
    try:
        client.set_shared_memory_region(region, sent)
        memory.register("io", f"/{key}", 0, 64)
        memory.register("second half", key, 24, 40)
        assert memory.read("io", 0, 24) == sent[0].tobytes()
        assert memory.read("second half", 0, 16) == sent[1].tobytes()
        answer = np.array([1.5, -2.5], np.float32)
        memory.write("second half", 16, answer.tobytes())
        got = client.get_contents_as_numpy(region, np.float32, [2], offset=40)
        assert got.tolist() == answer.tolist()
        del got  # a view, which would keep the client's mapping open
    finally:
        client.destroy_shared_memory_region(region)
        memory.close()


# --- registration


def test_region_is_known_when_registered(memory: SharedMemory) -> None:
    memory.register("b", "app_a", 50, 50)
    memory.register("a", "/app_a", 0, 100)
    first, second = Region("a", "/app_a", 0, 100), Region("b", "app_a", 50, 50)
    assert memory.status() == (first, second)
    assert memory.status("b") == (second,)
    assert memory.read("b", 10, 3) == bytes([60, 61, 62])


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("", id="nothing"),
        pytest.param("/", id="a slash"),
        pytest.param("other", id="another program's"),
        pytest.param("/other", id="another program's with a slash"),
        pytest.param(PREFIX, id="the prefix alone"),
        pytest.param("//app_a", id="two slashes"),
        pytest.param("app_/../other", id="a way up"),
        pytest.param("app_a/", id="a slash behind"),
        pytest.param("../shm/app_a", id="around the prefix"),
        pytest.param("app_a\0", id="a zero byte"),
        pytest.param("app_a\n", id="a line feed"),
        pytest.param("app_ä", id="a letter that isn't ASCII"),
        pytest.param("APP_a", id="the prefix in capitals"),
        pytest.param("app_" + "a" * 252, id="longer than a file's name can be"),
        pytest.param("app_missing", id="none that exists"),
    ],
)
def test_registration_is_refused_when_the_key_is_not_one_of_the_app(
    memory: SharedMemory, key: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        memory.register("a", key, 0, 1)
    assert raised.value.field == "key"
    assert memory.status() == ()


def test_registration_is_refused_when_the_key_leads_elsewhere(
    memory: SharedMemory, root: Path
) -> None:
    (root / "app_link").symlink_to(root / "app_a")
    (root / "app_hard").hardlink_to(root / "other")
    (root / "app_folder").mkdir()
    os.mkfifo(root / "app_pipe")
    before = n_descriptors()
    for key in ("app_link", "app_hard", "app_folder", "app_pipe"):
        with pytest.raises(InvalidRequest, match=r"^key: "):
            memory.register("a", key, 0, 1)
    assert n_descriptors() == before


def test_registration_is_refused_when_the_key_is_a_socket(
    memory: SharedMemory, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("app_socket")
        with pytest.raises(InvalidRequest, match=r"^key: "):
            memory.register("a", "app_socket", 0, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open anything")
def test_registration_is_refused_when_the_file_may_not_be_written(
    memory: SharedMemory, root: Path
) -> None:
    (root / "app_a").chmod(0o400)
    with pytest.raises(InvalidRequest, match=r"^key: "):
        memory.register("a", "app_a", 0, 1)


@pytest.mark.parametrize(
    ("offset", "byte_size", "field"),
    [
        pytest.param(-1, 10, "offset", id="a negative offset"),
        pytest.param(0, -1, "byte_size", id="a negative size"),
        pytest.param(0, 0, "byte_size", id="no bytes"),
        pytest.param(True, 10, "offset", id="an offset that is a bool"),
        pytest.param(0, 1.0, "byte_size", id="a size that is a float"),
        pytest.param(0, 1001, "byte_size", id="more than a region may have"),
        pytest.param(0, 101, "offset + byte_size", id="a byte more than the file"),
        pytest.param(100, 1, "offset + byte_size", id="behind the file"),
        pytest.param(BIG, 1, "offset + byte_size", id="beyond the kernel's offsets"),
        pytest.param(2**64 - 1, 1, "offset + byte_size", id="a sum that wraps in 64 bits"),
    ],
)
def test_registration_is_refused_when_the_region_is_not_in_the_file(
    memory: SharedMemory, offset: int, byte_size: int, field: str
) -> None:
    before = n_descriptors()
    with pytest.raises(InvalidRequest) as raised:
        memory.register("a", "app_a", offset, byte_size)
    assert raised.value.field == field
    assert n_descriptors() == before


@pytest.mark.parametrize("name", ["", "a" * (MAX_NAME_LENGTH + 1)], ids=["empty", "too long"])
def test_registration_is_refused_when_the_name_has_a_wrong_length(
    memory: SharedMemory, name: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"^name: "):
        memory.register(name, "app_a", 0, 1)


@pytest.mark.parametrize("byte_size", [100, 50], ids=["the same region", "another region"])
def test_registration_is_refused_when_the_name_is_taken(
    memory: SharedMemory, byte_size: int
) -> None:
    memory.register("a", "app_a", 0, 100)
    with pytest.raises(InvalidRequest, match="registered already"):
        memory.register("a", "app_a", 0, byte_size)
    assert memory.status() == (Region("a", "app_a", 0, 100),)


def test_registration_is_refused_when_there_are_too_many(memory: SharedMemory) -> None:
    for name in "abcd":
        memory.register(name, "app_a", 0, 1)
    with pytest.raises(InvalidRequest, match="at most 4 regions"):
        memory.register("e", "app_a", 0, 1)
    memory.unregister("a")
    memory.register("e", "app_a", 0, 1)


def test_region_is_unknown_when_unregistered(memory: SharedMemory) -> None:
    before = n_descriptors()
    for name in "abc":
        memory.register(name, "app_a", 0, 1)
    memory.unregister("b")
    memory.unregister("never registered")
    assert [region.name for region in memory.status()] == ["a", "c"]
    memory.unregister_all()
    assert memory.status() == ()
    assert n_descriptors() == before
    memory.register("b", "app_a", 0, 2)
    assert memory.read("b", 0, 2) == b"\x00\x01"


def test_unknown_region_is_refused_when_named(memory: SharedMemory) -> None:
    memory.register("known", "app_a", 0, 100)
    refused = []
    for call in (
        lambda: memory.read("x", 0, 1),
        lambda: memory.write("x", 0, b"1"),
        lambda: memory.status("x"),
    ):
        with pytest.raises(InvalidRequest) as raised:
            call()
        refused.append((raised.value.field, raised.value.got))
        assert not re.search("known|app_a", str(raised.value))
    assert refused == [("shared_memory_region", "x"), ("shared_memory_region", "x"), ("name", "x")]


# --- reading and writing


@given(st.integers(0, 60), st.integers(1, 40), st.integers(-5, 50), st.integers(-5, 50))
def test_part_is_read_and_written_only_when_within_the_region(
    tmp_path_factory: pytest.TempPathFactory, start: int, size: int, offset: int, byte_size: int
) -> None:
    root = tmp_path_factory.mktemp("shm")
    content = bytes(range(100))
    (root / "app_a").write_bytes(content)
    memory = SharedMemory(PREFIX, root=root)
    memory.register("a", "app_a", start, size)
    inside = offset >= 0 and 0 <= byte_size <= size - offset
    if inside:
        begin, end = start + offset, start + offset + byte_size
        assert memory.read("a", offset, byte_size) == content[begin:end]
        memory.write("a", offset, b"\xff" * byte_size)
        content = content[:begin] + b"\xff" * byte_size + content[end:]
    else:
        with pytest.raises(InvalidRequest, match=r"shared_memory_(offset|byte_size)"):
            memory.read("a", offset, byte_size)
        with pytest.raises(InvalidRequest, match=r"shared_memory_(offset|byte_size)"):
            memory.write("a", offset if byte_size >= 0 else -1, b"\xff" * max(byte_size, 0))
    assert (root / "app_a").read_bytes() == content
    memory.close()


def test_huge_numbers_are_refused_when_read(memory: SharedMemory) -> None:
    memory.register("a", "app_a", 0, 100)
    for offset, byte_size in ((BIG, 1), (1, BIG), (2**64 - 1, 2)):
        with pytest.raises(InvalidRequest, match="at most"):
            memory.read("a", offset, byte_size)


def test_read_is_a_copy_when_the_client_changes_its_bytes(memory: SharedMemory, root: Path) -> None:
    memory.register("a", "app_a", 0, 100)
    got = memory.read("a", 0, 100)
    with (root / "app_a").open("r+b") as file:
        file.write(bytes(100))
    assert got == bytes(range(100))
    assert memory.read("a", 0, 100) == bytes(100)


def test_region_is_refused_when_its_file_is_cut_short(memory: SharedMemory, root: Path) -> None:
    memory.register("a", "app_a", 10, 50)
    os.truncate(root / "app_a", 30)
    assert memory.read("a", 0, 20) == bytes(range(10, 30))
    with pytest.raises(InvalidRequest, match="registered size"):
        memory.read("a", 0, 21)
    with pytest.raises(InvalidRequest, match="registered size"):
        memory.read("a", 30, 5)
    with pytest.raises(InvalidRequest, match="registered size"):
        memory.write("a", 0, b"1")
    assert (root / "app_a").read_bytes() == bytes(range(30))


def test_region_stays_when_its_file_is_unlinked_or_grows(memory: SharedMemory, root: Path) -> None:
    memory.register("a", "app_a", 0, 100)
    os.truncate(root / "app_a", 5000)
    with pytest.raises(InvalidRequest, match="at most 100"):
        memory.read("a", 0, 101)
    (root / "app_a").unlink()
    memory.write("a", 99, b"\x01")
    assert memory.read("a", 98, 2) == b"\x62\x01"


def test_descriptors_are_given_back_when_reads_and_writes_fail(memory: SharedMemory) -> None:
    memory.register("a", "app_a", 0, 100)
    before = n_descriptors()
    memory.read("a", 0, 100)
    memory.write("a", 0, b"1")
    with pytest.raises(InvalidRequest):
        memory.read("a", 0, 101)
    assert n_descriptors() == before


def test_threads_read_no_other_file_when_regions_come_and_go(
    memory: SharedMemory, root: Path
) -> None:
    """A descriptor that is closed while it is read may be another file's by then."""
    contents = {name: name.encode() * 1000 for name in "ab"}
    for name, content in contents.items():
        (root / f"app_{name}").write_bytes(content)
    done = threading.Event()
    wrong: list[bytes] = []

    def read(name: str) -> None:
        while not done.is_set():
            try:
                got = memory.read(name, 0, 1000)
            except InvalidRequest:  # it isn't registered just now
                continue
            if got != contents[name]:
                wrong.append(got)

    readers = [threading.Thread(target=read, args=(name,)) for name in "aabb"]
    for reader in readers:
        reader.start()
    for _ in range(300):
        for name in "ab":
            memory.register(name, f"app_{name}", 0, 1000)
            memory.unregister(name)
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []


# --- on, off and closed


def test_everything_is_refused_when_it_is_off() -> None:
    memory = SharedMemory(None)
    assert not memory.enabled
    for call in (
        lambda: memory.register("a", "b", 0, 1),
        lambda: memory.unregister("a"),
        memory.unregister_all,
        memory.status,
        lambda: memory.read("a", 0, 1),
        lambda: memory.write("a", 0, b""),
    ):
        with pytest.raises(NotSupported, match="--shared-memory-prefix"):
            call()
    memory.close()


def test_regions_are_gone_when_closed(root: Path) -> None:
    before = n_descriptors()
    memory = SharedMemory(PREFIX, root=root)
    assert memory.enabled
    memory.register("a", "app_a", 0, 100)
    memory.close()
    memory.close()
    assert memory.status() == ()
    assert n_descriptors() == before
    with pytest.raises(ShuttingDown):
        memory.register("a", "app_a", 0, 100)


@pytest.mark.parametrize("prefix", ["", "/app", ".", "..", "a/b", "a b", "a" * 65, "ä", "a\n"])
def test_prefix_is_refused_when_it_is_no_beginning_of_a_name(prefix: str, root: Path) -> None:
    with pytest.raises(ValueError, match="shared memory prefix: got"):
        SharedMemory(prefix, root=root)
