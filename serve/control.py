"""Model control: brings versions from the repository's storage into the table of loaded models.

Loading happens in worker threads, beside what runs; the new version takes over in one step, and
the old one ends when its last request is answered. A version that can't be loaded leaves those
that answer where they are. It knows no transport.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from loadtest.slo import Slo
from serve.artifact import Manifest, file_digest, read_manifest
from serve.batcher import Batch
from serve.derivation import manifest_for_onnx
from serve.engines import EngineUnavailable
from serve.errors import (
    ArtifactInvalid,
    Forbidden,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
)
from serve.loading import load_model
from serve.metrics import Metrics
from serve.model import Model
from serve.model_config import parse_config, parse_config_json, policy_of
from serve.model_config_pb2 import ModelConfig
from serve.repository import Repository, Slot
from serve.storage import Storage
from serve.storage.digest import files_digest, parse_digest, version_digest
from serve.storage.listing import ModelListing, VersionListing, settled
from serve.storage.onnx_file import OnnxFile
from serve.triton import label_files, labels_of_layout, manifest_of_layout
from serve.version_policy import VersionPolicy

_log = logging.getLogger(__name__)

Mode = Literal["none", "poll", "explicit"]
_RETIRE_POLL_S = 0.005
_LISTING_AGE_S = 1.0


@dataclass(frozen=True)
class Wanted:
    """A model to load: which of its versions, and as what.

    `config` stands in for the folder's config.pbtxt; `digest` picks the one version of that
    content, whatever the policy says.
    """

    name: str
    config: str = ""
    digest: str = ""


@dataclass(frozen=True)
class ControlOptions:
    """`models` are those to start with in mode "explicit"; the others start with all. The policy
    is that of models whose configuration has none. `slo` and `oversize` override the manifests'."""

    mode: Mode = "none"
    models: tuple[Wanted, ...] = ()
    policy: VersionPolicy = field(default_factory=VersionPolicy)
    slo: Slo | None = None
    oversize: Literal["refuse", "split"] | None = None


@dataclass(frozen=True)
class _Plan:
    """What a model should be: the versions to have, and what each of them is made from."""

    listing: ModelListing
    config: ModelConfig | None
    versions: tuple[VersionListing, ...]
    override: str = ""

    def key(self, version: VersionListing) -> str:
        """Changes where loading the version again would give something else."""
        shared = "" if version.has_manifest else self.listing.side_fingerprint
        return "\n".join((version.fingerprint, shared, self.override))


