"""Service, worker and PostgreSQL are killed at random moments: no job is lost or done twice, no
version is half there. `benchmarks.kills` says what is looked at, and runs for longer."""

import pytest

from benchmarks.kills import main

pytestmark = [pytest.mark.full, pytest.mark.alone]


def test_nothing_is_lost_or_doubled_when_each_is_killed() -> None:
    assert main(["--kills", "3", "--seed", "1", "--clients", "2"]) == 0
