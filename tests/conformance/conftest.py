"""One server with all models of the cases, and a client of it in every encoding."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

from tests.conformance.encodings import ENCODINGS, Encoding, connected
from tests.conformance.models import publish_all
from tests.serve.running_server import RunningServer, running

# The same examples in every run, and no judgement on how long one takes on a busy machine.
hypothesis.settings.register_profile("trimserve", derandomize=True, deadline=None)
hypothesis.settings.load_profile("trimserve")


@pytest.fixture(scope="session")
def conformance_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("scratch")
    publish_all(scratch / "repository", scratch)
    return scratch / "repository"


@pytest.fixture(scope="session")
def conformance_server(
    conformance_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ("--version-policy", "all", "--drain-delay-s=0")
    with running(log, "--repository", str(conformance_models), *arguments) as started:
        yield started


@pytest.fixture(scope="session")
def encodings(conformance_server: RunningServer) -> Iterator[Mapping[str, Encoding]]:
    """By name."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(connected(name, conformance_server)) for name in ENCODINGS}


@pytest.fixture(scope="session", params=ENCODINGS)
def encoding(request: pytest.FixtureRequest, encodings: Mapping[str, Encoding]) -> Encoding:
    return encodings[request.param]
