"""The table of loaded models: which version answers, and what is said of the others."""

import pytest

from serve.errors import ModelNotFound, ModelNotReady
from serve.model import Model
from serve.repository import Repository, Slot, State


class FakeModel(Model):
    """Only its identity matters here."""

    def __init__(self) -> None:
        self.n_leases = 0


def slot(name: str, version: str, state: State, reason: str = "", wanted: bool = True) -> Slot:
    model = FakeModel() if state == "READY" else None
    return Slot(name, version, state, reason, model, wanted=wanted)


def table(*slots: Slot) -> Repository:
    made = Repository()
    for one in slots:
        made.put(one)
    made.open()
    return made


def test_repository_answers_with_the_highest_ready_version_when_none_is_named() -> None:
    slots = [slot("m", "2", "READY"), slot("m", "10", "READY"), slot("m", "11", "LOADING")]
    repository = table(*slots)
    assert repository.get("m") is slots[1].model
    assert repository.get("m", "2") is slots[0].model
    assert repository.versions("m") == ["2", "10"]


def test_repository_gives_the_reason_when_a_version_is_not_ready() -> None:
    repository = table(slot("m", "1", "UNAVAILABLE", "the golden input differs"))
    with pytest.raises(ModelNotReady, match="the golden input differs"):
        repository.get("m")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        pytest.param("absent", "", id="the model is unknown"),
        pytest.param("m", "2", id="the version is unknown"),
        pytest.param("m", "latest", id="the version is no number"),
        pytest.param("../m", "", id="the name is a path"),
        pytest.param("m\0", "", id="the name has a NUL"),
        pytest.param("", "", id="the name is empty"),
    ],
)
def test_repository_finds_nothing_when(name: str, version: str) -> None:
    with pytest.raises(ModelNotFound):
        table(slot("m", "1", "READY")).get(name, version)


def test_repository_forgets_a_model_when_its_last_version_goes() -> None:
    repository = table(slot("m", "1", "READY"), slot("m", "2", "READY"))
    repository.remove("m", "2")
    assert repository.versions("m") == ["1"]
    repository.remove("m", "1")
    repository.remove("m", "1")
    with pytest.raises(ModelNotFound):
        repository.versions("m")


def test_repository_lists_by_name_and_number_when_it_is_walked() -> None:
    repository = table(*(slot(n, v, "READY") for n, v in [("b", "10"), ("b", "9"), ("a", "1")]))
    assert [(s.name, s.version) for s in repository.slots()] == [
        ("a", "1"),
        ("b", "9"),
        ("b", "10"),
    ]
    assert [s.version for s in repository.slots("b")] == ["9", "10"]
    assert list(repository.slots("absent")) == []


@pytest.mark.parametrize(
    ("slots", "is_ready"),
    [
        pytest.param([], True, id="nothing was asked for"),
        pytest.param([slot("m", "1", "READY")], True, id="a model answers"),
        pytest.param([slot("m", "1", "LOADING")], False, id="the only model is loading"),
        pytest.param(
            [slot("m", "1", "READY"), slot("m", "2", "LOADING")], True,
            id="a newer version is loading beside one that answers",
        ),
        pytest.param(
            [slot("m", "1", "READY"), slot("n", "1", "UNAVAILABLE")], True,
            id="another model is broken",
        ),
        pytest.param([slot("m", "1", "UNAVAILABLE")], False, id="the only model is broken"),
        pytest.param(
            [slot("m", "1", "UNAVAILABLE", wanted=False)], True, id="the only model was unloaded"
        ),
    ],
)  # fmt: skip
def test_repository_is_ready_or_not_when(slots: list[Slot], is_ready: bool) -> None:
    assert table(*slots).is_ready is is_ready


def test_repository_is_not_ready_when_the_start_is_not_over() -> None:
    repository = Repository()
    repository.put(slot("m", "1", "READY"))
    assert not repository.is_ready
    repository.open()
    assert repository.is_ready
