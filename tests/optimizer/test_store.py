"""The store: what is in it stays, and what isn't whole isn't in it. In both databases."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from optimizer.store import Key, Look, Store, StoredVariant, TrialLoggedOtherwise
from optimizer.variant import engine_model, onnx_model
from serve.engines import EngineSpec
from serve.machine import Machine
from tests.optimizer.conftest import Place
from tests.optimizer.stored import MACHINE, STEP, variant

OTHER_MACHINE = Machine("another", (), 2, "Linux", {})

# --- variants


def test_variant_is_found_as_added_when_the_store_is_opened_again(place: Place) -> None:
    with place.open() as store:
        added = variant(store)
    with place.open() as store:
        assert store.find("v") == added
    assert added.model.directory.is_dir()
    assert added.model.notes == ("a note",)


def test_engine_is_found_with_its_spec(place: Place) -> None:
    with place.open() as store:
        with store.workshop() as directory:
            (directory / "model.xml").write_text("<net/>")
            spec = EngineSpec("openvino", "model.xml", "bf16", options={"hint": "LATENCY"})
            model = engine_model(directory, spec)
            added = store.add(StoredVariant("e", "parent", STEP, "", model, 0.1))
        assert store.find("e") == added


def test_variants_share_an_artifact_when_their_content_is_equal(place: Place) -> None:
    with place.open() as store:
        one, other = variant(store, "one"), variant(store, "other")
    assert one.model.directory == other.model.directory


def test_variant_is_absent_when_never_added(place: Place) -> None:
    with place.open() as store:
        assert store.find("v") is None


def test_variant_stays_as_first_added_when_it_is_added_with_other_files(place: Place) -> None:
    with place.open() as store:
        first = variant(store, content=b"first")
        assert variant(store, content=b"second") == first
        assert store.find("v") == first


def test_variant_is_absent_and_can_be_added_again_when_its_files_are_damaged(place: Place) -> None:
    with place.open() as store:
        damaged = variant(store).model.directory / "model.onnx"
        damaged.write_bytes(b"other")
        assert store.find("v") is None
        variant(store)
        assert store.find("v") is not None
        assert damaged.read_bytes() == b"weights"


def test_variant_has_its_new_files_when_it_is_built_otherwise_after_damage(place: Place) -> None:
    with place.open() as store:
        shutil.rmtree(variant(store, content=b"first").model.directory)
        second = variant(store, content=b"second")
        assert store.find("v") == second
        assert (second.model.directory / "model.onnx").read_bytes() == b"second"


class Overtaken(type(Path())):  # type: ignore[misc]
    """A folder that another process's equal one gets ahead of, whenever it is renamed."""

    def rename(self, target: str | os.PathLike[str]) -> Path:
        shutil.copytree(self, target)
        return super().rename(target)  # type: ignore[no-any-return]


def test_variant_is_added_when_another_process_moves_equal_files_in_first(place: Place) -> None:
    with place.open() as store, store.workshop() as directory:
        (directory / "model.onnx").write_bytes(b"weights")
        model = replace(onnx_model(directory, "model.onnx"), directory=Overtaken(directory))
        added = store.add(StoredVariant("v", "parent", STEP, "data", model, 1.5))
        assert store.find("v") == added
        assert (directory / "model.onnx").exists()  # it wasn't needed


def test_workshop_is_gone_when_building_fails(place: Place) -> None:
    with place.open() as store:
        directories = []

        def build() -> None:
            with store.workshop() as directory:
                directories.append(directory)
                (directory / "half").write_text("written")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            build()
        assert not directories[0].exists()


def test_artifact_is_as_readable_as_the_folder_of_artifacts_when_it_is_kept(place: Place) -> None:
    place.artifacts.mkdir()
    place.artifacts.chmod(0o750)
    with place.open() as store:
        kept = variant(store).model.directory
    assert kept.stat().st_mode & 0o777 == 0o750


def test_workshops_of_killed_processes_go_when_they_are_a_week_old(place: Place) -> None:
    with place.open() as store, store.workshop() as young, store.workshop() as old:
        eight_days_s = 8 * 86_400
        os.utime(old, (old.stat().st_mtime - eight_days_s,) * 2)
        place.open().close()
        assert young.exists()
        assert not old.exists()


# --- lineage and ids


def test_lineage_goes_up_to_the_first_step_when_all_are_stored(place: Place) -> None:
    with place.open() as store:
        first = variant(store, "first", b"1", parent_id="the base, no variant")
        second = variant(store, "second", b"2", parent_id="first")
        third = variant(store, "third", b"3", parent_id="second")
        assert store.lineage("third") == (third, second, first)


def test_lineage_stops_when_a_parent_is_missing(place: Place) -> None:
    with place.open() as store:
        third = variant(store, "third", parent_id="second")
        assert store.lineage("third") == (third,)
        assert store.lineage("second") == ()


def test_lineage_is_known_when_the_files_are_gone(place: Place) -> None:
    with place.open() as store:
        lost = variant(store)
        shutil.rmtree(lost.model.directory)
        assert store.lineage("v") == (lost,)


@pytest.mark.parametrize(
    ("prefix", "ids"),
    [
        pytest.param("ab", ["ab0", "abf", "abf9"], id="of several"),
        pytest.param("ABF", ["abf", "abf9"], id="in capitals"),
        pytest.param("abf9", ["abf9"], id="that is an id"),
        pytest.param("abf99", [], id="longer than any"),
        pytest.param("", ["0c", "ab0", "abf", "abf9", "ac0", "ff"], id="empty"),
        pytest.param("a%", [], id="with a wildcard"),
    ],
)
def test_prefix_is_resolved_to_ids_when_it_is(prefix: str, ids: list[str], place: Place) -> None:
    with place.open() as store:
        for variant_id in ("ff", "abf9", "ab0", "0c", "abf", "ac0"):
            variant(store, variant_id)
        assert store.resolve(prefix) == ids


