"""The answer's sentence, table and page; what they are made of comes from `study_result`."""

import html
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from optimizer.quantities import bytes_, duration, number
from optimizer.report import print_table, render_html, script_json
from optimizer.result import NearestMiss, Reason, Relaxation, StudyResult, Verification
from optimizer.wording import details, explain, headline, offer, sorted_variants
from tests.optimizer.study_result import by_fidelity, large, layers, met, variant

Edit = Callable[[StudyResult], StudyResult]


def unverified(result: StudyResult) -> StudyResult:
    rows = tuple(replace(row, verification=None) for row in result.variants)
    return replace(result, outcome="unverified", variants=rows)


def infeasible(result: StudyResult) -> StudyResult:
    rows = tuple(
        replace(row, status="infeasible") if row.status == "chosen" else row
        for row in result.variants
    )
    miss = NearestMiss(rows[2].id, rows[2].reasons[0])
    return replace(result, outcome="infeasible", variants=rows, nearest_miss=miss)


def inconclusive(result: StudyResult) -> StudyResult:
    doubt = Verification("inconclusive", ("the rate was not reached.",))
    rows = tuple(
        replace(row, status="unverified", verification=doubt) if row.status == "chosen" else row
        for row in result.variants
    )
    return replace(result, outcome="inconclusive", variants=rows)


def empty(result: StudyResult) -> StudyResult:
    return replace(result, outcome="infeasible", variants=(), notes=(), seeds={}, versions={})


@pytest.mark.parametrize(
    ("edit", "answer", "said"),
    [
        pytest.param(
            lambda result: result,
            "cifar10-resnet56 as openvino int8 (percentile) keeps p99 within 50 ms at 100 "
            "requests/s (measured 13.4 ms), for 0.0546 per million inferences.",
            "at most 0.76 points lower than the base's (95% confidence, 1 allowed). "
            "That is 2.94 times cheaper than onnxruntime fp32.",
            id="met",
        ),
        pytest.param(
            unverified,
            "should keep p99 within 50 ms at 100 requests/s, for 0.0546 per million inferences; "
            "nothing has checked it on the server.",
            "2.94 times cheaper",
            id="unverified",
        ),
        pytest.param(
            infeasible,
            "No variant of cifar10-resnet56 keeps p99 within 50 ms at 100 requests/s.",
            "The nearest is onnxruntime int8 (minmax): accuracy may be 2.13 points lower, allowed "
            "are 1.00 (by its upper bound at 95%).",
            id="infeasible",
        ),
        pytest.param(
            inconclusive,
            "Whether cifar10-resnet56 can keep p99 within 50 ms at 100 requests/s isn't decided.",
            "The rate was not reached.",
            id="inconclusive",
        ),
        pytest.param(empty, "No variant of cifar10-resnet56 keeps", "", id="without variants"),
    ],
)
def test_answer_is_a_sentence_for_every_outcome(edit: Edit, answer: str, said: str) -> None:
    result = edit(met())

    assert answer in headline(result)
    assert said in details(result)


@pytest.mark.parametrize(
    ("reason", "phrase"),
    [
        (Reason("latency", 0.131, 0.05, "s"), "latency 131 ms, allowed 50 ms"),
        (Reason("rate", 80.0, 200.0, "1/s"), "sustains 80 requests/s, wanted 200 requests/s"),
        (Reason("size", 4.2e6, 1e6, "bytes"), "size 4.2 MB, allowed 1 MB"),
        (
            Reason("success_ratio", 0.98, 0.999, "1"),
            "98.00% of the requests succeed, wanted 99.90%",
        ),
        (
            Reason("accuracy_samples", 100.0, 299.0, "samples"),
            "100 samples show no bound of the accuracy, 299 samples would",
        ),
        (Reason("built", detail="ValueError: no"), "couldn't be built: ValueError: no"),
        (Reason("parity"), "computes something else"),
        (Reason("latency", detail="never answered"), "latency: never answered"),
    ],
)
def test_explain_names_both_numbers_or_what_happened(reason: Reason, phrase: str) -> None:
    assert explain(reason) == phrase


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (0.0, "0"),
        (0.05464, "0.0546"),
        (13.44, "13.4"),
        (99.96, "100"),
        (1234.6, "1,235"),
        (200.0, "200"),
        (-0.5, "-0.5"),
        (2.5e-7, "2.5e-07"),
        (1.25e9, "1.25e+09"),
    ],
)
def test_number_is_short_and_has_no_exponent_where_it_needs_none(
    value: float | None, text: str
) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "–"), (0, "0 bytes"), (999, "999 bytes"), (930_000, "930 kB"), (3.42e6, "3.42 MB")],
)
def test_bytes_are_in_the_largest_unit_that_fits(size: float | None, text: str) -> None:
    assert bytes_(size) == text


