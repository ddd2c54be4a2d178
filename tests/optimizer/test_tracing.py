"""Spans as plain values, and nothing where nobody asked."""

import subprocess
import sys
import threading
from contextvars import copy_context
from typing import Any

import pytest

from optimizer import tracing
from optimizer.tracing import MAX_SPANS, Context, SpanRecord, recording, span

ROOT = f"00-{'a' * 32}-{'b' * 16}-01"
GOOD: dict[str, Any] = {
    "name": "build", "trace_id": "a" * 32, "span_id": "c" * 16, "parent_id": "b" * 16,
    "start_ns": 1, "end_ns": 2, "attributes": {"n": 1}, "failed": False,
}  # fmt: skip


def test_spans_are_parts_of_each_other_across_threads_and_of_the_root() -> None:
    found: list[SpanRecord] = []
    with recording(ROOT, found.append):
        with span("study") as study:
            study.set("outcome", "met")
            context = copy_context()

            def trial() -> None:
                with span("trial", {"n": 1}):
                    pass

            thread = threading.Thread(target=context.run, args=(trial,))
            thread.start()
            thread.join()
            here = Context.parse(tracing.traceparent())
        with pytest.raises(ValueError, match="wrong"), span("broken"):
            raise ValueError("wrong")
    trial_span, study_span, broken = found
    assert here is not None
    assert (study_span.parent_id, study_span.span_id) == ("b" * 16, here.span_id)
    assert trial_span.parent_id == study_span.span_id
    assert (study_span.attributes, trial_span.attributes) == ({"outcome": "met"}, {"n": 1})
    assert (broken.failed, study_span.failed) == (True, False)
    assert {one.trace_id for one in found} == {"a" * 32}
    assert [SpanRecord.from_dict(one.to_dict()) for one in found] == found


@pytest.mark.parametrize("root", [None, "", "00-1-2-3", f"00-{'0' * 32}-{'b' * 16}-01",
                                  f"{ROOT[:-2]}00"])  # fmt: skip
def test_nothing_is_recorded_when_the_root_is_none_or_not_sampled(root: str | None) -> None:
    found: list[SpanRecord] = []
    with recording(root, found.append), span("study"):
        assert tracing.traceparent() is None
    assert found == []


def test_a_process_hands_up_a_bounded_number_of_spans() -> None:
    n_spans = 0

    def count(_record: SpanRecord) -> None:
        nonlocal n_spans
        n_spans += 1

    with recording(ROOT, count):
        for _ in range(MAX_SPANS + 5):
            tracing.pass_on(SpanRecord(**GOOD))
    assert n_spans == MAX_SPANS


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"name": ""}, id="no name"),
        pytest.param({"name": 3}, id="a name that is no text"),
        pytest.param({"span_id": "xyz"}, id="no id"),
        pytest.param({"parent_id": "0" * 16}, id="a parent that can't be"),
        pytest.param({"start_ns": "now"}, id="no time"),
        pytest.param({"end_ns": -1}, id="a time before all times"),
        pytest.param({"attributes": {"a": [1]}}, id="a list as an attribute"),
        pytest.param({"attributes": {"a": "x" * 2_000}}, id="a long attribute"),
        pytest.param({"attributes": {str(n): n for n in range(100)}}, id="many attributes"),
        pytest.param({"attributes": 3}, id="attributes that are none"),
        pytest.param({"more": 1}, id="an unknown field"),
    ],
)
def test_what_is_no_span_is_refused(wrong: dict[str, Any]) -> None:
    assert SpanRecord.from_dict(GOOD).name == "build"
    with pytest.raises(ValueError, match="no span"):
        SpanRecord.from_dict(GOOD | wrong)


def test_nothing_of_opentelemetry_is_imported_when_nobody_asked() -> None:
    code = (
        "import sys, optimizer.tracing as t, optimizer.service.child\n"
        "with t.span('x') as s: s.set('a', 1)\n"
        "assert t.traceparent() is None\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
