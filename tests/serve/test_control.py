"""Model control over a local repository: what is loaded, replaced and unloaded, and when."""

import asyncio
import json
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.slo import Slo
from serve.artifact import MANIFEST
from serve.control import ControlOptions, Mode, ModelControl
from serve.engines import EngineSpec
from serve.errors import (
    ArtifactInvalid,
    Forbidden,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    ModelNotReady,
)
from serve.metrics import Metrics
from serve.planning import Wanted
from serve.repository import Repository
from serve.storage import Storage, open_storage
from serve.storage.listing import DEFAULT_LIMITS, VersionListing
from serve.storage.local import LocalStorage
from serve.storage.onnx_file import OnnxFile
from serve.version_policy import VersionPolicy, parse_policy
from tests.serve import onnx_models
from tests.serve.versions import publish, slo_document


class Bench:
    """A control over the repository in `root`."""

    def __init__(self, root: Path, options: ControlOptions, storage: Storage | None = None) -> None:
        self.root = root
        self.table = Repository()
        self.metrics = Metrics()
        if storage is None:
            storage = OnnxFile(root) if root.suffix == ".onnx" else open_storage(root)
        self.control = ModelControl(storage, self.table, self.metrics, lambda batch: None, options)

    def states(self) -> dict[str, str]:
        return {f"{slot.name}:{slot.version}": slot.state for slot in self.table.slots()}


Scenario = Callable[[Bench], Coroutine[Any, Any, None]]


def play(
    root: Path,
    scenario: Scenario,
    mode: Mode = "none",
    storage: Storage | None = None,
    **options: Any,
) -> None:
    """Start a control, run the scenario, and unload everything."""

    async def run() -> None:
        bench = Bench(root, ControlOptions(mode, **options), storage)
        await bench.control.start()
        try:
            await scenario(bench)
        finally:
            await bench.control.close(finish=True)

    asyncio.run(run())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


def triton(root: Path, name: str, version: str, builder: onnx_models.Builder) -> Path:
    """A version in Triton's layout."""
    folder = root / name / version
    folder.mkdir(parents=True)
    return builder(folder / "model.onnx")


# --- the start


def test_control_loads_the_highest_version_of_every_model_when_it_starts(
    root: Path, tmp_path: Path
) -> None:
    for version in ("2", "9", "10"):
        publish(root, onnx_models.linear, tmp_path, version=version)
    publish(root, onnx_models.pair, tmp_path)

    async def scenario(bench: Bench) -> None:
        assert bench.states() == {"linear:10": "READY", "pair:1": "READY"}
        assert bench.table.is_ready

    play(root, scenario)


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        pytest.param("all", ["1", "2", "3"], id="all"),
        pytest.param("latest:2", ["2", "3"], id="the two latest"),
        pytest.param("specific:1,3,7", ["1", "3"], id="some, of which one is missing"),
    ],
)
def test_control_loads_the_versions_of_the_policy_when_it_says(
    root: Path, tmp_path: Path, policy: str, versions: list[str]
) -> None:
    for version in ("1", "2", "3"):
        publish(root, onnx_models.linear, tmp_path, version=version)

    async def scenario(bench: Bench) -> None:
        assert bench.table.versions("linear") == versions

    play(root, scenario, policy=parse_policy(policy))


def test_control_serves_the_others_when_some_versions_are_broken(
    root: Path, tmp_path: Path
) -> None:
    publish(root, onnx_models.linear, tmp_path)
    golden = {"golden": {"x": np.zeros(3, np.float32)}}
    publish(root, onnx_models.fixed, tmp_path, **golden, golden_outputs={"y": np.ones(3, "f4")})
    publish(root, onnx_models.pair, tmp_path, engine=EngineSpec("abacus", "model.onnx"))
    (publish(root, onnx_models.text, tmp_path) / MANIFEST).write_text("{")
    publish(root, onnx_models.ragged, tmp_path).parent.rename(root / "renamed")
    triton(root, "odd", "1", onnx_models.linear)
    (root / "odd" / "config.pbtxt").write_text("max_batch_size: many")
    triton(root, "nonsense", "1", onnx_models.linear).write_bytes(b"nonsense")

    async def scenario(bench: Bench) -> None:
        reasons = {slot.name: slot.reason for slot in bench.table.slots()}
        assert reasons["linear"] == ""
        assert "output 'y' differs" in reasons["fixed"]
        assert "engine 'abacus' is unknown, want one of" in reasons["pair"]
        assert "not valid JSON" in reasons["text"] or "manifest" in reasons["text"]
        assert "the manifest is of model 'ragged' version '1'" in reasons["renamed"]
        assert "config.pbtxt" in reasons["odd"]
        assert "can't load it" in reasons["nonsense"]
        assert not any(str(root) in reason for reason in reasons.values()), reasons
        assert bench.table.get("linear").manifest.version == "1"
        with pytest.raises(ModelNotReady, match="output 'y' differs"):
            bench.table.get("fixed")
        assert bench.table.is_ready

    play(root, scenario)


