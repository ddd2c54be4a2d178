import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

STUB = Path(__file__).with_name("stub_server.py")


@dataclass(frozen=True)
class StubPorts:
    rest: int
    grpc: int
    metrics: int

    @property
    def rest_url(self) -> str:
        return f"http://127.0.0.1:{self.rest}"

    @property
    def grpc_url(self) -> str:
        return f"grpc://127.0.0.1:{self.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics}/metrics"


StartStub = Callable[..., StubPorts]


@pytest.fixture
def start_stub() -> Iterator[StartStub]:
    """Start stub servers with the given arguments; all are ended after the test."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> StubPorts:
        stub = subprocess.Popen(
            [sys.executable, str(STUB), *arguments], stdout=subprocess.PIPE, text=True
        )
        running.append(stub)
        assert stub.stdout is not None
        return StubPorts(**json.loads(stub.stdout.readline()))

    yield start
    for stub in running:
        stub.terminate()
        stub.wait(10)
        assert stub.stdout is not None
        stub.stdout.close()
