"""The life of a job, state by state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.service import jobs as life
from optimizer.service.jobs import Job, Lease, LeaseLost, NotAllowed, State

LEASE = Lease("one", "token", 10.0)


def a_job(state: State = State.QUEUED, **values: object) -> Job:
    lease = LEASE if state in life.ACTIVE else None
    ended_s = 1.0 if state in life.ENDED else None
    return Job(
        "1", "me", "m", 0.0, 0.0, **{"state": state, "lease": lease, "ended_s": ended_s, **values}
    )  # type: ignore[arg-type]


def test_a_job_is_claimed_renewed_and_ended_once() -> None:
    running = life.claim(a_job(), LEASE, 1.0)
    assert (running.state, running.attempt, running.started_s) == (State.RUNNING, 1, 1.0)
    renewed = life.renew(running, "token", 30.0, 2.0)
    assert renewed.lease is not None
    assert renewed.lease.until_s == 30.0
    done = life.succeed(renewed, "token", "met", 3.0)
    assert (done.state, done.outcome, done.lease, done.ended_s) == (State.SUCCEEDED, "met", None, 3)
    with pytest.raises(LeaseLost):
        life.succeed(done, "token", "met", 4.0)


@pytest.mark.parametrize("end", [
    lambda job: life.succeed(job, "other", "met", 1.0),
    lambda job: life.fail(job, "other", "why", 1.0),
    lambda job: life.renew(job, "other", 9.0, 1.0),
    lambda job: life.release(job, "other", 1.0),
])  # fmt: skip
def test_another_claims_token_is_refused(end: object) -> None:
    with pytest.raises(LeaseLost):
        end(a_job(State.RUNNING))  # type: ignore[operator]


def test_a_lost_lease_goes_back_to_the_queue_and_at_last_fails() -> None:
    job = a_job(max_attempts=2)
    for attempt in (1, 2):
        job = life.claim(job, LEASE, 0.0)
        assert job.attempt == attempt
        assert life.expire(job, 9.9) is job
        job = life.expire(job, 10.0)
    assert job.state is State.FAILED
    assert job.error == "2 workers were lost in a row while it got no further, the last was one"


def test_workers_lost_of_a_job_that_gets_further_dont_end_it_until_they_are_too_many() -> None:
    job = a_job()
    for reached in range(1, life.MAX_CLAIMS + 1):
        assert job.state is State.QUEUED
        job = life.told(life.claim(job, LEASE, 0.0), "token", 1, reached)
        job = life.expire(job, 10.0)
    assert job.state is State.FAILED
    assert job.error == "30 workers have begun it and were lost, the last was one"


def test_getting_as_far_as_before_is_getting_no_further() -> None:
    job = a_job()
    for _ in range(job.max_attempts):
        job = life.told(life.claim(job, LEASE, 0.0), "token", 1, 4)
        job = life.expire(job, 10.0)
    assert (job.state, job.lost, job.reached) == (State.FAILED, 3, 4)


def test_a_worker_that_couldnt_renew_isnt_counted() -> None:
    job = life.claim(a_job(lost=2), LEASE, 0.0)
    assert life.expire(job, 10.0).state is State.FAILED
    again = life.expire(job, 10.0, blameless=True)
    assert (again.state, again.lost) == (State.QUEUED, 2)


def test_what_a_worker_lets_go_of_is_no_attempt() -> None:
    job = life.release(life.claim(a_job(), LEASE, 0.0), "token", 1.0)
    assert (job.state, job.attempt, job.lease) == (State.QUEUED, 0, None)


def test_cancelling_ends_a_queued_job_and_asks_a_worker() -> None:
    assert life.ask_cancel(a_job(), 1.0).state is State.CANCELLED
    asked = life.ask_cancel(a_job(State.RUNNING), 1.0)
    assert asked.state is State.CANCELLING
    assert life.ask_cancel(asked, 2.0).state is State.CANCELLING
    for ended in (
        life.stopped(asked, "token", 2.0), life.expire(asked, 11.0),
        life.release(asked, "token", 2.0), life.fail(asked, "token", "killed", 2.0),
    ):  # fmt: skip
        assert ended.state is State.CANCELLED
        assert ended.error is None
    assert life.succeed(asked, "token", "met", 2.0).state is State.SUCCEEDED


def test_a_retry_begins_anew() -> None:
    failed = a_job(State.FAILED, attempt=3, error="why", outcome=None, started_s=0.5)
    again = life.retry(failed, 5.0)
    assert (again.state, again.run, again.attempt) == (State.QUEUED, 2, 0)
    assert (again.error, again.started_s, again.ended_s) == (None, None, None)


ACTIONS = {
    "claim": (lambda job: life.claim(job, LEASE, 0.0), {State.QUEUED}),
    "cancel": (lambda job: life.ask_cancel(job, 0.0), set(life.OPEN)),
    "retry": (lambda job: life.retry(job, 0.0), set(life.ENDED)),
    "delete": (lambda job: life.delete(job, 0.0), set(life.ENDED)),
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("name", list(ACTIONS))
def test_what_is_allowed_in_which_state(name: str, state: State) -> None:
    act, allowed = ACTIONS[name]
    if state in allowed:
        act(a_job(state))
        return
    with pytest.raises(NotAllowed) as refused:
        act(a_job(state))
    assert f"a job that is {state}" in str(refused.value)


@given(
    st.lists(st.sampled_from(["claim", "expire", "cancel", "succeed", "fail", "retry", "release"]))
)
def test_no_sequence_leaves_a_lease_without_a_worker_or_an_end_without_a_time(
    steps: list[str],
) -> None:
    job, now_s = a_job(), 0.0
    for step in steps:
        now_s += 20.0
        lease = Lease("one", f"token {now_s}", now_s + 10.0)
        token = job.lease.token if job.lease else ""
        acts = {
            "claim": lambda: life.claim(job, lease, now_s),  # noqa: B023
            "expire": lambda: life.expire(job, now_s),  # noqa: B023
            "cancel": lambda: life.ask_cancel(job, now_s),  # noqa: B023
            "succeed": lambda: life.succeed(job, token, "met", now_s),  # noqa: B023
            "fail": lambda: life.fail(job, token, "why", now_s),  # noqa: B023
            "retry": lambda: life.retry(job, now_s),  # noqa: B023
            "release": lambda: life.release(job, token, now_s),  # noqa: B023
        }
        try:
            job = acts[step]()
        except (NotAllowed, LeaseLost):
            continue
        assert (job.lease is not None) == (job.state in life.ACTIVE)
        assert (job.ended_s is not None) == (job.state in life.ENDED)
        assert job.lost <= job.max_attempts
        assert job.attempt <= life.MAX_CLAIMS