def test_control_serves_a_plain_file_when_that_is_all_there_is(tmp_path: Path) -> None:
    path = onnx_models.linear(tmp_path / "resnet-50.v2.onnx")
    (tmp_path / "another file").write_text("none of its business")

    async def scenario(bench: Bench) -> None:
        (slot,) = bench.table.slots()
        assert (slot.name, slot.version, slot.state) == ("resnet-50.v2", "1", "READY")
        assert slot.model is not None
        assert list(slot.model.manifest.files) == ["resnet-50.v2.onnx"]

    play(path, scenario)


def test_control_overrides_manifests_when_its_options_say_so(root: Path, tmp_path: Path) -> None:
    publish(root, onnx_models.linear, tmp_path, slo=slo_document(50.0))

    async def scenario(bench: Bench) -> None:
        model = bench.table.get("linear")
        assert model.slo is not None
        assert model.slo.latency.threshold_s == 0.02
        assert model.manifest.batching.oversize == "split"

    play(root, scenario, slo=Slo.model_validate(slo_document(20.0)), oversize="split")


# --- polling


def test_control_follows_the_repository_when_it_refreshes(root: Path, tmp_path: Path) -> None:
    publish(root, onnx_models.linear, tmp_path)
    publish(root, onnx_models.pair, tmp_path)

    async def scenario(bench: Bench) -> None:
        kept = bench.table.get("pair")
        publish(root, onnx_models.linear, tmp_path, version="2")
        publish(root, onnx_models.text, tmp_path)
        await bench.control.refresh()
        assert bench.states() == {
            "linear:1": "UNAVAILABLE", "linear:2": "READY", "pair:1": "READY", "text:1": "READY"
        }  # fmt: skip
        assert bench.table.get("pair") is kept  # what hasn't changed is not loaded again
        shutil.rmtree(root / "text")
        shutil.rmtree(root / "linear" / "2")
        await bench.control.refresh()
        assert "text:1" not in bench.states()
        assert bench.table.get("linear").manifest.version == "1"

    play(root, scenario, "poll")


def test_control_keeps_the_old_version_when_the_new_one_is_broken(
    root: Path, tmp_path: Path
) -> None:
    publish(root, onnx_models.linear, tmp_path)

    async def scenario(bench: Bench) -> None:
        old = bench.table.get("linear")
        directory = publish(root, onnx_models.linear, tmp_path, version="2")
        (directory / "model.onnx").write_bytes(b"x" * (directory / "model.onnx").stat().st_size)
        await bench.control.refresh()
        assert bench.states() == {"linear:1": "READY", "linear:2": "UNAVAILABLE"}
        assert bench.table.get("linear") is old
        assert bench.table.is_ready

    play(root, scenario, "poll")


def test_control_waits_for_a_second_look_when_a_version_has_no_manifest(
    root: Path, tmp_path: Path
) -> None:
    """Whoever copies a model there may be in the middle of it."""
    triton(root, "m", "1", onnx_models.linear)

    async def scenario(bench: Bench) -> None:
        triton(root, "m", "2", onnx_models.linear)
        await bench.control.refresh()
        assert bench.table.versions("m") == ["1"]
        await bench.control.refresh()
        assert bench.table.versions("m") == ["2"]

    play(root, scenario, "poll")


def test_control_loads_a_model_again_when_its_file_changes_in_place(
    root: Path, tmp_path: Path
) -> None:
    triton(root, "m", "1", onnx_models.linear)

    async def scenario(bench: Bench) -> None:
        old = bench.table.get("m")
        onnx_models.pair(root / "m" / "1" / "model.onnx")
        await bench.control.refresh()
        await bench.control.refresh()
        new = bench.table.get("m")
        assert new is not old
        assert [spec.name for spec in new.signature.inputs] == ["a", "b"]
        (root / "m" / "config.pbtxt").write_text("max_batch_size: 5")
        await bench.control.refresh()
        assert bench.table.get("m").max_batch_size == 5

    play(root, scenario, "poll")