class ModelControl:
    """Changes the table: at the start, by polling, or on request, as the mode allows. `retired` is
    told of every model that has ended.

    Everything but `_loaded`, which runs in a thread, belongs to the event loop.
    """

    def __init__(
        self,
        storage: Storage,
        repository: Repository,
        metrics: Metrics,
        deliver: Callable[[Batch], None],
        options: ControlOptions,
        retired: Callable[[Model], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._repository = repository
        self._metrics = metrics
        self._deliver = deliver
        self._options = options
        self._retired = retired
        self._keys: dict[tuple[str, str], str] = {}
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._problem = ""
        self._scanned: dict[str, ModelListing] | None = None
        self._accepted: dict[str, ModelListing] = {}
        self._clock = clock
        self._listed: Mapping[str, ModelListing] = {}
        self._listed_s = -math.inf

    @property
    def mode(self) -> Mode:
        return self._options.mode

    async def start(self) -> None:
        """Load what the mode says, then open the table. Failures end in their slots' reasons;
        raises ArtifactInvalid where the repository itself can't be read."""
        if self.mode == "explicit":
            for wanted in self._options.models:
                try:
                    await self._load(wanted)
                except (LoadFailed, ModelNotFound) as error:
                    _log.error("%s", error)
        else:
            await self.refresh()
        self._repository.open()

    async def refresh(self) -> None:
        """Make the table what the storage holds: new and changed versions in, missing ones out.

        After the first time, what may still be being written waits for the next one.
        """
        found = await asyncio.to_thread(self._storage.scan)
        async with self._changing:
            listings = found
            if self._scanned is not None:
                listings = settled(found, self._scanned, self._accepted)
            self._scanned, self._accepted = found, listings
            for name in {slot.name for slot in self._repository.slots()} - set(listings):
                await self._retire_all(list(self._repository.slots(name)), forget=True)
            plans = []
            for listing in listings.values():
                try:
                    plans.append(self._planned(listing, Wanted(listing.name)))
                except ArtifactInvalid as error:
                    self._put_problem(listing, str(error).replace(self._storage.url, "repository"))
            for plan in plans:
                self._announce(plan)
            for plan in plans:
                await self._apply(plan)
            await asyncio.to_thread(self._storage.prune, self._in_use())

    async def poll(self, interval_s: float) -> None:
        """Refresh for ever. A storage that doesn't answer is logged once, and asked again."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.refresh()
                self._problem = ""
            except ArtifactInvalid as error:
                if str(error) != self._problem:
                    _log.error("polling: %s", error)
                self._problem = str(error)
            except Exception:  # noqa: BLE001 - the next turn may succeed, and polling must not end
                _log.exception("polling failed")

    async def load(self, wanted: Wanted) -> None:
        """Load a model, or load it again, as its client asks.

        Raises Forbidden in another mode than "explicit", ModelNotFound, InvalidRequest, or
        LoadFailed with the reasons; what was there before then goes on answering.
        """
        self._check_explicit()
        await self._to_the_end(self._load(wanted))

    async def unload(self, name: str) -> None:
        """Unload all versions of a model, after the requests that they are at work on. Raises
        Forbidden in another mode than "explicit", and ModelNotFound."""
        self._check_explicit()
        await self._to_the_end(self._unload(name))

    async def index(self, ready_only: bool = False) -> list[Slot]:
        """All versions of the table, and those in the storage that are not loaded."""
        known = list(self._repository.slots())
        if ready_only:
            return [slot for slot in known if slot.state == "READY"]
        have = {(slot.name, slot.version) for slot in known}
        others = [
            Slot(name, version.version, "UNAVAILABLE", "not loaded", wanted=False)
            for name, listing in (await self._listings()).items()
            for version in listing.versions
            if (name, version.version) not in have
        ]
        return sorted([*known, *others], key=lambda slot: (slot.name, int(slot.version)))

    async def _listings(self) -> Mapping[str, ModelListing]:
        """What the storage holds, asked at most once a second: clients may ask for the index as
        often as they like. Nothing outside of mode "explicit", which leaves nothing aside."""
        if self.mode != "explicit":
            return {}
        now = self._clock()
        if now - self._listed_s > _LISTING_AGE_S:
            self._listed_s = now
            try:
                self._listed = await asyncio.to_thread(self._storage.scan)
            except ArtifactInvalid as error:
                _log.error("listing the repository: %s", error)
        return self._listed

    async def close(self, finish: bool) -> None:
        """Finish what the models have admitted, or only what runs, and unload them."""
        models = [slot.model for slot in self._repository.slots() if slot.model is not None]
        await asyncio.gather(*(asyncio.to_thread(model.close, finish) for model in models))

    async def _to_the_end(self, change: Coroutine[None, None, None]) -> None:
        """Wait for a change, which goes on to its end even where its client doesn't: half of one
        would leave a version that loads for ever."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_failure)
            raise

    async def _unload(self, name: str) -> None:
        async with self._changing:
            slots = list(self._repository.slots(name))
            if not slots:
                raise ModelNotFound(name)
            await self._retire_all(slots, forget=False)

    def _check_explicit(self) -> None:
        if self.mode != "explicit":
            raise Forbidden(
                f"models are loaded and unloaded by --model-control {self.mode} here; start the "
                "server with --model-control explicit to do it by request"
            )

    async def _load(self, wanted: Wanted) -> None:
        try:
            listing = await asyncio.to_thread(self._storage.scan_model, wanted.name)
        except ArtifactInvalid as error:
            raise LoadFailed(wanted.name, str(error)) from error
        if listing is None:
            raise ModelNotFound(wanted.name)
        async with self._changing:
            try:
                plan = self._planned(listing, wanted)
                if wanted.digest:
                    plan = await asyncio.to_thread(self._pinned, plan, wanted.digest)
            except ArtifactInvalid as error:
                raise LoadFailed(wanted.name, str(error)) from error
            self._announce(plan)
            failures = await self._apply(plan)
        if failures:
            raise LoadFailed(wanted.name, "; ".join(failures))

    def _planned(self, listing: ModelListing, wanted: Wanted) -> _Plan:
        """The versions of `listing` that its policy wants. Raises ArtifactInvalid where the
        configuration is broken or there is no version to have."""
        if listing.problem:
            raise ArtifactInvalid(listing.name, listing.problem)
        where = f"{listing.name}/config.pbtxt"
        is_manifest = all(version.has_manifest for version in listing.versions)
        config = None
        if wanted.config:
            try:
                config = parse_config_json(wanted.config, "parameters.config")
            except ArtifactInvalid as error:
                raise InvalidRequest("parameters.config", "a configuration", str(error)) from error
            if config.name not in ("", listing.name):
                want = f"{listing.name!r}, or none"
                raise InvalidRequest("parameters.config.name", config.name, want)
            _check_override(config, is_manifest)
        elif listing.config is not None and not is_manifest:
            config = parse_config(listing.config, where)
        given = policy_of(config, where) if config is not None else None
        policy = given or self._options.policy
        names = [version.version for version in listing.versions]
        selected = policy.select(names)
        for missing in policy.missing(names):
            _log.warning("version %s isn't there", missing, extra={"model": wanted.name})
        if not selected:
            raise ArtifactInvalid(listing.name, f"no version to serve, there are {names}")
        versions = tuple(one for one in listing.versions if one.version in selected)
        return _Plan(listing, config, versions, wanted.config)

    def _pinned(self, plan: _Plan, digest: str) -> _Plan:
        """The plan for the one version whose content has `digest`. Runs in a thread."""
        wanted = parse_digest(digest)
        found = []
        for version in reversed(plan.listing.versions):
            got = version_digest(self._storage.fetch(plan.listing.name, version))
            if got == wanted:
                return _Plan(plan.listing, plan.config, (version,), plan.override + digest)
            found.append(f"{version.version} has {got}")
        raise ArtifactInvalid(plan.listing.name, f"no version has {wanted}; {', '.join(found)}")

    def _announce(self, plan: _Plan) -> None:
        """Show as loading what isn't there yet."""
        for version in plan.versions:
            known = {slot.version: slot for slot in self._repository.slots(plan.listing.name)}
            slot = known.get(version.version)
            if slot is None or (slot.state != "READY" and self._is_new(plan, version)):
                name = plan.listing.name
                self._repository.put(Slot(name, version.version, "LOADING", "loading"))

    async def _apply(self, plan: _Plan) -> list[str]:
        """Bring the plan's versions in and take the model's others out; the reasons of failures.

        The old versions stay while nothing of the plan answers.
        """
        name = plan.listing.name
        failures = []
        for version in plan.versions:
            slot = self._repository.slot(name, version.version)
            if slot.state == "READY" and not self._is_new(plan, version):
                continue
            if slot.state == "UNAVAILABLE" and not self._is_new(plan, version):
                failures.append(f"version {version.version}: {slot.reason}")
                continue
            reason = await self._replace(plan, version, slot)
            if reason:
                failures.append(f"version {version.version}: {reason}")
        wanted = {version.version for version in plan.versions}
        if any(s.state == "READY" for s in self._repository.slots(name) if s.version in wanted):
            others = [s for s in self._repository.slots(name) if s.version not in wanted]
            await self._retire_all(others, forget=False)
        return failures

    async def _replace(self, plan: _Plan, version: VersionListing, slot: Slot) -> str:
        """Load a version; it takes over where that succeeds. The reason where it doesn't."""
        name = plan.listing.name
        loaded = await asyncio.to_thread(self._loaded, plan, version)
        if loaded.model is None and slot.model is not None:
            _log.error("the version that answers stays", extra={"model": f"{name}:{slot.version}"})
            return loaded.reason
        self._keys[name, version.version] = plan.key(version)
        self._repository.put(loaded)
        if loaded.model is not None:
            self._metrics.model_loaded(loaded.model)
        if slot.model is not None:
            await self._retire(slot.model)
        return loaded.reason

    def _is_new(self, plan: _Plan, version: VersionListing) -> bool:
        return self._keys.get((plan.listing.name, version.version)) != plan.key(version)

    def _put_problem(self, listing: ModelListing, reason: str) -> None:
        """Report a model that can't even be planned, unless one of its versions answers."""
        if any(slot.state == "READY" for slot in self._repository.slots(listing.name)):
            _log.error("not loaded again: %s", reason, extra={"model": listing.name})
            return
        for version in listing.versions[-1:]:
            self._repository.put(Slot(listing.name, version.version, "UNAVAILABLE", reason))

    async def _retire_all(self, slots: Sequence[Slot], forget: bool) -> None:
        for slot in slots:
            if slot.model is not None:
                unloading = Slot(slot.name, slot.version, "UNLOADING", "unloading", wanted=False)
                self._repository.put(unloading)
        for slot in slots:
            if slot.model is not None:
                await self._retire(slot.model)
                self._metrics.model_unloaded(slot.name, slot.version)
            self._keys.pop((slot.name, slot.version), None)
            if forget:
                self._repository.remove(slot.name, slot.version)
            else:
                gone = Slot(slot.name, slot.version, "UNAVAILABLE", "unloaded", wanted=False)
                self._repository.put(gone)

    async def _retire(self, model: Model) -> None:
        """End a model that requests can't find any more, after those that are at work with it."""
        while model.n_leases:
            await asyncio.sleep(_RETIRE_POLL_S)
        await asyncio.to_thread(model.close)
        self._retired(model)
        _log.info("unloaded", extra={"model": f"{model.manifest.model}:{model.manifest.version}"})

    def _in_use(self) -> set[Path]:
        return {slot.model.directory for slot in self._repository.slots() if slot.model is not None}

    def _loaded(self, plan: _Plan, version: VersionListing) -> Slot:
        """Fetch, read and load a version. Runs in a thread; failures end in the slot's reason,
        which clients see: it names no folder of this machine."""
        name = plan.listing.name
        label = {"model": f"{name}:{version.version}"}
        hidden = self._storage.url
        try:
            directory = self._storage.fetch(name, version)
            hidden = str(directory)
            manifest, labels = self._read(plan, version, directory)
            if self._options.oversize is not None:
                batching = replace(manifest.batching, oversize=self._options.oversize)
                manifest = replace(manifest, batching=batching)
            model = load_model(directory, manifest, self._deliver, self._options.slo, labels)
        except (ArtifactInvalid, EngineUnavailable) as error:
            _log.error("not loaded: %s", error, extra=label)
            reason = str(error).replace(hidden, f"{name}/{version.version}")
            return Slot(name, version.version, "UNAVAILABLE", reason)
        except Exception as error:  # noqa: BLE001 - a broken version must not hide the others
            _log.exception("not loaded", extra=label)
            reason = f"{type(error).__name__} while loading, see the log"
            return Slot(name, version.version, "UNAVAILABLE", reason)
        _log.info("ready", extra=label)
        has_manifest = version.has_manifest
        digest = version_digest(directory) if has_manifest else files_digest(manifest.files)
        return Slot(name, version.version, "READY", model=model, digest=digest)

    def _read(
        self, plan: _Plan, version: VersionListing, directory: Path
    ) -> tuple[Manifest, dict[str, tuple[str, ...]]]:
        """The version's manifest, and the class names that lie beside it."""
        name = plan.listing.name
        if isinstance(self._storage, OnnxFile):
            path = self._storage.path
            return manifest_for_onnx(path, name, file_digest(path)), {}
        if not version.has_manifest:
            manifest = manifest_of_layout(directory, name, version.version, plan.config)
            side = self._storage.fetch_side_files(plan.listing, label_files(plan.config))
            return manifest, labels_of_layout(plan.config, side)
        manifest = read_manifest(directory)
        if (manifest.model, manifest.version) != (name, version.version):
            raise ArtifactInvalid(
                str(directory),
                f"the manifest is of model {manifest.model!r} version {manifest.version!r}",
            )
        return manifest, {}


def _log_failure(task: asyncio.Task[None]) -> None:
    """The end of a change that nobody waits for."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s", error)


def _check_override(config: ModelConfig, is_manifest: bool) -> None:
    """A version with a manifest is described by it; a load call may choose among them only."""
    given = {field.name for field, _ in config.ListFields()} - {"name", "version_policy"}
    if is_manifest and given:
        raise InvalidRequest(
            "parameters.config",
            ", ".join(sorted(given)),
            "version_policy only, for versions described by their manifest.json",
        )
