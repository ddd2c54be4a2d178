"""What a master and its workers say to each other, beside what Locust's runners say by themselves.

Plans and samples travel as the bytes of their files: arrays and JSON, nothing pickled. Locust knows
neither who connects nor what travels, so a master listens where only its workers reach it.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.generator.finish import Finish
from loadtest.plan import ARRAYS_FILE, SAMPLES_FILE, SETTINGS_FILE, Plan, load_plan, save_plan
from loadtest.samples import load_samples, save_samples

HELLO, PLAN, READY = "trimserve_hello", "trimserve_plan", "trimserve_ready"
WARM, GO = "trimserve_warm", "trimserve_go"
PROGRESS, FINISHED, DEFECT = "trimserve_progress", "trimserve_finished", "trimserve_defect"

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
GO_LEAD_S = 0.5
"""From the word to go on until the first request, so that every worker has heard it."""


def plan_message(plan: Plan, folder: Path) -> dict[str, bytes]:
    """`folder` is for the plan's files; those that are there are written over."""
    save_plan(plan, folder)
    return {name: (folder / name).read_bytes() for name in (SETTINGS_FILE, ARRAYS_FILE)}


def plan_of(message: Mapping[str, bytes], folder: Path) -> Plan:
    for name in (SETTINGS_FILE, ARRAYS_FILE):
        (folder / name).write_bytes(message[name])
    return load_plan(folder)


def go_message() -> dict[str, Any]:
    """When to begin, by the clock of this machine and as a delay for those that have another."""
    return {
        "start_s": time.monotonic() + GO_LEAD_S,
        "lead_s": GO_LEAD_S,
        "machine": machine(),
    }


def start_of(message: Mapping[str, Any]) -> float:
    """On time.monotonic() here: exact on the master's machine, later by the message's way on
    others. Each request's times are of one clock either way."""
    if message["machine"] and message["machine"] == machine():
        return float(message["start_s"])
    return time.monotonic() + float(message["lead_s"])


def machine() -> str:
    """Processes with the same answer share a monotonic clock; empty where that isn't known."""
    try:
        return BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""


def finish_message(finish: Finish, folder: Path) -> dict[str, Any]:
    save_samples(finish.samples, folder / SAMPLES_FILE)
    return {
        "samples": (folder / SAMPLES_FILE).read_bytes(),
        "errors": [[status, text] for status, text in finish.errors.items()],
        "cpu_share": finish.cpu_share,
        "process_cores": finish.process_cores,
    }


def finish_of(message: Mapping[str, Any], folder: Path) -> Finish:
    (folder / SAMPLES_FILE).write_bytes(message["samples"])
    return Finish(
        load_samples(folder / SAMPLES_FILE),
        {int(status): str(text) for status, text in message["errors"]},
        float(message["cpu_share"]),
        float(message["process_cores"]),
    )
