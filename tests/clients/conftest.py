"""Two servers for all tests here: one that lets its clients do everything, one as it comes."""

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.api import APIS, Api
from tests.clients.models import MODELS, publish_all
from tests.serve import onnx_models
from tests.serve.running_server import RunningServer, running
from tests.serve.versions import publish

# Other runs on the same machine share /dev/shm.
SHARED_MEMORY_PREFIX = f"trimserve-test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of all `MODELS`."""
    scratch = tmp_path_factory.mktemp("scratch")
    publish_all(scratch / "repository", scratch)
    return scratch / "repository"


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Everything allowed on the data ports, every model loaded, in all its versions."""
    with running(
        tmp_path_factory.mktemp("server") / "log",
        f"--repository={models}",
        "--model-control=explicit",
        "--control-port=0",
        "--control-on-data-port",
        f"--shared-memory-prefix=/{SHARED_MEMORY_PREFIX}",
        "--version-policy=all",
        "--drain-delay-s=0",
        *(f"--load-model={name}" for name in MODELS),
    ) as started:
        yield started


@pytest.fixture(scope="session")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """No option but what to serve."""
    scratch = tmp_path_factory.mktemp("plain")
    publish(scratch / "repository", onnx_models.linear, scratch)
    with running(scratch / "log", f"--repository={scratch / 'repository'}") as started:
        yield started


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="session")
def apis(server: RunningServer, runner: asyncio.Runner) -> Iterator[dict[str, Api]]:
    """The four clients, of the server that allows everything."""
    made = {name: Api(name, server, runner) for name in APIS}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def plain_apis(plain_server: RunningServer, runner: asyncio.Runner) -> Iterator[dict[str, Api]]:
    """The four clients, of the server as it comes."""
    made = {name: Api(name, plain_server, runner) for name in APIS}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture(params=list(APIS))
def api(request: pytest.FixtureRequest, apis: dict[str, Api]) -> Api:
    """Each of the four clients, of the server that allows everything."""
    return apis[request.param]


@pytest.fixture(params=[name for name in APIS if name.startswith("http")])
def http_api(request: pytest.FixtureRequest, apis: dict[str, Api]) -> Api:
    """Those of them that speak HTTP."""
    return apis[request.param]


@pytest.fixture(params=[name for name in APIS if name.startswith("grpc")])
def grpc_api(request: pytest.FixtureRequest, apis: dict[str, Api]) -> Api:
    """Those of them that speak gRPC."""
    return apis[request.param]


@pytest.fixture(params=list(APIS))
def plain_api(request: pytest.FixtureRequest, plain_apis: dict[str, Api]) -> Api:
    """Each of the four clients, of the server as it comes."""
    return plain_apis[request.param]
