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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loadtest.slo import Slo
from serve.batcher import Batch
from serve.errors import (
    ArtifactInvalid,
    Forbidden,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    ShuttingDown,
)
from serve.loader import Loader
from serve.metrics import Metrics
from serve.model import Model
from serve.planning import Plan, Wanted, planned
from serve.repository import UNVERSIONED, Repository, Slot, number_of
from serve.storage import Storage
from serve.storage.listing import ModelListing, VersionListing, settled
from serve.version_policy import VersionPolicy

_log = logging.getLogger(__name__)

Mode = Literal["none", "poll", "explicit"]
_RETIRE_POLL_S = 0.005
_LISTING_AGE_S = 1.0


@dataclass(frozen=True)
class ControlOptions:
    """`models` are those to start with in mode "explicit"; the others start with all. The policy
    is that of models whose configuration has none. `slo` and `oversize` override the manifests'."""

    mode: Mode = "none"
    models: tuple[Wanted, ...] = ()
    policy: VersionPolicy = field(default_factory=VersionPolicy)
    slo: Slo | None = None
    oversize: Literal["refuse", "split"] | None = None
    trust_code: bool = False


class ModelControl:
    """Changes the table: at the start, by polling, or on request, as the mode allows. `retired` is
    told of every model that has ended.

    Everything here belongs to the event loop; what takes long runs in threads.
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
        self._options = options
        self._retired = retired
        self._loader = Loader(storage, deliver, options.slo, options.oversize, options.trust_code)
        self._keys: dict[tuple[str, str], str] = {}  # of what was loaded
        self._failures: dict[tuple[str, str], tuple[str, str]] = {}  # key and reason, to stay
        self._closed = False
        self._changing = asyncio.Lock()
        self._listing = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._problems: dict[str, str] = {}  # by model; that of the whole repository by ""
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
                except (InvalidRequest, LoadFailed, ModelNotFound) as error:
                    self._put_problem(wanted.name, str(error))
        else:
            await self.refresh()
        self._repository.open()

    async def refresh(self) -> None:
        """Make the table what the storage holds: new and changed versions in, missing ones out.

        After the first time, what may still be being written waits for the next one.
        """
        async with self._changing:
            found = await asyncio.to_thread(self._storage.scan)
            listings = found
            if self._scanned is not None:
                listings = settled(found, self._scanned, self._accepted)
            self._scanned, self._accepted = found, listings
            there = {listing.name for listing in listings.values() if _is_there(listing)}
            for name in {slot.name for slot in self._repository.slots()} - there:
                await self._retire_all(list(self._repository.slots(name)), forget=True)
            plans = []
            for name in sorted(there):
                try:
                    plans.append(planned(listings[name], Wanted(name), self._options.policy))
                    self._problems.pop(name, None)
                except ArtifactInvalid as error:
                    self._put_problem(name, self._loader.client_text(error))
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
                self._problems.pop("", None)
            except ArtifactInvalid as error:
                self._log_once("", str(error))
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
        return sorted([*known, *others], key=lambda slot: (slot.name, number_of(slot.version)))

    async def _listings(self) -> Mapping[str, ModelListing]:
        """What the storage holds, asked at most once a second: clients may ask for the index as
        often as they like. Nothing outside of mode "explicit", which leaves nothing aside."""
        if self.mode != "explicit":
            return {}
        async with self._listing:
            if self._clock() - self._listed_s > _LISTING_AGE_S:
                try:
                    self._listed = await asyncio.to_thread(self._storage.scan)
                    self._problems.pop("", None)
                except ArtifactInvalid as error:
                    self._log_once("", str(error))
                self._listed_s = self._clock()
        return self._listed

    async def close(self, finish: bool) -> None:
        """Finish what the models have admitted, or only what runs, and unload them. Nothing is
        loaded any more."""
        self._closed = True
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

    def stop_changing(self) -> None:
        """Refuse to load and unload from now on: the server is about to end."""
        self._closed = True

    def _check_explicit(self) -> None:
        if self._closed:
            raise ShuttingDown
        if self.mode != "explicit":
            raise Forbidden(
                f"models are loaded and unloaded by --model-control {self.mode} here; start the "
                "server with --model-control explicit to do it by request"
            )

    async def _load(self, wanted: Wanted) -> None:
        async with self._changing:
            try:
                listing = await asyncio.to_thread(self._storage.scan_model, wanted.name)
                if listing is None:
                    raise ModelNotFound(wanted.name)
                plan = planned(listing, wanted, self._options.policy)
                if wanted.digest:
                    plan = await asyncio.to_thread(self._loader.pinned, plan, wanted.digest)
            except ArtifactInvalid as error:
                raise LoadFailed(wanted.name, self._loader.client_text(error)) from error
            self._announce(plan)
            failures = await self._apply(plan, again=True)
            await asyncio.to_thread(self._storage.prune, self._in_use())
        if failures:
            raise LoadFailed(wanted.name, "; ".join(failures))

    def _announce(self, plan: Plan) -> None:
        """Show as loading what isn't there yet."""
        name = plan.listing.name
        self._repository.remove(name, UNVERSIONED)
        known = {slot.version: slot.state for slot in self._repository.slots(name)}
        for version in plan.versions:
            failed = self._failure(plan, version)
            if known.get(version.version) != "READY" and not failed:
                self._repository.put(Slot(name, version.version, "LOADING", "loading"))

    async def _apply(self, plan: Plan, again: bool = False) -> list[str]:
        """Bring the plan's versions in and take the model's others out; the reasons of failures.

        The old versions stay while nothing of the plan answers. What failed for its content is
        tried again only where its files have changed, or with `again`.
        """
        name = plan.listing.name
        failures = []
        for version in plan.versions:
            slot = self._repository.slot(name, version.version)
            key = (name, version.version)
            if slot.state == "READY" and self._keys.get(key) == plan.key(version):
                continue
            reason = "" if again else self._failure(plan, version)
            reason = reason or await self._replace(plan, version, slot)
            if reason:
                failures.append(f"version {version.version}: {reason}")
        wanted = {version.version for version in plan.versions}
        if any(s.state == "READY" for s in self._repository.slots(name) if s.version in wanted):
            others = [s for s in self._repository.slots(name) if s.version not in wanted]
            there = {version.version for version in plan.listing.versions}
            await self._retire_all([s for s in others if s.version in there], forget=False)
            await self._retire_all([s for s in others if s.version not in there], forget=True)
        return failures

    async def _replace(self, plan: Plan, version: VersionListing, slot: Slot) -> str:
        """Load a version; it takes over where that succeeds. The reason where it doesn't."""
        key = (plan.listing.name, version.version)
        loaded = await asyncio.to_thread(self._loader.load, plan, version)
        self._failures.pop(key, None)
        if loaded.model is None:
            if loaded.is_final:
                self._failures[key] = (plan.key(version), loaded.reason)
            if slot.model is None:
                self._repository.put(Slot(*key, "UNAVAILABLE", loaded.reason))
            else:
                _log.error("what answers stays", extra={"model": ":".join(key)})
            return loaded.reason
        self._keys[key] = plan.key(version)
        self._metrics.model_loaded(loaded.model)
        self._repository.put(Slot(*key, "READY", model=loaded.model, digest=loaded.digest))
        if slot.model is not None:
            await self._retire(slot.model)
        return ""

    def _failure(self, plan: Plan, version: VersionListing) -> str:
        """Why a version as it is now could not be loaded before; empty where that is not known."""
        key, reason = self._failures.get((plan.listing.name, version.version), ("", ""))
        return reason if key == plan.key(version) else ""

    def _put_problem(self, name: str, reason: str) -> None:
        """Report a model that can't even be planned, unless one of its versions answers."""
        self._log_once(name, reason)
        slots = list(self._repository.slots(name))
        if not any(slot.state == "READY" for slot in slots):
            version = slots[-1].version if slots else UNVERSIONED
            self._repository.put(Slot(name, version, "UNAVAILABLE", reason))

    def _log_once(self, name: str, problem: str) -> None:
        if self._problems.get(name) != problem:
            _log.error("%s", problem, extra={"model": name} if name else None)
        self._problems[name] = problem

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
            self._failures.pop((slot.name, slot.version), None)
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


def _log_failure(task: asyncio.Task[None]) -> None:
    """The end of a change that nobody waits for."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s", error)


def _is_there(listing: ModelListing) -> bool:
    """A folder with nothing but a configuration is no model (any more)."""
    return bool(listing.versions or listing.problem)