# --- on request


def test_control_loads_and_unloads_on_request_when_it_is_explicit(
    root: Path, tmp_path: Path
) -> None:
    for builder in (onnx_models.linear, onnx_models.pair):
        publish(root, builder, tmp_path)

    async def scenario(bench: Bench) -> None:
        assert bench.states() == {"linear:1": "READY"}
        await bench.control.load(Wanted("pair"))
        assert bench.states() == {"linear:1": "READY", "pair:1": "READY"}
        await bench.control.unload("linear")
        assert bench.states() == {"linear:1": "UNAVAILABLE", "pair:1": "READY"}
        with pytest.raises(ModelNotReady, match="unloaded"):
            bench.table.get("linear")
        await bench.control.unload("pair")
        assert bench.table.is_ready  # nothing that was asked for is missing
        await bench.control.load(Wanted("linear"))
        assert bench.states()["linear:1"] == "READY"

    play(root, scenario, "explicit", models=(Wanted("linear"),))


def test_control_lists_what_is_not_loaded_when_it_is_explicit(root: Path, tmp_path: Path) -> None:
    publish(root, onnx_models.linear, tmp_path)

    async def scenario(bench: Bench) -> None:
        (slot,) = await bench.control.index()
        assert (slot.name, slot.version, slot.state) == ("linear", "1", "UNAVAILABLE")
        assert slot.reason == "not loaded"
        assert await bench.control.index(ready_only=True) == []

    play(root, scenario, "explicit")


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_control_refuses_requests_when_it_is_not_explicit(
    root: Path, tmp_path: Path, mode: Mode
) -> None:
    publish(root, onnx_models.linear, tmp_path)

    async def scenario(bench: Bench) -> None:
        with pytest.raises(Forbidden, match="--model-control explicit"):
            await bench.control.load(Wanted("linear"))
        with pytest.raises(Forbidden, match="--model-control explicit"):
            await bench.control.unload("linear")

    play(root, scenario, mode)


def test_control_knows_no_other_models_when_asked_for_them(root: Path, tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        for name in ("absent", "../repository", "a/b", "", "a\0"):
            with pytest.raises((ModelNotFound, LoadFailed)):
                await bench.control.load(Wanted(name))
        with pytest.raises(ModelNotFound):
            await bench.control.unload("absent")

    play(root, scenario, "explicit")


def test_control_gives_the_reason_and_keeps_what_answers_when_a_load_fails(
    root: Path, tmp_path: Path
) -> None:
    directory = publish(root, onnx_models.linear, tmp_path)

    async def scenario(bench: Bench) -> None:
        old = bench.table.get("linear")
        manifest = json.loads((directory / MANIFEST).read_text())
        manifest["engine"]["name"] = "abacus"
        (directory / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(LoadFailed, match="engine 'abacus' is unknown"):
            await bench.control.load(Wanted("linear"))
        assert bench.table.get("linear") is old

    play(root, scenario, "explicit", models=(Wanted("linear"),))


def test_control_loads_the_pinned_content_when_a_digest_is_given(
    root: Path, tmp_path: Path
) -> None:
    for version in ("1", "2"):
        publish(root, onnx_models.linear, tmp_path, version=version)

    async def scenario(bench: Bench) -> None:
        (slot,) = bench.table.slots()
        assert slot.version == "2"
        await bench.control.load(Wanted("linear", config='{"version_policy": {"all": {}}}'))
        digests = {slot.version: slot.digest for slot in bench.table.slots()}
        assert digests["1"] != digests["2"]
        await bench.control.load(Wanted("linear", digest=digests["1"]))
        assert bench.table.versions("linear") == ["1"]
        with pytest.raises(LoadFailed, match=f"no version has sha256:{'0' * 64}"):
            await bench.control.load(Wanted("linear", digest=f"sha256:{'0' * 64}"))
        with pytest.raises(InvalidRequest, match="digest: got 'latest', want sha256:"):
            await bench.control.load(Wanted("linear", digest="latest"))
        assert bench.table.versions("linear") == ["1"]

    play(root, scenario, "explicit", models=(Wanted("linear"),))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param("{", "parameters.config", id="it is no JSON"),
        pytest.param('{"max_batch": 4}', "parameters.config", id="a field is unknown"),
        pytest.param(
            '{"max_batch_size": 4}', "want version_policy only",
            id="it contradicts the version's manifest",
        ),
    ],
)  # fmt: skip
def test_control_refuses_a_configuration_when(
    root: Path, tmp_path: Path, config: str, message: str
) -> None:
    publish(root, onnx_models.linear, tmp_path)

    async def scenario(bench: Bench) -> None:
        with pytest.raises(InvalidRequest, match=message):
            await bench.control.load(Wanted("linear", config=config))

    play(root, scenario, "explicit")


