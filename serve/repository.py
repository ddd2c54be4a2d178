"""The table of loaded models: which version of what answers, and why others don't.

Owned by the event loop; look-ups never wait. A version that fails to load is reported with its
reason and hides no other. It loads nothing itself, and knows nothing of requests.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from serve.errors import ModelNotFound, ModelNotReady
from serve.model import Model

# The version of a model of which nothing but its problem is known.
UNVERSIONED = ""

State = Literal["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]


@dataclass(frozen=True)
class Slot:
    """A version of a model in the index. `model` is there in state READY only; `digest` is the one
    that pins the version's content, known once it was read. `wanted` is false for what nobody asked
    to be loaded: its absence keeps nothing from being ready."""

    name: str
    version: str
    state: State
    reason: str = ""
    model: Model | None = None
    digest: str = ""
    wanted: bool = True


def number_of(version: str) -> int:
    """Versions sort by number, the unversioned first."""
    return int(version or 0)


class Repository:
    """Versions by model name and version."""

    def __init__(self) -> None:
        self._slots: dict[str, dict[str, Slot]] = {}
        self._defaults: dict[str, Slot] = {}  # of every model: what no version named means
        self._open = False

    def put(self, slot: Slot) -> None:
        """Add or replace a version; from now on requests find this one."""
        self._slots.setdefault(slot.name, {})[slot.version] = slot
        self._choose_default(slot.name)

    def remove(self, name: str, version: str) -> None:
        """Forget a version; a model without versions is unknown."""
        versions = self._slots.get(name, {})
        versions.pop(version, None)
        if not versions:
            self._slots.pop(name, None)
        self._choose_default(name)

    def open(self) -> None:
        """What was to be loaded at the start is loaded, or has failed."""
        self._open = True

    def get(self, name: str, version: str = "") -> Model:
        """The ready model, by default of the highest version that is ready.

        Raises ModelNotFound, or ModelNotReady with the reason.
        """
        slot = self.slot(name, version)
        if slot.model is None:
            raise ModelNotReady(name, slot.version, slot.reason)
        return slot.model

    def slot(self, name: str, version: str = "") -> Slot:
        """The version asked for, by default the highest that is ready or else the highest."""
        of_model = self._slots.get(name, {})
        slot = of_model.get(version) if version else self._defaults.get(name)
        if slot is None:
            raise ModelNotFound(name, version if of_model else "")
        return slot

    def versions(self, name: str) -> list[str]:
        """The ready versions of a model, lowest first."""
        if name not in self._slots:
            raise ModelNotFound(name)
        ready = [v for v, slot in self._slots[name].items() if slot.state == "READY"]
        return sorted(ready, key=number_of)

    def slots(self, name: str | None = None) -> Iterator[Slot]:
        """All versions, or those of one model, by name and number."""
        for model in sorted(self._slots) if name is None else [name]:
            versions = self._slots.get(model, {})
            yield from (versions[version] for version in sorted(versions, key=number_of))

    def _choose_default(self, name: str) -> None:
        versions = self._slots.get(name)
        if not versions:
            self._defaults.pop(name, None)
            return
        ready = [version for version, slot in versions.items() if slot.model is not None]
        self._defaults[name] = versions[max(ready or versions, key=number_of)]

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def is_ready(self) -> bool:
        """The start is over, and some model answers or none was asked for. A broken one is
        reported with its reason and doesn't keep the others' clients away; nor does a version that
        is being loaded beside those that answer."""
        states = {slot.state for slot in self.slots() if slot.wanted}
        return self._open and ("READY" in states or not states)
