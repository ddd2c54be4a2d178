"""Runbooks: every alert has its section, which asks for what servers export."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import serve.errors
from loadtest.burn import PERIOD_S
from loadtest.rules import CLIENTS_FAULTS, rules_of
from serve.metrics import BATCH_PHASES, REQUEST_PHASES
from tests.loadtest.test_rules import MODEL, exported, promtool, slo

RUNBOOKS = Path(__file__).parents[2] / "docs/runbooks.md"
PARTS = ("What it means.", "First looks.", "Likely causes", "Roll back.")


def sections() -> dict[str, str]:
    """Anchor, as GitHub makes it of a heading -> text."""
    _, *found = re.split(r"^## (.+)$", RUNBOOKS.read_text(), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"): text
        for heading, text in zip(found[::2], found[1::2], strict=True)
    }


def queries() -> list[str]:
    return re.findall(r"^```promql\n(.+?)\n```$", RUNBOOKS.read_text(), re.MULTILINE | re.DOTALL)


def alerts(quantile: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]]
    groups = rules_of(slo(quantile=quantile), MODEL, PERIOD_S).document()["groups"]  # type: ignore[assignment]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize("quantile", [0.999, 0.9, 0.5])
def test_every_alert_has_a_section_that_its_annotation_names(quantile: float) -> None:
    there = sections()
    for one in alerts(quantile):
        page, _, anchor = one["annotations"]["runbook"].partition("#")
        assert page == "docs/runbooks.md"
        for part in PARTS:
            assert f"**{part}" in there[anchor], (anchor, part)


def test_every_section_is_of_an_alert() -> None:
    named = {one["annotations"]["runbook"].partition("#")[2] for one in alerts(0.99)}
    assert set(sections()) == named


def test_links_within_the_page_lead_to_a_section() -> None:
    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOKS.read_text())) <= set(sections())


def test_queries_ask_for_what_servers_export() -> None:
    names = set(re.findall(r"^([a-z_]+)(?:\{| )", exported(), re.MULTILINE))
    wanted = {name for one in queries() for name in re.findall(r"trimserve_[a-z_]+", one)}
    assert len(wanted) >= 4
    assert wanted <= names


def test_codes_of_failures_are_the_servers() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", sections()["success-budget"], re.MULTILINE)
    named = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    codes = {
        one.code
        for one in vars(serve.errors).values()
        if isinstance(one, type) and issubclass(one, serve.errors.ServeError) and one.code
    }
    assert named == codes - {*CLIENTS_FAULTS}


def test_phases_that_are_named_are_the_servers() -> None:
    causes = sections()["latency-budget"]
    named = set(re.findall(r"\*([a-z]+)\*(?!\*)", causes))
    assert named == {"queue", "execute", "decode", "transform", "encode"}
    assert named <= {*REQUEST_PHASES, *BATCH_PHASES}


@pytest.mark.full
def test_queries_are_promql(tmp_path: Path) -> None:
    rules = [{"record": f"checked:{n}:query", "expr": one} for n, one in enumerate(queries())]
    content = {"groups": [{"name": "queries", "rules": rules}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(content, width=1000))
    promtool("check", "rules", str(tmp_path / "rules.yaml"))
