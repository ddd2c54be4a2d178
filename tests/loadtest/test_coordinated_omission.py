"""A server that stalls is seen as an open queue sees it, not as a client that waits for it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loadtest.session import Settings, Watcher, run
from loadtest.slo import Slo
from loadtest.target import parse_target
from tests.loadtest.queues import sojourns, stalled_sojourns

RATE_PER_S, SERVICE_S = 100.0, 0.005
STALL_EVERY_S, STALL_S = 5.0, 1.0
CYCLES = 5


def ignore(*_: object) -> None:
    """Nobody watches."""


def test_stalled_queue_is_mdone_when_it_never_stalls() -> None:
    (times,) = sojourns(0.5, 2000, 1, seed=3)
    gaps = np.random.default_rng(3).exponential(2, 1999)
    arrivals = np.concatenate([[0.0], np.cumsum(gaps)])
    np.testing.assert_allclose(stalled_sojourns(arrivals, 1.0, 1e9, 0.0, 5e8), times, atol=1e-6)


def test_stalled_queue_serves_nothing_when_it_stalls() -> None:
    arrivals = np.arange(0, 30, 0.05)
    done = arrivals + stalled_sojourns(arrivals, 0.01, 5.0, 1.0, 5.0)
    into = (done - 0.01) % 5.0
    assert not ((into > 4.0) & (into < 5.0 - 1e-9)).any()
    assert np.diff(done).max() == pytest.approx(1.0, abs=0.1)


@pytest.mark.full
@pytest.mark.alone
def test_p95_is_that_of_the_open_queue_when_the_server_stalls(
    start_stub: Callable[..., Any],
) -> None:
    ports = start_stub(
        *("--service-s", f"{SERVICE_S}"),
        *("--stall-every-s", f"{STALL_EVERY_S}", "--stall-s", f"{STALL_S}"),
    )
    document = {
        "apiVersion": "trimserve/v1",
        "kind": "SLO",
        "name": "stalls",
        "latency": {"quantile": 0.95, "threshold_ms": 50},
        "workload": {"rate_per_s": RATE_PER_S},
    }
    settings = Settings(
        Slo.model_validate(document),
        "stub",
        (parse_target(ports.rest_url),),
        duration_s=CYCLES * STALL_EVERY_S,
        server_metrics=False,
    )
    result = run(settings, Watcher(ignore, ignore, ignore, ignore))
    samples = result.played.samples
    assert result.judgement.outcome == "violated"
    # The server's clock began when it liked; the longest silence ends with a stall.
    done_s = np.sort(samples.done_s)
    first_s = float(done_s[np.argmax(np.diff(done_s)) + 1] - SERVICE_S) % STALL_EVERY_S
    queue_s = stalled_sojourns(samples.intended_s, SERVICE_S, STALL_EVERY_S, STALL_S, first_s)
    reported, wanted = (np.quantile(one, 0.95) for one in (samples.latency_s, queue_s))
    assert reported == pytest.approx(wanted, rel=0.05)
    assert np.quantile(samples.latency_s, 0.5) < 0.5 * reported