# --- measurements


def test_measurement_is_the_newest_of_its_key(place: Place) -> None:
    key = Key("v", MACHINE, "timing", 1, {"threads": 1})
    with place.open() as store:
        assert store.recorded(key) is None
        store.record(key, {"p50_s": 0.1})
        store.record(key, {"p50_s": 0.2})
        assert store.recorded(key) == {"p50_s": 0.2}
        assert [value for *_, value in store.values("timing", 1)] == [
            {"p50_s": 0.1}, {"p50_s": 0.2},
        ]  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Key("w", MACHINE, "timing", 1, {"threads": 1}), id="another variant"),
        pytest.param(Key("v", MACHINE, "kernels", 1, {"threads": 1}), id="another metric"),
        pytest.param(Key("v", MACHINE, "timing", 2, {"threads": 1}), id="another protocol"),
        pytest.param(Key("v", MACHINE, "timing", 1, {"threads": 2}), id="another configuration"),
        pytest.param(
            Key("v", OTHER_MACHINE, "timing", 1, {"threads": 1}),
            id="another machine",
        ),
    ],
)
def test_measurement_is_absent_when_the_key_differs(other: Key, place: Place) -> None:
    with place.open() as store:
        store.record(Key("v", MACHINE, "timing", 1, {"threads": 1}), 1)
        assert store.recorded(other) is None


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(0.1 + 0.2, id="a double"),
        pytest.param("π \x00 \\u0000", id="text with NUL"),
        pytest.param({"bits": "f" * 1_000_000, "none": None}, id="a megabyte"),
    ],
)
def test_measurement_comes_back_as_recorded_when_it_is(value: object, place: Place) -> None:
    key = Key("v", MACHINE, "timing", 1, {"batch_sizes": list(range(2000))})
    with place.open() as store:
        store.record(key, value)
    with place.open() as store:
        assert store.recorded(key) == value


def test_nothing_is_recorded_when_the_value_is_not_a_number(place: Place) -> None:
    key = Key("v", MACHINE, "timing", 1, {})
    with place.open() as store:
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.record(key, float("nan"))
        assert store.recorded(key) is None


def test_values_are_those_of_the_metric_oldest_first_when_asked_for(place: Place) -> None:
    serving: Mapping[str, object] = {"threads": 1}
    with place.open() as store:
        store.record(Key("v", MACHINE, "timing", 1, serving), 1)
        store.record(Key("w", OTHER_MACHINE, "timing", 1, {}), {"p50_s": 2})
        store.record(Key("v", MACHINE, "timing", 2, {}), "another protocol")
        store.record(Key("v", MACHINE, "kernels", 1, {}), "another metric")
        store.record(Key("u", MACHINE, "timing", 1, {}), 3)
        assert store.values("timing", 1) == (
            ("v", serving, 1),
            ("w", {}, {"p50_s": 2}),
            ("u", {}, 3),
        )
        assert store.values("timing", 1, MACHINE) == (("v", serving, 1), ("u", {}, 3))
        assert store.values("parity", 1) == ()


# --- studies


def test_looks_at_a_split_are_counted_over_all_studies(place: Place) -> None:
    before = datetime.now(UTC)
    with place.open() as store:
        store.log_look("one", "v", "test")
        store.log_look("another", "w", "test")
        store.log_look("another", "w", "test")
        store.log_look("another", "w", "another split")
    with place.open() as store:
        looks = store.looks("test")
    assert looks == (
        Look("one", "v", "test", looks[0].at),
        Look("another", "w", "test", looks[1].at),
        Look("another", "w", "test", looks[2].at),
    )
    times = [before, *(datetime.fromisoformat(look.at) for look in looks), datetime.now(UTC)]
    assert times == sorted(times)


def test_trials_are_in_order_up_to_the_first_missing_when_logged_in_any(place: Place) -> None:
    with place.open() as store:
        for number in (2, 4, 1, 5):
            store.log_trial("study", number, {"number": number})
        store.log_trial("another", 3, {"number": 3})
    with place.open() as store:
        assert store.trials("study") == ({"number": 1}, {"number": 2})
        store.log_trial("study", 3, {"number": 3})
        assert [entry["number"] for entry in store.trials("study")] == [1, 2, 3, 4, 5]
        assert store.trials("another") == ()


def test_trial_is_logged_once_when_the_entry_is_equal(place: Place) -> None:
    entry: Mapping[str, Any] = {"recipe": ["a", 1, None], "outcome": "feasible"}
    with place.open() as store:
        store.log_trial("study", 1, entry)
        store.log_trial("study", 1, dict(reversed(entry.items())))
        assert store.trials("study") == (entry,)


def test_trial_is_refused_when_its_number_has_another_entry(place: Place) -> None:
    with place.open() as store:
        store.log_trial("study", 1, {"outcome": "feasible"})
        with pytest.raises(TrialLoggedOtherwise, match="study study: trial 1 is logged already"):
            store.log_trial("study", 1, {"outcome": "dropped"})
        assert store.trials("study") == ({"outcome": "feasible"},)


def test_two_stores_see_each_others_facts_when_both_are_open(place: Place) -> None:
    with place.open() as one, place.open() as other:
        added = variant(one)
        assert other.find("v") == added
        other.log_trial("study", 1, {})
        assert one.trials("study") == ({},)


def test_facts_stay_in_their_store_when_stores_share_a_folder_of_artifacts(
    place: Place, tmp_path: Path
) -> None:
    with place.open() as store, Store(tmp_path / "other.sqlite", place.artifacts) as other:
        added = variant(store)
        assert other.find("v") is None
        assert variant(other) == added