def printed(result: StudyResult, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("width", "faster"), [(80, False), (120, True)])
def test_table_fits_the_terminal_and_marks_the_chosen(width: int, faster: bool) -> None:
    lines = printed(met(), width).splitlines()

    assert all(len(line) <= width for line in lines)
    assert re.match(r"★ +openvino int8", lines[2])
    assert ("2.94×" in lines[2]) == faster
    for figure in ("93.86%", "0.41 [0.11, 0.81]", "5.83*", "13.4*", "406", "0.93", "0.0546"):
        assert figure in lines[2]


def test_table_says_why_variants_were_dropped_and_ends_with_the_answer() -> None:
    text = printed(met(), 200)

    assert "✗ onnxruntime eager: latency 131 ms, allowed 50 ms" in text
    assert "- openvino bf16: couldn't be built: TypeError: unsupported operator <aten::foo>" in text
    assert headline(met()) in text


def test_table_is_short_and_keeps_the_baseline_when_there_are_many_variants() -> None:
    many = [replace(variant("openvino int8", "verified", 3.0), id=str(n)) for n in range(40)]

    text = printed(replace(met(), variants=(*met().variants, *many)), 120)

    assert text.count("openvino int8") < 20
    assert "onnxruntime fp32 (baseline)" in text
    assert "and 35 more" in text


def test_table_prints_names_as_they_are_when_they_look_like_markup() -> None:
    rows = (replace(variant("openvino int8", "chosen", 3.2), label="[red]a[/red] :smile:"),)

    assert "[red]a[/red] :smile:" in printed(replace(met(), variants=rows), 200)


def test_variants_are_sorted_by_status_and_then_by_the_objective() -> None:
    by_cost = [row.label for row in sorted_variants(met())]

    assert by_cost[:4] == [
        "openvino int8 (percentile)",
        "onnxruntime int8 (percentile)",
        "openvino fp32",
        "onnxruntime fp32",
    ]
    assert by_cost[-1] == "openvino bf16"


@pytest.mark.parametrize(
    "edit", [lambda result: result, unverified, infeasible, inconclusive, empty]
)
def test_page_has_everything_in_it_for_every_outcome(edit: Edit) -> None:
    result = edit(met())

    page = without_plotly(render_html(result))

    text = html.unescape(page)
    assert headline(result) in text
    assert all(row.label in text for row in result.variants)
    assert "trimserve optimize cifar10/spec.yaml --repository 'my models'" in text
    assert not re.search(r'(src|href)="|@import|url\(', page)


def without_plotly(page: str) -> str:
    """The page but for Plotly's own script, which is the longest."""
    script = max(re.findall(r"<script>.*?</script>", page, re.DOTALL), key=len)
    assert len(script) > 1_000_000
    return page.replace(script, "")


def test_page_shows_names_as_text_when_they_look_like_html() -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    result = met()
    rows = tuple(replace(row, label=hostile, engine=hostile) for row in result.variants)

    page = without_plotly(render_html(replace(result, model=hostile, variants=rows)))

    assert hostile not in page
    assert "<img" not in page
    assert figures_of(page, "views")["accuracy and latency"]["data"]


def figures_of(page: str, name: str = "figures") -> dict[str, Any]:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page)
    assert match is not None
    figures = json.loads(match[1])
    assert isinstance(figures, dict)
    return figures


def test_script_json_is_json_that_cannot_end_the_script() -> None:
    value = {"text": "</script>\u2028&", "gap": [1.0, math.nan, -math.inf]}

    text = script_json(value)

    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == {"text": "</script>\u2028&", "gap": [1.0, None, None]}


def test_details_report_the_locked_test_split_when_it_was_looked_at() -> None:
    result = met()
    chosen = result.chosen
    assert chosen is not None
    assert chosen.quality is not None
    test = replace(chosen.quality, value=0.893, drop=0.004, split="test")
    rows = tuple(
        replace(row, test_quality=test) if row is chosen else row for row in result.variants
    )
    said = details(replace(result, variants=rows))
    assert "On the locked test split, looked at once, it is 89.30%, where the base has 89.70%." in (
        said
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (96.0, "96 s"), (210.0, "3.5 min"), (9000.0, "2.5 h")],
)
def test_duration_is_in_the_largest_unit_of_which_there_are_two(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("relaxation", "phrase"),
    [
        pytest.param(
            Relaxation("latency", 0.02, 0.0231, "s", "", 0.0124),
            "raise the threshold from 20 ms to 23.1 ms: openvino int8 (percentile) would do, at "
            "0.0124 per million",
            id="latency",
        ),
        pytest.param(
            Relaxation("accuracy_drop", 0.01, 0.0214, "1", "", 0.0124),
            "allow a drop of 2.14 points instead of 1: openvino int8 (percentile) would do, at "
            "0.0124 per million",
            id="accuracy",
        ),
        pytest.param(
            Relaxation("memory", 1e9, 1.5e9, "bytes", "", math.inf),
            "allow 1.5 GB of memory instead of 1 GB: openvino int8 (percentile) would do",
            id="memory, at a price that isn't known",
        ),
    ],
)
def test_offer_names_the_step_the_variant_and_its_price(
    relaxation: Relaxation, phrase: str
) -> None:
    chosen = met().variants[4]

    assert offer(met(), replace(relaxation, variant_id=chosen.id)) == phrase


