"""Facts: what a store keeps, as values. They don't know how or where they are kept."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from optimizer.errors import OptimizerError
from optimizer.variant import StoredModel, canonical_json
from serve.artifact import Step
from serve.machine import Machine


@dataclass(frozen=True)
class StoredVariant:
    """A variant's provenance and a handle on its artifact."""

    id: str
    parent_id: str
    step: Step
    data_digest: str
    model: StoredModel
    build_s: float


@dataclass(frozen=True)
class Key:
    """What a measurement is of. `serving` is the serving configuration as plain values (empty
    where the metric doesn't depend on it); `protocol_version` changes with the way of measuring,
    so that old values aren't mistaken for new ones."""

    variant_id: str
    machine: Machine
    metric: str
    protocol_version: int
    serving: Mapping[str, object]


@dataclass(frozen=True)
class Look:
    """One look at a locked split by a study; `at` is ISO 8601, UTC."""

    study_id: str
    variant_id: str
    split_digest: str
    at: str


class TrialLoggedOtherwise(OptimizerError):
    """A trial's number is taken by another entry: the study runs twice, or isn't the same."""

    def __init__(self, study_id: str, number: int) -> None:
        super().__init__(
            f"study {study_id}: trial {number} is logged already, with another entry: does the "
            "study run in two processes at once?"
        )
        self.study_id = study_id
        self.number = number


def machine_fingerprint(machine: Machine) -> str:
    """SHA-256 (hex) of all that makes timings of two machines comparable."""
    return hashlib.sha256(canonical_json(machine.to_dict()).encode()).hexdigest()
