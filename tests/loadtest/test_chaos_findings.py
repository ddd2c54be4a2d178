"""What chaos does to a verdict, on samples that a server might have given."""

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from loadtest.chaos.conductor import Performed
from loadtest.chaos.counters import expect_losses
from loadtest.chaos.facts import bands, summary_of
from loadtest.chaos.findings import Chaos
from loadtest.chaos.profile import ChaosProfile, Kill, Objectives, Pause
from loadtest.comparison import NotComparable, compare
from loadtest.html import latency_timeline, rate_timeline, render_html
from loadtest.junit import to_junit
from loadtest.report import Report, from_json, to_json
from loadtest.samples import CONNECTION_FAILED
from loadtest.server_metrics import Count, Coverage, Scrapes, Snapshot
from loadtest.verdict import Evidence, Judgement, ServerEvidence, judge
from tests.loadtest.test_loadtest_report import make_result, report_of
from tests.loadtest.test_verdict import WINDOW_S, N, make_samples, make_slo

PER_S = int(N / WINDOW_S)
KILL = Kill(kind="kill", at_s=10, pid=7)
PAUSE = Pause(kind="pause", at_s=10, pid=7, for_s=1)
URL = "http://127.0.0.1:8002/metrics"
LOST = dict.fromkeys(range(10 * PER_S, 12 * PER_S), CONNECTION_FAILED)
"""Of the two seconds from the tenth on."""


def performed(action: Any = KILL, error: str = "", started_s: float | None = 9.999) -> Performed:
    return Performed(action, started_s, None if error else 10.1, error)


def judged(
    lost: dict[int, int],
    one: Performed,
    quantile: float = 0.9,
    server: ServerEvidence | None = None,
    **objectives: Any,
) -> Judgement:
    wanted = Objectives(**{"max_recovery_s": 3, "max_lost": 300, **objectives})
    evidence = Evidence(
        slo=make_slo(quantile, 0.9),
        samples=make_samples(status=lost),
        window_s=WINDOW_S,
        transports=("rest",),
        max_in_flight=64,
        cpu_share=0.1,
        server=server,
        chaos=Chaos(wanted, WINDOW_S, (one,)),
    )
    return judge(evidence)


def kinds(judgement: Judgement) -> list[str]:
    return [one.kind for one in judgement.reasons]


def test_verdict_is_met_when_losses_are_within_all_objectives() -> None:
    """A burst of 200 that came when it was told to; the others show the quantile."""
    judgement = judged(LOST, performed())
    (found,) = judgement.chaos
    assert (judgement.outcome, kinds(judgement)) == ("met", [])
    assert found.recovery is not None
    assert found.recovery.n_lost == 200
    assert found.recovery.recovery_s == pytest.approx(2.0, abs=0.02)
    assert judgement.good.n_good == N - 200
    assert judgement.calm is not None
    # One that was answered was under way when the kill began.
    assert judgement.calm.n == N - 201
    assert judgement.lower > judgement.good.lower


@pytest.mark.parametrize(
    ("given", "outcome", "reasons"),
    [
        pytest.param({"max_recovery_s": 1.9}, "violated", ["recovery_missed"], id="too slow"),
        pytest.param({"max_lost": 199}, "violated", ["losses_missed"], id="too many lost"),
        pytest.param({"max_lost": None}, "met", [], id="losses aren't judged"),
        pytest.param({"quantile": 0.99}, "violated", ["latency_missed"], id="by all requests"),
    ],
)
def test_verdict_has_a_reason_when_an_objective_is_missed(
    given: dict[str, Any], outcome: str, reasons: list[str]
) -> None:
    judgement = judged(LOST, performed(), **given)
    assert (judgement.outcome, kinds(judgement)) == (outcome, reasons)
    assert all(one.message.startswith("kill at 10 s: ") or reasons[0] == "latency_missed"
               for one in judgement.reasons)  # fmt: skip


def test_verdict_is_violated_when_the_server_never_recovers() -> None:
    lost = dict.fromkeys(range(10 * PER_S, N), CONNECTION_FAILED)
    judgement = judged(lost, performed())
    assert judgement.outcome == "violated"
    assert set(kinds(judgement)) >= {"recovery_missed", "losses_missed", "latency_missed"}


@pytest.mark.parametrize("started_s", [None, 9.999], ids=["didn't begin", "failed later"])
def test_verdict_is_inconclusive_when_an_action_failed(started_s: float | None) -> None:
    judgement = judged({}, performed(error="process 7 has ended", started_s=started_s))
    assert (judgement.outcome, kinds(judgement)) == ("inconclusive", ["action_not_performed"])
    assert judgement.reasons[0].message == "kill at 10 s of --chaos failed: process 7 has ended"


# --- the server's counters

EDGES = (0.05,)
BEFORE = Snapshot(1.0, {"rest": Count(50, 50, 0)}, EDGES, True)
OTHER = Scrapes("http://b", BEFORE, Snapshot(1.0, {"rest": Count(850, 850, 0)}, EDGES, True))


def restarted(n: int) -> ServerEvidence:
    after = Snapshot(9.0, {"rest": Count(n, n, 0)}, EDGES, True)
    return ServerEvidence((Scrapes(URL, BEFORE, after), OTHER))


def with_server(server: ServerEvidence, action: Any) -> list[str]:
    one = performed(action)
    expected = expect_losses(server, (one,), (URL, "http://b"))
    return kinds(judged(LOST, one, server=expected))


