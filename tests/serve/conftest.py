"""One server with every tiny model, shared by the tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from serve.artifact import Batching
from tests.serve import onnx_models
from tests.serve.running_server import RunningServer, running
from tests.serve.versions import publish, rows, slo_document

THRESHOLD_MS = 37.5
MAX_REQUEST_BYTES = 1_000_000

# The same examples in every run, and no judgement on how long one takes on a busy machine.
hypothesis.settings.register_profile("trimserve", derandomize=True, deadline=None)
hypothesis.settings.load_profile("trimserve")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository; `work` has one place in its queue, `linear` an SLO and a golden input."""
    scratch = tmp_path_factory.mktemp("scratch")
    root = scratch / "repository"
    publish(
        root, onnx_models.linear, scratch, slo=slo_document(THRESHOLD_MS), golden={"x": rows(3)}
    )
    publish(root, onnx_models.work, scratch, batching=Batching(0, max_queue_size=1))
    for builder in (
        onnx_models.pair,
        onnx_models.fixed,
        onnx_models.text,
        onnx_models.ragged,
        onnx_models.logarithm,
        onnx_models.pick,
    ):
        publish(root, builder, scratch)
    return root


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    limit = f"--max-request-bytes={MAX_REQUEST_BYTES}"
    with running(log, "--repository", str(models), limit, "--drain-delay-s=0") as started:
        yield started
