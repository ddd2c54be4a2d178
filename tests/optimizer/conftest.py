"""Places for stores: what a test of the store says holds for both databases."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from optimizer.store import Store
from tests.optimizer.postgresql import Cluster, running_cluster


@dataclass(frozen=True)
class Place:
    """Where a store is; nothing is there yet."""

    location: str
    artifacts: Path

    def open(self) -> Store:
        return Store(self.location, self.artifacts)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as started:
        yield started


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Place]:
    """Makes places with one folder for the artifacts."""
    if request.param == "sqlite":
        return lambda: Place(str(tmp_path / f"{uuid.uuid4().hex}.sqlite"), tmp_path / "artifacts")
    cluster: Cluster = request.getfixturevalue("cluster")
    return lambda: Place(cluster.create(f"store{uuid.uuid4().hex}"), tmp_path / "artifacts")


@pytest.fixture
def place(new_place: Callable[[], Place]) -> Place:
    return new_place()