@pytest.mark.parametrize(
    ("server", "action", "reasons"),
    [
        pytest.param(restarted(1800), KILL, [], id="a restart that was asked for"),
        pytest.param(restarted(20), KILL, [], id="whose counters hold little"),
        pytest.param(
            restarted(2300), KILL, ["counts_disagree"] * 2, id="yet more than were ever sent"
        ),
        pytest.param(restarted(1800), PAUSE, ["server_restarted"], id="a restart by itself"),
        pytest.param(ServerEvidence(error="refused"), KILL, [], id="it didn't come back"),
        pytest.param(
            ServerEvidence(error="refused"), PAUSE, ["metrics_unreadable"], id="nobody ended it"
        ),
    ],
)
def test_counters_are_a_doubt_when_they_are_not_lost_on_purpose(
    server: ServerEvidence, action: Any, reasons: list[str]
) -> None:
    assert with_server(server, action) == reasons


def test_counters_are_named_when_they_were_lost() -> None:
    found = expect_losses(restarted(1800), (performed(),), (URL, "http://b"))
    assert found.lost == (URL,)
    unread = expect_losses(ServerEvidence(error="refused"), (performed(),), (URL, "http://b"))
    assert unread.lost == (URL, "http://b")


def test_evidence_is_as_it_was_when_no_action_began() -> None:
    server = restarted(1800)
    assert expect_losses(server, (performed(error="gone", started_s=None),), (URL,)) == server


def test_scrapes_may_fail_when_the_server_stood_still() -> None:
    coverage = (Coverage(URL, 0, 30, 1, 29, 1, 2),)
    whole = Snapshot(1.0, {"rest": Count(50 + N - 200, 50 + N - 200, 0)}, EDGES, True)
    server = ServerEvidence((Scrapes(URL, BEFORE, whole),), coverage=coverage)
    assert kinds(judged(LOST, performed(PAUSE), server=server)) == ["scrapes_missing"]
    assert with_server(server, PAUSE) == []


# --- reports


def report_with(lost: dict[int, int], one: Performed) -> Report:
    result = make_result()
    samples = make_samples(n=2000, status=lost)
    samples = replace(samples, intended_s=samples.intended_s * 20 / WINDOW_S)
    samples = replace(samples, sent_s=samples.intended_s, done_s=samples.intended_s + 0.01)
    profile = ChaosProfile(
        apiVersion="trimserve/v1",
        kind="ChaosProfile",
        objectives=Objectives(max_recovery_s=3, max_lost=100),
        actions=(one.action,),
    )
    chaos = Chaos(profile.objectives, 20, (one,))
    slo = result.settings.slo
    evidence = Evidence(slo, samples, 20, ("rest",), 64, 0.1, None, chaos=chaos)
    settings = replace(result.settings, chaos=profile)
    played = replace(result.played, samples=samples)
    result = replace(result, settings=settings, played=played, judgement=judge(evidence))
    return report_of(result)


LOST_ALSO = dict.fromkeys(range(1000, 1200), CONNECTION_FAILED)


def test_report_has_each_action_when_read_from_its_json() -> None:
    report = report_with(LOST_ALSO, performed())
    assert from_json(to_json(report)) == report
    assert report.chaos is not None
    (kill,) = report.chaos.actions
    assert (kill.n_lost, kill.kept, kill.process) == (200, False, "process 7")
    assert report.chaos.n_undisturbed + 201 == 2000
    assert summary_of(kill) == "recovered in 2.001 s, 200 requests lost"


def test_report_page_marks_the_time_to_recover() -> None:
    report = report_with(LOST_ALSO, performed())
    for chart in (latency_timeline(report), rate_timeline(report)):
        band = chart["layout"]["shapes"][-1]
        assert (band["x0"], band["x1"]) == (9.999, pytest.approx(12.0))
        assert chart["layout"]["annotations"][0]["text"] == "kill: 2 s"
    page = render_html(report)
    assert "<h2>Chaos</h2>" in page
    assert "200 requests lost" in page


def test_report_page_marks_the_rest_of_the_window_when_the_server_does_not_recover() -> None:
    report = report_with(dict.fromkeys(range(1000, 2000), 503), performed())
    found = bands(report.chaos, 20)
    assert found["shapes"][0]["x1"] == 20
    assert found["annotations"][0]["text"] == "kill: not recovered"


def test_report_page_marks_an_action_when_nothing_was_lost_by_it() -> None:
    found = bands(report_with({}, performed(PAUSE)).chaos, 20)
    assert (found["shapes"][0]["x0"], found["shapes"][0]["x1"]) == (9.999, 10.1)
    assert found["annotations"][0]["text"] == "pause: 0 s"


def test_report_page_is_drawn_when_an_action_did_not_begin() -> None:
    report = report_with({}, performed(error="</td>gone", started_s=None))
    assert bands(report.chaos, 20) == {"shapes": [], "annotations": []}
    assert "didn&#39;t begin: &lt;/td&gt;gone" in render_html(report)


def test_junit_has_a_case_for_each_action() -> None:
    suite = ElementTree.fromstring(to_junit(report_with(LOST_ALSO, performed())))
    found = {case.get("name"): [child.tag for child in case] for case in suite}
    assert found["chaos kill at 10 s"] == ["failure", "system-out"]
    assert suite.get("tests") == "3"


def test_reports_are_not_comparable_when_only_one_was_disturbed() -> None:
    disturbed = report_with({}, performed())
    calm = disturbed.model_copy(update={"run": disturbed.run.model_copy(update={"chaos": None})})
    with pytest.raises(NotComparable, match="chaos"):
        compare(disturbed, calm)
