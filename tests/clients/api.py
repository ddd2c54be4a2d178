"""tritonclient's four clients, called alike, so that one test can ask each of them the same.

A method of the client is a method here; coroutines are run to their end. It translates nothing but
the forms in which the clients give the same answer.
"""

import asyncio
import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict

from serve.tensor import DATATYPES, Array
from tests.serve.running_server import HOST, PATIENCE_S, RunningServer

# name of the API in the tests -> module of its client
APIS = {
    "http": "tritonclient.http",
    "http aio": "tritonclient.http.aio",
    "grpc": "tritonclient.grpc",
    "grpc aio": "tritonclient.grpc.aio",
}


class Api:
    """One client and the event loop that it needs, if it does. `close` closes the client."""

    def __init__(self, name: str, server: RunningServer, runner: asyncio.Runner) -> None:
        self.name = name
        self.is_grpc = name.startswith("grpc")
        self.module: ModuleType = importlib.import_module(f"tritonclient.{name.split()[0]}")
        self._runner = runner
        port = server.grpc_port if self.is_grpc else server.http_port
        client = importlib.import_module(APIS[name]).InferenceServerClient
        self.client: Any = self.run(lambda: client(f"{HOST}:{port}"))

    def run(self, call: Callable[[], Any]) -> Any:
        """What `call` gives; within the event loop, where the API has one."""
        if not self.name.endswith("aio"):
            return call()

        async def awaited() -> Any:
            result = call()
            return await result if inspect.isawaitable(result) else result

        return self._runner.run(asyncio.wait_for(awaited(), PATIENCE_S))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """The client's method of that name, as a plain function."""
        return lambda *args, **options: self.run(
            lambda: getattr(self.client, method)(*args, **options)
        )

    @property
    def plain(self) -> Mapping[str, bool]:
        """The option that asks for an answer as a dict, where there is one."""
        return {"as_json": True} if self.is_grpc else {}

    def inputs(self, arrays: Mapping[str, Array], **options: Any) -> list[Any]:
        """The arrays as the client's inputs, `options` being those of setting their data."""
        made = []
        for name, array in arrays.items():
            given = self.module.InferInput(name, list(array.shape), DATATYPES[array.dtype])
            given.set_data_from_numpy(array, **options)
            made.append(given)
        return made

    def output(self, name: str, **options: Any) -> Any:
        return self.module.InferRequestedOutput(name, **options)

    def ask(self, model: str, arrays: Mapping[str, Array], **options: Any) -> Any:
        """The result of an inference; the client changes a copy of the `options`."""
        return self.infer(model, self.inputs(arrays), **copy.deepcopy(options))


def document(answer: Any) -> Any:
    """An answer as plain values, with the fields that protobuf leaves out where they are zero.

    64-bit integers are strings then, as in protobuf's JSON.
    """
    if isinstance(answer, dict | list):
        return answer
    return MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def response(result: Any) -> dict[str, Any]:
    """What a result's response says of itself: id, model_name, model_version, outputs, ..."""
    got: dict[str, Any] = document(result.get_response())
    return got


def assert_close(got: Any, want: Any) -> None:
    """Equal but for what single precision costs."""
    np.testing.assert_allclose(got, want, atol=1e-5)
