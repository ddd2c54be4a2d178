"""Tensors in system shared memory by tritonclient's four clients and its own memory module."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from serve.tensor import Array
from tests.clients.api import Api, assert_close, document, response
from tests.clients.conftest import SHARED_MEMORY_PREFIX
from tests.clients.models import text_rows
from tests.serve.onnx_models import linear_by_hand
from tests.serve.versions import rows

REGION = "a region"  # its name, which the path of a URL must quote
BYTE_SIZE = 4096
OUTPUT_OFFSET = 2048
UNSUPPORTED = ("501", "StatusCode.UNIMPLEMENTED")


class Memory:
    """A shared memory object of this process, and its key."""

    def __init__(self) -> None:
        self.key = f"/{SHARED_MEMORY_PREFIX}-{uuid.uuid4().hex[:8]}"
        self.handle = shm.create_shared_memory_region(REGION, self.key, BYTE_SIZE, create_only=True)

    def put(self, array: Array) -> int:
        """Write an array to its beginning; returns its bytes."""
        if array.dtype == object:
            serialized = serialize_byte_tensor(array)
            shm.set_shared_memory_region(self.handle, [serialized])
            return len(serialized.item())
        shm.set_shared_memory_region(self.handle, [array])
        return array.nbytes

    def output(self, like: Array) -> Array:
        """A copy of what was written at OUTPUT_OFFSET."""
        return np.copy(
            shm.get_contents_as_numpy(
                self.handle, like.dtype, list(like.shape), offset=OUTPUT_OFFSET
            )
        )


@pytest.fixture
def memory(apis: dict[str, Api]) -> Iterator[Memory]:
    """Memory that the server has forgotten when the test ends."""
    made = Memory()
    yield made
    apis["grpc"].unregister_system_shared_memory()
    shm.destroy_shared_memory_region(made.handle)


@pytest.fixture
def registered(api: Api, memory: Memory) -> Api:
    """An API that registered the whole memory as REGION."""
    api.register_system_shared_memory(REGION, memory.key, BYTE_SIZE)
    return api


def regions(api: Api, name: str = "") -> list[tuple[str, str, int, int]]:
    """Name, key, offset and size of what is registered."""
    answer = document(api.get_system_shared_memory_status(name))
    entries = list(answer["regions"].values()) if api.is_grpc else answer
    return sorted((e["name"], e["key"], int(e["offset"]), int(e["byte_size"])) for e in entries)


@pytest.mark.parametrize(
    ("model", "given", "wanted", "array"),
    [
        pytest.param("linear", "x", "y", rows(2), id="numbers"),
        pytest.param("text", "words", "echo", text_rows(), id="text"),
    ],
)
def test_tensors_travel_in_memory_when_both_ends_are(
    registered: Api, memory: Memory, model: str, given: str, wanted: str, array: Array
) -> None:
    size = memory.put(array)
    tensor = registered.module.InferInput(
        given, list(array.shape), "BYTES" if array.dtype == object else "FP32"
    )
    tensor.set_shared_memory(REGION, size)
    output = registered.output(wanted)
    output.set_shared_memory(REGION, BYTE_SIZE - OUTPUT_OFFSET, offset=OUTPUT_OFFSET)
    result = registered.infer(model, [tensor], outputs=[output])
    (described,) = response(result)["outputs"]
    assert described["name"] == wanted
    if model == "text":
        np.testing.assert_array_equal(memory.output(array), array)
    else:
        want = linear_by_hand(array).astype(np.float32)
        assert_close(memory.output(want), want)


def test_tensors_travel_either_way_when_one_of_them_is_in_memory(
    registered: Api, memory: Memory
) -> None:
    """One input and one output of two each: those that are left keep their places."""
    a, b = rows(2, 2), np.array([[1, 2], [3, 4]])
    size = memory.put(a)
    first, second = registered.inputs({"a": a, "b": b})
    first.set_shared_memory(REGION, size)
    doubled = np.empty_like(b)
    output = registered.output("doubled")
    output.set_shared_memory(REGION, doubled.nbytes, offset=OUTPUT_OFFSET)
    outputs = [output, registered.output("sum")]
    result = registered.infer("pair", [first, second], outputs=outputs)
    np.testing.assert_array_equal(memory.output(doubled), b * 2)
    assert_close(result.as_numpy("sum"), a + b)


def test_regions_are_listed_when_registered(api: Api, memory: Memory) -> None:
    assert regions(api) == []
    api.register_system_shared_memory(REGION, memory.key, 64, offset=32)
    api.register_system_shared_memory("b", memory.key, 16)
    first, second = (REGION, memory.key, 32, 64), ("b", memory.key, 0, 16)
    assert regions(api) == [first, second]
    assert regions(api, "b") == [second]
    api.unregister_system_shared_memory("b")
    assert regions(api) == [first]
    api.unregister_system_shared_memory()
    assert regions(api) == []


def test_region_is_refused_when_it_is_registered_already(registered: Api, memory: Memory) -> None:
    with pytest.raises(InferenceServerException, match="a name that isn't registered already"):
        registered.register_system_shared_memory(REGION, memory.key, BYTE_SIZE)


@pytest.mark.parametrize(
    ("key", "byte_size", "message"),
    [
        pytest.param("/another-prefix", 8, "--shared-memory-prefix", id="its key is elsewhere"),
        pytest.param(
            f"/{SHARED_MEMORY_PREFIX}-absent", 8, "the name of a shared memory", id="it isn't there"
        ),
        pytest.param(None, BYTE_SIZE + 1, "offset . byte_size", id="it is longer than its memory"),
    ],
)
def test_region_is_refused_when(
    api: Api, memory: Memory, key: str | None, byte_size: int, message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        api.register_system_shared_memory(REGION, key or memory.key, byte_size)
    assert regions(api) == []


def test_infer_is_refused_when_its_region_is_unknown(api: Api) -> None:
    tensor = api.module.InferInput("x", [2, 4], "FP32")
    tensor.set_shared_memory("absent", 32)
    with pytest.raises(InferenceServerException, match="the name of a registered region"):
        api.infer("linear", [tensor])


def test_infer_is_refused_when_the_output_is_longer_than_its_place(
    registered: Api, memory: Memory
) -> None:
    output = registered.output("y")
    output.set_shared_memory(REGION, 8)
    with pytest.raises(InferenceServerException, match="at least the 24 bytes of the output"):
        registered.ask("linear", {"x": rows(2)}, outputs=[output])


def test_memory_is_off_when_the_server_has_no_prefix(plain_api: Api, memory: Memory) -> None:
    tensor = plain_api.module.InferInput("x", [1, 4], "FP32")
    tensor.set_shared_memory(REGION, 16)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: plain_api.get_system_shared_memory_status(),
        lambda: plain_api.register_system_shared_memory(REGION, memory.key, BYTE_SIZE),
        lambda: plain_api.unregister_system_shared_memory(REGION),
        lambda: plain_api.unregister_system_shared_memory(),
        lambda: plain_api.infer("linear", [tensor]),
    )
    for call in calls:
        with pytest.raises(InferenceServerException, match="shared memory is off") as caught:
            call()
        assert caught.value.status() == UNSUPPORTED[plain_api.is_grpc]