def relaxing(result: StudyResult) -> StudyResult:
    row = result.variants[3]
    step = Relaxation("latency", 0.05, 0.0531, "s", row.id, 0.0697)
    return replace(infeasible(result), relaxations=(step,))


def test_table_says_what_relaxing_would_buy_when_nothing_is_feasible() -> None:
    text = printed(relaxing(met()), 200)

    assert "raise the threshold from 50 ms to 53.1 ms: onnxruntime int8 (percentile)" in text


def test_table_has_a_line_of_the_ladder_and_of_a_guarantee_that_is_not_of_labels() -> None:
    assert "rung 1 (timing) took 58, dropped 31, saved ~12 min; rung 2 (accuracy) took 27" in (
        printed(met(), 300)
    )
    assert "Guarantee by fidelity. Without labels: the share of 5,000 samples" in (
        printed(by_fidelity(), 300)
    )
    assert "Guarantee" not in printed(met(), 300)


@pytest.mark.parametrize(
    ("edit", "heading"),
    [
        pytest.param(lambda r: replace(r, ablations=()), "What each technique contributed",
                     id="ablations"),
        pytest.param(lambda r: replace(r, rungs=()), "The ladder", id="rungs"),
        pytest.param(lambda r: replace(r, layers=()), "What changed, layer by layer", id="layers"),
        pytest.param(lambda r: replace(r, variants=r.variants[4:5]),
                     "Every variant across its parameters", id="one variant"),
        pytest.param(empty, "Latency by batch size", id="no variant"),
    ],
)  # fmt: skip
def test_page_leaves_out_a_section_that_has_nothing_to_show(edit: Edit, heading: str) -> None:
    assert f"<h2>{heading}</h2>" in without_plotly(render_html(met()))
    assert f"<h2>{heading}</h2>" not in without_plotly(render_html(edit(met())))


def text_of(page: str) -> str:
    """What a reader sees, with single spaces."""
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_page_shows_what_each_step_contributed_the_ladder_and_the_layers() -> None:
    text = text_of(render_html(met()))

    assert "quantization openvino fp32 −60.5% 0.138 → 0.0546 −56.2% 27.9 ms → 12.2 ms" in text
    assert "+0.39 0.02 → 0.41 −72.8% 3.42 MB → 930 kB" in text
    assert "1 timing 58 31 3.5 min 12 min" in text
    assert "blocks.1.conv Conv 64×64×3×3 → 64×56×3×3 fp32 → int8 0.43 0.14" in text
    assert "short_cut Conv 64×64×1×1 → gone fp32 → – 0.09 –" in text
    assert "7 layers with weights or attention, 4 in another precision, 1 of another shape" in text


def test_page_says_what_relaxing_would_buy_when_nothing_is_feasible() -> None:
    text = text_of(render_html(relaxing(met())))

    assert "Raise the threshold from 50 ms to 53.1 ms: onnxruntime int8 (percentile)" in text


def test_page_says_what_the_accuracy_rests_on_when_there_were_no_labels() -> None:
    text = text_of(render_html(by_fidelity()))

    assert "What the accuracy rests on fidelity Without labels" in text
    assert "mean kl 0.0042" in text
    assert "What the accuracy rests on" not in text_of(render_html(met()))


def test_page_folds_rows_away_when_there_are_many_variants_and_layers() -> None:
    page = without_plotly(render_html(large(500)))

    shown, folded = re.split(r"<summary>(?=48[78] more)", page)
    assert "onnxruntime fp32" in shown
    assert shown.count('<span class="label">') < 30
    assert "all 58 layers" in page
    assert folded.count('class="pill unverified"') > 60


def test_page_can_switch_the_axes_of_the_front() -> None:
    page = without_plotly(render_html(met()))

    names = re.findall(r'data-view="([^"]+)"', page)
    assert names == list(figures_of(page, "views"))
    assert len(names) == 4


def test_layers_of_one_study_are_all_in_the_table_when_they_are_few() -> None:
    few = without_plotly(render_html(replace(met(), layers=layers(10))))

    assert "in the order of the graph" not in few
    assert few.count("blocks.") == 10
