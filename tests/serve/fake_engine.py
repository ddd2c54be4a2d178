"""An engine that does what the test tells it: waits at a gate, fails on poison, records."""

import threading
from collections.abc import Mapping

import numpy as np

from serve.engines import Signature
from serve.errors import InvalidRequest
from serve.tensor import Array, TensorSpec

POISON = -1.0  # in any element: the engine raises
REFUSED = -2.0  # in any element: the engine says that the request is at fault
PATIENCE_S = 20.0  # a test that waits for longer has failed


class FakeEngine:
    """x FP32[-1, -1] -> y = 2 x. With `gated` every run waits for a permit from `open`."""

    signature = Signature(
        (TensorSpec("x", "FP32", (-1, -1)),), (TensorSpec("y", "FP32", (-1, -1)),)
    )

    def __init__(self, gated: bool = False) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.closed = False
        self._gated = gated
        self._entered = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        x = inputs["x"]
        self.shapes.append(x.shape)
        self._entered.release()
        if self._gated:
            assert self._permits.acquire(timeout=PATIENCE_S)
        if (x == POISON).any():
            raise RuntimeError("poisoned: /secret/path")
        if (x == REFUSED).any():
            raise InvalidRequest("inputs.x", REFUSED, "something else")
        return {"y": np.asarray(x * 2)}

    def close(self) -> None:
        self.closed = True

    def wait_until_running(self) -> None:
        """Return when one more run has begun."""
        assert self._entered.acquire(timeout=PATIENCE_S)

    def open(self, n_runs: int = 1) -> None:
        """Let `n_runs` more runs finish."""
        self._permits.release(n_runs)
