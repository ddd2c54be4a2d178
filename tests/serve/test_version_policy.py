"""Version policies: which versions are chosen, and what isn't a policy."""

import pytest

from serve.version_policy import VersionPolicy, parse_policy

ALL = VersionPolicy(latest=None)


@pytest.mark.parametrize(
    ("policy", "available", "selected"),
    [
        pytest.param(VersionPolicy(), ["1", "2", "3"], ("3",), id="nothing is said"),
        pytest.param(VersionPolicy(2), ["9", "10", "2"], ("9", "10"), id="numbers have digits"),
        pytest.param(VersionPolicy(5), ["2", "1"], ("1", "2"), id="there are fewer"),
        pytest.param(VersionPolicy(), [], (), id="there are none"),
        pytest.param(ALL, ["3", "10", "1"], ("1", "3", "10"), id="all are wanted"),
        pytest.param(ALL, ["2", "2"], ("2",), id="one is listed twice"),
        pytest.param(VersionPolicy(specific=("3", "1")), ["1", "2", "3"], ("1", "3"),
                     id="some are named"),
        pytest.param(VersionPolicy(specific=("7", "1")), ["1", "2"], ("1",),
                     id="one that is named isn't there"),
        pytest.param(VersionPolicy(specific=("7",)), ["1", "2"], (), id="none that is named is"),
    ],
)  # fmt: skip
def test_policy_selects_from_the_lowest_to_the_highest_when(
    policy: VersionPolicy, available: list[str], selected: tuple[str, ...]
) -> None:
    assert policy.select(available) == selected


@pytest.mark.parametrize(
    ("policy", "missing"),
    [
        pytest.param(
            VersionPolicy(specific=("10", "9", "1")), ("9", "10"), id="versions are named"
        ),
        pytest.param(VersionPolicy(3), (), id="the latest are wanted"),
        pytest.param(ALL, (), id="all are wanted"),
    ],
)
def test_policy_names_what_is_missing_when(policy: VersionPolicy, missing: tuple[str, ...]) -> None:
    assert policy.missing(["1", "2"]) == missing


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        pytest.param("all", ALL, id="all are wanted"),
        pytest.param("latest:2", VersionPolicy(2), id="the latest two are"),
        pytest.param("specific:1,3", VersionPolicy(None, ("1", "3")), id="two are named"),
        pytest.param("specific:10", VersionPolicy(None, ("10",)), id="one is named"),
        pytest.param("specific:3,1,3", VersionPolicy(None, ("3", "1")), id="one is named twice"),
    ],
)
def test_parse_policy_reads_when(text: str, policy: VersionPolicy) -> None:
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="it is empty"),
        pytest.param("newest", id="the form is unknown"),
        pytest.param("All", id="the form is in capitals"),
        pytest.param("all:", id="all has a colon"),
        pytest.param("latest", id="latest has no number"),
        pytest.param("latest:0", id="latest is none"),
        pytest.param("latest:-1", id="latest is negative"),
        pytest.param("latest:two", id="latest is a word"),
        pytest.param("latest:١", id="latest is no ASCII digit"),
        pytest.param("latest:100000", id="latest is absurd"),
        pytest.param("latest:" + "9" * 5000, id="latest is longer than a number"),
        pytest.param("specific:", id="no version is named"),
        pytest.param("specific:1,,3", id="a version is empty"),
        pytest.param("specific:1, 3", id="there is a space"),
        pytest.param("specific:0", id="a version is 0"),
        pytest.param("specific:01", id="a version has a leading zero"),
        pytest.param("specific:v1", id="a version is a word"),
        pytest.param("specific:" + ",".join(map(str, range(1, 1002))), id="versions are too many"),
    ],
)
def test_parse_policy_says_what_is_allowed_when(text: str) -> None:
    with pytest.raises(ValueError, match=r"version policy: .* all, latest:N .* specific:V,W") as it:
        parse_policy(text)
    assert len(str(it.value)) < 300


@pytest.mark.parametrize(
    ("latest", "specific", "problem"),
    [
        pytest.param(0, (), "latest: got 0, want 1 to", id="latest is none"),
        pytest.param(None, ("x",), "specific: got version 'x', want whole", id="one is a word"),
        pytest.param(1, ("0",), "specific: got version '0', want whole", id="one is 0"),
    ],
)
def test_policy_cannot_be_made_when(
    latest: int | None, specific: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        VersionPolicy(latest, specific)
