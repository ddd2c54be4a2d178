"""All that the generator needs to know, in two files: it draws and encodes nothing itself.

`plan.json` holds the settings, `plan.npz` the schedules and the encoded payloads.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.arrivals import Arrivals
from loadtest.labels import AnswerKey
from loadtest.target import Protocol, Target

SETTINGS_FILE = "plan.json"
ARRAYS_FILE = "plan.npz"
SAMPLES_FILE = "samples.npz"
PHASES = ("warmup", "window")


@dataclass(frozen=True)
class Payload:
    """One encoded request."""

    body: bytes
    json_bytes: int | None = None
    """length of a REST body's JSON part, where binary tensors follow it"""


@dataclass(frozen=True)
class ClosedLoop:
    """Clients that send when they are answered, for so long; of a schedule only the order stays."""

    n_clients: int
    warmup_s: float
    window_s: float


@dataclass(frozen=True)
class Plan:
    model: str
    version: str
    """empty: the server chooses"""
    targets: tuple[Target, ...]
    payloads: dict[Protocol, tuple[Payload, ...]]
    """by protocol, for those of the targets; all of one length"""
    warmup: Arrivals
    window: Arrivals
    timeout_s: float
    """how long a request may take from its send"""
    max_in_flight: int
    key: AnswerKey | None = None
    """none: answers aren't graded"""
    closed: ClosedLoop | None = None
    """none: the loop is open, and the schedules say when"""
    pause_s: float = 0.0
    """how long the window may be kept waiting after the warm-up, beside the usual moment"""


def save_plan(plan: Plan, folder: Path) -> None:
    settings = {
        "model": plan.model,
        "version": plan.version,
        "targets": [asdict(target) for target in plan.targets],
        "timeout_s": plan.timeout_s,
        "max_in_flight": plan.max_in_flight,
        "pause_s": plan.pause_s,
        "closed": None if plan.closed is None else asdict(plan.closed),
        "label_output": None if plan.key is None else plan.key.output,
        "json_bytes": {
            protocol: [payload.json_bytes for payload in payloads]
            for protocol, payloads in plan.payloads.items()
        },
    }
    arrays: dict[str, Any] = {} if plan.key is None else {"classes": plan.key.classes}
    for phase in PHASES:
        for name, column in vars(getattr(plan, phase)).items():
            arrays[f"{phase}.{name}"] = column
    for protocol, payloads in plan.payloads.items():
        bodies = [payload.body for payload in payloads]
        arrays[f"{protocol}.bodies"] = np.frombuffer(b"".join(bodies), np.uint8)
        arrays[f"{protocol}.ends"] = np.cumsum([len(body) for body in bodies])
    (folder / SETTINGS_FILE).write_text(json.dumps(settings), "utf-8")
    with (folder / ARRAYS_FILE).open("wb") as file:
        np.savez(file, **arrays)


def load_plan(folder: Path) -> Plan:
    settings = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    with np.load(folder / ARRAYS_FILE, allow_pickle=False) as arrays:
        warmup, window = (
            Arrivals(
                arrays[f"{phase}.intended_s"], arrays[f"{phase}.target"], arrays[f"{phase}.payload"]
            )
            for phase in PHASES
        )
        payloads = {
            protocol: _cut(arrays[f"{protocol}.bodies"], arrays[f"{protocol}.ends"], sizes)
            for protocol, sizes in settings["json_bytes"].items()
        }
        output, closed = settings["label_output"], settings["closed"]
        key = None if output is None else AnswerKey(output, arrays["classes"])
    return Plan(
        model=settings["model"],
        version=settings["version"],
        targets=tuple(Target(**target) for target in settings["targets"]),
        payloads=payloads,
        warmup=warmup,
        window=window,
        timeout_s=settings["timeout_s"],
        max_in_flight=settings["max_in_flight"],
        key=key,
        closed=None if closed is None else ClosedLoop(**closed),
        pause_s=settings["pause_s"],
    )


def _cut(bodies: Any, ends: Any, json_bytes: Sequence[int | None]) -> tuple[Payload, ...]:
    begin = 0
    payloads = []
    for end, length in zip(ends.tolist(), json_bytes, strict=True):
        payloads.append(Payload(bodies[begin:end].tobytes(), length))
        begin = end
    return tuple(payloads)