def test_control_follows_the_clients_configuration_when_the_layout_is_tritons(
    root: Path, tmp_path: Path
) -> None:
    triton(root, "m", "1", onnx_models.linear)

    async def scenario(bench: Bench) -> None:
        await bench.control.load(Wanted("m", config='{"max_batch_size": 3}'))
        assert bench.table.get("m").max_batch_size == 3
        await bench.control.load(Wanted("m"))
        assert bench.table.get("m").max_batch_size == 32

    play(root, scenario, "explicit")


def test_control_lets_requests_finish_when_it_unloads(root: Path, tmp_path: Path) -> None:
    publish(root, onnx_models.linear, tmp_path)

    async def scenario(bench: Bench) -> None:
        model = bench.table.get("linear")
        model.n_leases += 1  # a request is at work with it
        unloading = asyncio.create_task(bench.control.unload("linear"))
        while bench.states()["linear:1"] == "READY":
            await asyncio.sleep(0)
        assert bench.states()["linear:1"] == "UNLOADING"
        (entry,) = model.entries({"x": np.zeros((1, 4), np.float32)}, 1, 0.0, np.inf)
        model.batcher.submit(entry)  # it still may
        assert not unloading.done()
        model.n_leases -= 1
        await unloading
        assert bench.states()["linear:1"] == "UNAVAILABLE"

    play(root, scenario, "explicit", models=(Wanted("linear"),))


def test_control_finishes_a_load_when_its_client_goes_away(root: Path, tmp_path: Path) -> None:
    publish(root, onnx_models.linear, tmp_path)

    async def scenario(bench: Bench) -> None:
        loading = asyncio.create_task(bench.control.load(Wanted("linear")))
        while bench.states().get("linear:1") != "LOADING":
            await asyncio.sleep(0)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        while bench.states()["linear:1"] == "LOADING":
            await asyncio.sleep(0)
        assert bench.states() == {"linear:1": "READY"}

    play(root, scenario, "explicit")


def test_control_starts_with_the_rest_when_a_named_model_is_missing(
    root: Path, tmp_path: Path
) -> None:
    publish(root, onnx_models.linear, tmp_path)

    async def scenario(bench: Bench) -> None:
        assert bench.states() == {"absent:": "UNAVAILABLE", "linear:1": "READY"}
        with pytest.raises(ModelNotReady, match="'absent' is not in the repository"):
            bench.table.get("absent")
        assert bench.table.is_ready
        publish(root, onnx_models.pair, tmp_path).parent.rename(root / "absent")
        with pytest.raises(LoadFailed, match="the manifest is of model 'pair'"):
            await bench.control.load(Wanted("absent"))
        assert bench.states() == {"absent:1": "UNAVAILABLE", "linear:1": "READY"}

    play(root, scenario, "explicit", models=(Wanted("absent"), Wanted("linear")))


def test_control_is_not_ready_when_all_that_was_named_is_missing(root: Path) -> None:
    async def scenario(bench: Bench) -> None:
        assert not bench.table.is_ready
        (slot,) = await bench.control.index()
        assert (slot.name, slot.state) == ("absent", "UNAVAILABLE")

    play(root, scenario, "explicit", models=(Wanted("absent"),))


class FlakyStorage(LocalStorage):
    """Fetching fails as often as it is told to; `n_fetches` counts the tries."""

    n_failures = 0
    n_fetches = 0

    def fetch(self, model: str, listing: VersionListing) -> Path:
        self.n_fetches += 1
        if self.n_failures:
            self.n_failures -= 1
            raise ArtifactInvalid(self.url, "the network is down")
        return super().fetch(model, listing)


