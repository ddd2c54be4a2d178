"""The warm start: recipes that did well in earlier studies of the same model are tried first.

A new SLO is first a question to what is on record. Which ones were chosen is recorded with the
study, so that it begins the same way when it is resumed, whatever other studies find meanwhile.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optimizer.choice import value_of
from optimizer.result import Variant, variant_from_dict
from optimizer.space import Value
from optimizer.spec import Spec
from optimizer.store import Key, Store
from serve.machine import this_machine

N_FIRST = 5
"""Recipes that are taken over."""
_METRIC = "study"
_PROTOCOL_VERSION = 1


def first_decisions(
    store: Store, study_id: str, base_id: str, spec: Spec
) -> Sequence[Mapping[str, Value]]:
    """Decisions by name, those that promise most first; the same whenever the study is resumed."""
    studies: list[tuple[object, Any]] = [
        (serving["study"], value)
        for variant_id, serving, value in store.values(_METRIC, _PROTOCOL_VERSION)
        if variant_id == base_id
    ]
    known = next((value for name, value in studies if name == study_id), None)
    if known is None:
        logs = [store.trials(str(name)) for name, _ in studies]
        known = {"first": promising([entry for log in logs for entry in log], spec)}
        serving = {"study": study_id}
        store.record(Key(base_id, this_machine(), _METRIC, _PROTOCOL_VERSION, serving), known)
    first: Sequence[Mapping[str, Value]] = known["first"]
    return first


def promising(entries: Sequence[Mapping[str, Any]], spec: Spec) -> list[dict[str, Value]]:
    """The decisions of the best logged trials by the objective, of those whose accuracy would do,
    or isn't known."""
    rated = []
    for entry in entries:
        row = None if entry["row"] is None else variant_from_dict(entry["row"])
        if row is not None and row.serving is not None and _keeps_accuracy(row, spec):
            rated.append((value_of(row, spec.objective), row.id, entry["decisions"]))
    best: dict[str, dict[str, Value]] = {}
    for _, variant_id, decisions in sorted(rated, key=lambda one: one[:2]):
        best.setdefault(variant_id, decisions)
    return list(best.values())[:N_FIRST]


def _keeps_accuracy(row: Variant, spec: Spec) -> bool:
    accuracy = spec.slo.accuracy
    if accuracy is None:
        return True
    return row.quality is not None and row.quality.drop <= accuracy.max_drop
