"""What the page and the JSON show of a search for another network."""

import json
import re
from dataclasses import replace

import pytest

from optimizer.architecture_figures import MAX_DOTS, accuracy_by_latency, regret_by_evaluation
from optimizer.architectures import ArchitectureRecord, Network, ProposerRecord
from optimizer.report import MAX_ARCHITECTURES, render_html
from optimizer.result import from_json, to_json
from tests.optimizer.study_result import met

SLOW, FAST = Network(0.9, 2e-3, "fp32"), Network(0.8, 1e-3, "int8")
WORSE = Network(0.7, 1.5e-3, "fp32")


def record(name: str = "reinforce", n: int = 1) -> ArchitectureRecord:
    first = ProposerRecord(name, (WORSE, FAST, SLOW) * n, (0.2, 0.2, 0.0) + (0.0,) * 3 * (n - 1))
    second = ProposerRecord("random", (WORSE,), (0.2,))
    return ArchitectureRecord(
        "a" * 64, "another network, 2x", 1.8e-3, (first, second), (FAST, SLOW)
    )


def test_front_is_drawn_over_the_networks_of_each_proposer_with_the_target() -> None:
    figure = accuracy_by_latency(record())
    first, second, front = figure["data"]
    assert [first["name"], second["name"], front["name"]] == ["reinforce", "random", "front"]
    assert first["x"] == pytest.approx([1.5, 1.0, 2.0])
    assert first["y"] == [0.7, 0.8, 0.9]
    assert first["customdata"] == ["fp32", "int8", "fp32"]
    assert first["marker"]["symbol"] == ["circle", "diamond-open", "circle"]
    assert first["marker"]["color"] != second["marker"]["color"]
    assert (front["x"], front["y"]) == (pytest.approx([1.0, 2.0]), [0.8, 0.9])
    assert front["line"]["shape"] == "hv", "a faster network isn't there before the next is"
    assert figure["layout"]["shapes"][0]["x0"] == pytest.approx(1.8)


def test_regret_is_drawn_where_it_changes() -> None:
    first, second = regret_by_evaluation(record(n=2))["data"]
    assert (first["x"], first["y"]) == ([1, 3, 6], [0.2, 0.0, 0.0])
    assert (second["x"], second["y"]) == ([1], [0.2])


def test_dots_are_thinned_out_when_there_are_too_many() -> None:
    dots = accuracy_by_latency(record(n=MAX_DOTS))["data"][0]
    assert MAX_DOTS / 2 < len(dots["x"]) <= MAX_DOTS


def test_page_shows_each_search_and_json_keeps_it() -> None:
    result = replace(met(), architectures=(record(), record("<b>ppo")))
    page = render_html(result)
    (drawn,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    figures = json.loads(drawn)
    for index in range(2):
        for name in ("front", "regret"):
            assert f'id="architecture-{name}-{index}"' in page
            assert figures[f"architecture-{name}-{index}"]["data"]
    assert "reinforce: 3 networks, regret 0.0000 at the end" in page
    assert "<b>ppo" not in page
    assert from_json(to_json(result)) == result


def test_page_says_how_many_searches_it_leaves_out() -> None:
    many = replace(met(), architectures=(record(),) * (MAX_ARCHITECTURES + 2))
    page = render_html(many)
    assert f"architecture-front-{MAX_ARCHITECTURES - 1}" in page
    assert f"architecture-front-{MAX_ARCHITECTURES}" not in page
    assert "2 more searches" in page
    assert "Looking for" not in render_html(met())
