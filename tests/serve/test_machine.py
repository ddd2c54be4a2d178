"""The machine's fingerprint."""

import os
from dataclasses import replace

import pytest

from serve.machine import allowed_cores, this_machine


def test_machine_equals_itself_when_described_twice() -> None:
    assert this_machine().differences(this_machine()) == []


def test_machine_names_each_difference_when_another_is_compared() -> None:
    here = this_machine()
    there = replace(here, cores=here.cores + 1, runtimes={"numpy": "0"})
    cores, runtimes = here.differences(there)
    assert cores == f"cores: {here.cores} here, {here.cores + 1} there"
    assert runtimes.endswith("{'numpy': '0'} there")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_allowed_cores_stay_within_the_affinity_when_counted() -> None:
    assert 1 <= allowed_cores() <= len(os.sched_getaffinity(0))
