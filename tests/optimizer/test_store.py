"""The store: what is in it stays, and what isn't whole isn't in it."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from optimizer.store import Key, Store, StoredVariant, StoreInvalid
from optimizer.variant import engine_model, onnx_model
from serve.artifact import Step
from serve.engines import EngineSpec
from serve.machine import Machine

MACHINE = Machine("a processor", ("avx2",), 2, "Linux", {})
STEP = Step("quantization", "1", {"calibration": "minmax", "reduce_range": False}, 0, {"onnx": "1"})


def variant(store: Store, variant_id: str = "v", content: bytes = b"weights") -> StoredVariant:
    with store.workshop() as directory:
        (directory / "model.onnx").write_bytes(content)
        model = onnx_model(directory, "model.onnx", "int8", ("a note",))
        return store.add(StoredVariant(variant_id, "parent", STEP, "data", model, 1.5))


def test_variant_is_found_as_added_when_the_store_is_opened_again(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        added = variant(store)
    with Store(tmp_path / "store.sqlite") as store:
        assert store.find("v") == added
    assert added.model.directory.is_dir()
    assert added.model.notes == ("a note",)


def test_engine_is_found_with_its_spec(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        with store.workshop() as directory:
            (directory / "model.xml").write_text("<net/>")
            spec = EngineSpec("openvino", "model.xml", "bf16", options={"hint": "LATENCY"})
            model = engine_model(directory, spec)
            added = store.add(StoredVariant("e", "parent", STEP, "", model, 0.1))
        assert store.find("e") == added


def test_variants_share_an_artifact_when_their_content_is_equal(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        one, other = variant(store, "one"), variant(store, "other")
    assert one.model.directory == other.model.directory


def test_variant_is_absent_when_never_added(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        assert store.find("v") is None


def test_variant_is_absent_and_can_be_added_again_when_its_files_are_damaged(
    tmp_path: Path,
) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        damaged = variant(store).model.directory / "model.onnx"
        damaged.write_bytes(b"other")
        assert store.find("v") is None
        variant(store)
        assert store.find("v") is not None
        assert damaged.read_bytes() == b"weights"


def test_workshop_is_gone_when_building_fails(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        directories = []

        def build() -> None:
            with store.workshop() as directory:
                directories.append(directory)
                (directory / "half").write_text("written")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            build()
        assert not directories[0].exists()


def test_measurement_is_the_newest_of_its_key(tmp_path: Path) -> None:
    key = Key("v", MACHINE, "timing", 1, {"threads": 1})
    with Store(tmp_path / "store.sqlite") as store:
        assert store.recorded(key) is None
        store.record(key, {"p50_s": 0.1})
        store.record(key, {"p50_s": 0.2})
        assert store.recorded(key) == {"p50_s": 0.2}
    with sqlite3.connect(tmp_path / "store.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM measurements").fetchone() == (2,)
    connection.close()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Key("w", MACHINE, "timing", 1, {"threads": 1}), id="another variant"),
        pytest.param(Key("v", MACHINE, "kernels", 1, {"threads": 1}), id="another metric"),
        pytest.param(Key("v", MACHINE, "timing", 2, {"threads": 1}), id="another protocol"),
        pytest.param(Key("v", MACHINE, "timing", 1, {"threads": 2}), id="another configuration"),
        pytest.param(
            Key("v", Machine("another", (), 2, "Linux", {}), "timing", 1, {"threads": 1}),
            id="another machine",
        ),
    ],
)
def test_measurement_is_absent_when_the_key_differs(other: Key, tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        store.record(Key("v", MACHINE, "timing", 1, {"threads": 1}), 1)
        assert store.recorded(other) is None


CRASH = """
import os, sys
from pathlib import Path
from optimizer.store import Store
from tests.optimizer.test_store import MACHINE, Key, variant

store = Store(Path(sys.argv[1]))
variant(store, "whole")
store.record(Key("whole", MACHINE, "timing", 1, {}), 1)
with store.workshop() as directory:
    (directory / "model.onnx").write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""


def test_store_keeps_what_was_whole_when_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    command = [sys.executable, "-c", CRASH, str(path)]
    root = Path(__file__).parents[2]
    killed = subprocess.run(command, check=False, cwd=root, env={**os.environ}, timeout=60)
    assert killed.returncode == -9
    with Store(path) as store:
        assert store.find("whole") is not None
        assert store.recorded(Key("whole", MACHINE, "timing", 1, {})) == 1
        assert variant(store, "another", b"new").model.directory.is_dir()


def test_store_is_refused_when_its_file_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(StoreInvalid, match="can't be opened as a store"):
        Store(path)


def test_store_is_refused_when_its_schema_is_newer(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    Store(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreInvalid, match="has schema 99"):
        Store(path)
