"""Overheads: fitted to runs that are known, and measured on the real server."""

import numpy as np
import onnxruntime
import pytest

from optimizer.overheads import (
    LightRun,
    Overheads,
    fitted,
    measure_overheads,
    trivial_model,
    wake_ups,
)
from optimizer.simulation import Spread

LATENCY = Spread.of(np.linspace(0.002, 0.004, 101))


def run(rate_per_s: float, request_s: float, wakeup_s: float) -> LightRun:
    """A server of these costs, at that rate: c = b + r + 2 w (1 - rate c)."""
    batch_s = 0.0001
    cpu_s = (batch_s + request_s + 2 * wakeup_s) / (1 + 2 * wakeup_s * rate_per_s)
    return LightRun(rate_per_s, cpu_s, batch_s, LATENCY)


def test_costs_are_those_of_a_server_that_is_known() -> None:
    cost = fitted(run(60, 0.0004, 0.0002), run(400, 0.0004, 0.0002))

    assert cost.request_s == pytest.approx(0.0004)
    assert cost.wakeup_s == pytest.approx(0.0002)
    assert cost.way.median_s == pytest.approx(0.003 - 0.0009)


@pytest.mark.parametrize("busy_cpu_s", [0.0005, 0.002], ids=["equal", "rising"])
def test_waking_up_costs_nothing_when_requests_cost_no_less_under_load(busy_cpu_s: float) -> None:
    light, busy = (
        LightRun(rate, cpu, 0.0001, LATENCY) for rate, cpu in ((60, 5e-4), (400, busy_cpu_s))
    )

    cost = fitted(light, busy)

    assert cost.wakeup_s == 0
    assert cost.request_s == pytest.approx(busy_cpu_s - 0.0001)


def test_trivial_model_gives_the_first_numbers_of_each_row() -> None:
    session = onnxruntime.InferenceSession(trivial_model(16), providers=["CPUExecutionProvider"])
    rows = np.arange(48, dtype=np.float32).reshape(3, 16)

    (answer,) = session.run(None, {"x": rows})

    np.testing.assert_array_equal(answer, rows[:, :10])


def test_threads_wait_for_a_core_that_is_taken() -> None:
    spread = wake_ups(None, n=20)

    assert 0 <= spread.seconds[0] <= spread.median_s <= spread.seconds[-1] < 5


@pytest.mark.full
def test_overheads_of_this_machine_survive_their_stored_form() -> None:
    measured = measure_overheads(1, encoding="json", n_values=4, window_s=1.0)

    assert Overheads.from_dict(measured.to_dict()) == measured
    assert list(measured.costs) == ["rest"]
    front_end = measured.front_end()
    assert 0 < front_end.serial_s < 0.1
    assert front_end.batch_s > 0
    assert front_end.wake == measured.wake