@pytest.mark.parametrize("mode", ["poll", "explicit"])
def test_control_tries_again_when_the_storage_failed_and_not_the_version(
    root: Path, tmp_path: Path, mode: Mode
) -> None:
    publish(root, onnx_models.linear, tmp_path)
    storage = FlakyStorage(root, DEFAULT_LIMITS)
    storage.n_failures = 2

    async def scenario(bench: Bench) -> None:
        async def again() -> None:
            if mode == "poll":
                await bench.control.refresh()
            else:
                await bench.control.load(Wanted("linear"))

        if mode == "explicit":
            with pytest.raises(LoadFailed, match="repository: the network is down"):
                await again()
        else:
            await again()
        assert bench.states() == {"linear:1": "UNAVAILABLE"}
        await again()
        assert bench.states() == {"linear:1": "READY"}

    models = (Wanted("linear"),) if mode == "explicit" else ()
    play(root, scenario, mode, storage=storage, models=models)


def test_control_tries_a_broken_version_once_when_it_polls(root: Path, tmp_path: Path) -> None:
    storage = FlakyStorage(root, DEFAULT_LIMITS)
    directory = publish(root, onnx_models.linear, tmp_path)
    manifest = (directory / MANIFEST).read_text()

    async def scenario(bench: Bench) -> None:
        (directory / MANIFEST).write_text(manifest.replace('"onnxruntime"', '"abacus"'))
        for _ in range(4):
            await bench.control.refresh()
        assert storage.n_fetches == 2  # the good one, and the broken one in its place
        assert bench.states() == {"linear:1": "READY"}
        (directory / MANIFEST).write_text(manifest)
        await bench.control.refresh()
        assert storage.n_fetches <= 3

    play(root, scenario, "poll", storage=storage)


def test_control_tries_a_broken_version_again_when_it_is_asked_to(
    root: Path, tmp_path: Path
) -> None:
    storage = FlakyStorage(root, DEFAULT_LIMITS)
    publish(root, onnx_models.linear, tmp_path, engine=EngineSpec("abacus", "model.onnx"))

    async def scenario(bench: Bench) -> None:
        for n in (1, 2):
            with pytest.raises(LoadFailed, match="abacus"):
                await bench.control.load(Wanted("linear"))
            assert storage.n_fetches == n

    play(root, scenario, "explicit", storage=storage)


def test_control_forgets_what_is_deleted_when_it_refreshes(root: Path, tmp_path: Path) -> None:
    for version in ("1", "2"):
        publish(root, onnx_models.linear, tmp_path, version=version)
    triton(root, "m", "1", onnx_models.linear)
    (root / "m" / "config.pbtxt").write_text("max_batch_size: 4")

    async def scenario(bench: Bench) -> None:
        shutil.rmtree(root / "linear" / "1")
        shutil.rmtree(root / "m" / "1")  # its configuration alone is no model
        await bench.control.refresh()
        assert bench.states() == {"linear:2": "READY"}

    play(root, scenario, "poll", policy=parse_policy("all"))


def test_control_shows_a_model_that_can_not_be_read_when_it_refreshes(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(root, onnx_models.linear, tmp_path)
    (tmp_path / "outside").mkdir()
    (root / "evil").mkdir()
    (root / "evil" / "1").symlink_to(tmp_path / "outside")

    async def scenario(bench: Bench) -> None:
        await bench.control.refresh()
        (evil,) = bench.table.slots("evil")
        assert evil.state == "UNAVAILABLE"
        assert "leads out" in evil.reason
        assert str(tmp_path) not in evil.reason
        assert caplog.text.count("leads out") == 1  # not at every look
        (root / "evil" / "1").unlink()
        shutil.rmtree(root / "evil")
        await bench.control.refresh()
        assert bench.states() == {"linear:1": "READY"}

    play(root, scenario, "poll")


def test_control_names_no_folder_of_this_machine_when_it_gives_reasons(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton(root, "broken", "1", onnx_models.linear).write_bytes(b"nonsense")
    triton(root, "labels", "1", onnx_models.linear)
    (root / "labels" / "config.pbtxt").write_text(
        'max_batch_size: 1 output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] '
        'label_filename: "missing.txt" } ]'
    )
    monkeypatch.chdir(root)

    async def scenario(bench: Bench) -> None:
        reasons = {slot.name: slot.reason for slot in bench.table.slots()}
        assert "labels/missing.txt" in reasons["labels"]
        assert "broken/1/model.onnx" in reasons["broken"]
        assert not [reason for reason in reasons.values() if str(tmp_path) in reason]

    play(root, scenario)
    play(Path(), scenario)


def test_control_uses_the_latest_policy_when_none_is_given() -> None:
    assert ControlOptions().policy == VersionPolicy(latest=1)
