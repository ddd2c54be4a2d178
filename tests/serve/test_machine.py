"""The machine's fingerprint."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from serve.machine import Machine, allowed_cores, governor, this_machine, turbo


def test_machine_equals_itself_when_described_twice() -> None:
    assert this_machine().differences(this_machine()) == []


def test_machine_names_each_difference_when_another_is_compared() -> None:
    here = this_machine()
    there = replace(here, cores=here.cores + 1, runtimes={"numpy": "0"})
    cores, runtimes = here.differences(there)
    assert cores == f"cores: {here.cores} here, {here.cores + 1} there"
    assert runtimes.endswith("{'numpy': '0'} there")


def test_runtime_that_one_machine_lacks_is_no_difference_and_another_version_is() -> None:
    here = replace(this_machine(), runtimes={"numpy": "2.4", "onnxruntime": "1.32"})
    there = replace(here, runtimes={"onnxruntime": "1.32", "numpy": "2.4", "torch": "2.13"})
    assert here.differences(there) == there.differences(here) == []
    (runtimes,) = here.differences(replace(there, runtimes={"onnxruntime": "1.31", "torch": "2"}))
    assert runtimes == "runtimes: {'onnxruntime': '1.32'} here, {'onnxruntime': '1.31'} there"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_allowed_cores_stay_within_the_affinity_when_counted() -> None:
    assert 1 <= allowed_cores() <= len(os.sched_getaffinity(0))


def test_machine_survives_a_round_trip_when_it_passes_through_json() -> None:
    here = this_machine()
    assert Machine.from_dict(json.loads(json.dumps(here.to_dict()))) == here


def test_machine_can_be_read_when_it_was_written_before_it_said_as_much() -> None:
    here = this_machine()
    old = {
        name: here.to_dict()[name] for name in ("processor", "flags", "cores", "system", "runtimes")
    }
    assert Machine.from_dict(old).differences(here) == []


def test_unknown_is_no_difference_and_another_value_is_when_machines_are_compared() -> None:
    here = replace(this_machine(), governor="powersave", quota_cores=None)
    assert here.differences(replace(here, governor="", quota_cores=2.0)) == []
    (governor,) = here.differences(replace(here, governor="performance"))
    assert governor == "governor: powersave here, performance there"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_governor_is_of_the_allowed_processors_only_when_read(tmp_path: Path) -> None:
    for cpu, name in enumerate(("performance", "powersave", "powersave")):
        write(tmp_path / f"cpu{cpu}" / "cpufreq" / "scaling_governor", f"{name}\n")
    assert governor(tmp_path, (1, 2)) == "powersave"
    assert governor(tmp_path, (2, 0)) == "performance,powersave"
    assert governor(tmp_path, (7,)) == ""


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        pytest.param("intel_pstate/no_turbo", "0\n", "on", id="not forbidden"),
        pytest.param("intel_pstate/no_turbo", "1\n", "off", id="forbidden"),
        pytest.param("cpufreq/boost", "1\n", "on", id="allowed"),
        pytest.param("cpufreq/boost", "0\n", "off", id="not allowed"),
        pytest.param("else", "1\n", "", id="not said"),
    ],
)
def test_turbo_is_as_the_driver_says_when_read(
    file: str, text: str, expected: str, tmp_path: Path
) -> None:
    write(tmp_path / file, text)
    assert turbo(tmp_path) == expected
