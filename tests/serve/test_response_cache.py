"""The cache of responses: its bounds, its order, and keys that never confuse two requests."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.response_cache import KEY_BYTES, ResponseCache, entry_bytes, request_key
from serve.tensor import NUMPY_DTYPES, Array, Tensor
from tests.serve.tensors import tensors

SECRET = bytes(range(32))
# All but BF16, which hypothesis has no values for.
DRAWN = tensors(tuple(name for name in NUMPY_DTYPES if name != "BF16"))


def answer(value: float, length: int = 100) -> dict[str, Array]:
    return {"y": np.full(length, value, np.float32)}


def key(number: int) -> bytes:
    return hashlib.blake2b(bytes([number]), digest_size=KEY_BYTES).digest()


def texts(*elements: bytes) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


@dataclass(frozen=True)
class Request:
    """What a key is made of."""

    inputs: Mapping[str, Array]
    datatypes: Mapping[str, str]
    outputs: tuple[str, ...] = ()
    tenant: str = ""
    owner: str = "m/1"
    secret: bytes = SECRET

    def key(self) -> bytes:
        return request_key(
            self.secret, self.tenant, self.owner, self.inputs, self.datatypes, self.outputs
        )


def request(*given_inputs: Tensor, outputs: tuple[str, ...] = ()) -> Request:
    return Request(
        {tensor.name: tensor.array for tensor in given_inputs},
        {tensor.name: tensor.datatype for tensor in given_inputs},
        outputs,
    )


# --- the cache


def test_cache_gives_what_was_put_when_asked_again() -> None:
    cache = ResponseCache(10_000)
    assert cache.get(key(1)) is None
    cache.put(key(1), "a", {"y": np.arange(3), "names": texts(b"a", b"bc")})
    found = cache.get(key(1))
    assert found is not None
    assert {name: array.tolist() for name, array in found.items()} == {
        "y": [0, 1, 2], "names": [b"a", b"bc"]
    }  # fmt: skip
    assert (cache.n_hits, cache.n_misses, cache.n_evictions) == (1, 1, 0)


@pytest.mark.parametrize("datatype", sorted(NUMPY_DTYPES))
def test_cache_keeps_a_private_copy_when_the_datatype_is_any(datatype: str) -> None:
    cache = ResponseCache(10_000)
    array = texts(b"a", b"b") if datatype == "BYTES" else np.zeros(2, NUMPY_DTYPES[datatype])
    first = array[0]
    cache.put(key(1), "a", {"y": array})
    array[0] = array[1] = b"c" if datatype == "BYTES" else 1
    found = cache.get(key(1))
    assert found is not None
    assert found["y"].dtype == array.dtype
    assert found["y"][0] == first
    assert not np.shares_memory(found["y"], array)
    with pytest.raises(ValueError, match="read-only"):
        found["y"][0] = first


def test_cache_keeps_no_batch_alive_when_an_output_is_a_view_of_it() -> None:
    cache = ResponseCache(10_000)
    batch = np.zeros((1000, 4))
    cache.put(key(1), "a", {"y": batch[:1]})
    found = cache.get(key(1))
    assert found is not None
    assert found["y"].base is None


def test_cache_drops_the_least_recently_used_when_it_is_full() -> None:
    cache = ResponseCache(3 * entry_bytes(answer(0)))
    for number in (1, 2, 3):
        cache.put(key(number), "a", answer(number))
    assert cache.get(key(1)) is not None
    cache.put(key(4), "a", answer(4))
    assert [cache.get(key(n)) is not None for n in (1, 2, 3, 4)] == [True, False, True, True]
    assert cache.n_evictions == 1
    assert cache.n_bytes == 3 * entry_bytes(answer(0))


def test_cache_drops_as_many_as_it_must_when_an_answer_is_large() -> None:
    large = answer(9, 600)
    cache = ResponseCache(entry_bytes(large) + entry_bytes(answer(0)))
    for number in (1, 2, 3):
        cache.put(key(number), "a", answer(number))
    cache.put(key(9), "a", large)
    assert [cache.get(key(n)) is not None for n in (1, 2, 3, 9)] == [False, False, True, True]
    assert cache.n_evictions == 2


def test_cache_stores_nothing_when_an_answer_is_larger_than_all_of_it() -> None:
    cache = ResponseCache(entry_bytes(answer(0)))
    cache.put(key(1), "a", answer(1))
    cache.put(key(2), "a", answer(2, 101))
    assert cache.get(key(2)) is None
    assert cache.get(key(1)) is not None
    assert cache.n_evictions == 0


def test_cache_counts_once_when_a_key_is_put_again() -> None:
    cache = ResponseCache(10_000)
    cache.put(key(1), "a", answer(1, 50))
    cache.put(key(1), "b", answer(2))
    assert cache.n_bytes == entry_bytes(answer(2))
    cache.forget("a")
    found = cache.get(key(1))
    assert found is not None
    assert found["y"][0] == 2


def test_cache_forgets_only_the_owner_when_told() -> None:
    cache = ResponseCache(10_000)
    for number, owner in ((1, "a"), (2, "b"), (3, "a")):
        cache.put(key(number), owner, answer(number))
    cache.forget("a")
    cache.forget("unknown")
    assert [cache.get(key(n)) is not None for n in (1, 2, 3)] == [False, True, False]
    assert cache.n_bytes == entry_bytes(answer(2))
    assert cache.n_evictions == 0


def test_entry_counts_every_byte_when_elements_are_texts() -> None:
    short, long = texts(b"a"), texts(b"a" * 1001)
    assert entry_bytes({"y": long}) - entry_bytes({"y": short}) == 1000
    assert entry_bytes({}) > 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "forget"]), st.integers(0, 8), st.integers(0, 300)
        ),
        max_size=40,
    )
)
def test_cache_stays_within_its_bytes_when_used_in_any_order(
    steps: list[tuple[str, int, int]],
) -> None:
    cache = ResponseCache(4 * entry_bytes(answer(0)))
    for verb, number, length in steps:
        if verb == "put":
            cache.put(key(number), str(number % 3), answer(number, length))
        elif verb == "forget":
            cache.forget(str(number % 3))
        else:
            found = cache.get(key(number))
            assert found is None or (found["y"] == number).all()
        held = [cache.get(key(n)) for n in range(9)]
        assert cache.n_bytes == sum(entry_bytes(one) for one in held if one is not None)
        assert cache.n_bytes <= 4 * entry_bytes(answer(0))


# --- keys


@given(st.lists(DRAWN, max_size=3), st.lists(st.text(max_size=3), max_size=3))
def test_key_is_the_same_when_requests_are_equal(
    given_inputs: list[Tensor], out: list[str]
) -> None:
    named = [replace(tensor, name=f"x{i}") for i, tensor in enumerate(given_inputs)]
    copies = [replace(tensor, array=tensor.array.copy(order="F")) for tensor in named]
    first, second = request(*named, outputs=tuple(out)), request(*copies[::-1], outputs=tuple(out))
    assert first.key() == second.key()
    assert len(first.key()) == KEY_BYTES


@given(
    st.tuples(DRAWN, st.text(max_size=2), st.lists(st.text(max_size=2), max_size=2)),
    st.tuples(DRAWN, st.text(max_size=2), st.lists(st.text(max_size=2), max_size=2)),
)
def test_keys_differ_when_anything_does(
    one: tuple[Tensor, str, list[str]], other: tuple[Tensor, str, list[str]]
) -> None:
    def content(tensor: Tensor, name: str, out: list[str]) -> tuple[object, ...]:
        values = tensor.array.tolist() if tensor.datatype == "BYTES" else tensor.array.tobytes()
        return name, tensor.datatype, tensor.shape, values, out

    keys = [
        request(replace(tensor, name=name), outputs=tuple(out)).key()
        for tensor, name, out in (one, other)
    ]
    assert (keys[0] == keys[1]) == (content(*one) == content(*other))


X = Tensor("x", "INT8", np.arange(6, dtype=np.int8))
BASE = request(X, Tensor("z", "BYTES", texts(b"ab", b"c")), outputs=("y",))


def test_keys_all_differ_when_requests_could_be_confused() -> None:
    z = BASE.inputs["z"]
    confusable = {
        "the request itself": BASE,
        "another tenant": replace(BASE, tenant="t"),
        "another version": replace(BASE, owner="m/11"),
        "tenant and version shifted": replace(BASE, tenant="m", owner="/1"),
        "another secret": replace(BASE, secret=SECRET[::-1]),
        "another shape": request(replace(X, array=X.array.reshape(2, 3)), outputs=("y",)),
        "the shape turned": request(replace(X, array=X.array.reshape(3, 2)), outputs=("y",)),
        "an axis more": request(replace(X, array=X.array.reshape(6, 1)), outputs=("y",)),
        "one input alone": request(X, outputs=("y",)),
        "another datatype": request(
            Tensor("x", "UINT8", X.array.view(np.uint8)), outputs=("y",)
        ),
        "wider elements": request(Tensor("x", "INT16", X.array.view(np.int16)), outputs=("y",)),
        "another name": request(replace(X, name="w"), outputs=("y",)),
        "the output as a name": request(replace(X, name="xy")),
        "names exchanged": Request(
            {"x": z, "z": X.array}, {"x": "BYTES", "z": "INT8"}, ("y",)
        ),
        "elements shifted": request(X, Tensor("z", "BYTES", texts(b"a", b"bc")), outputs=("y",)),
        "elements joined": request(X, Tensor("z", "BYTES", texts(b"abc")), outputs=("y",)),
        "an element more": request(
            X, Tensor("z", "BYTES", texts(b"ab", b"c", b"")), outputs=("y",)
        ),
        "no outputs": replace(BASE, outputs=()),
        "outputs split": replace(BASE, outputs=("y", "")),
        "outputs joined": replace(BASE, outputs=("yy",)),
        "an output twice": replace(BASE, outputs=("y", "y")),
    }  # fmt: skip
    keys = {name: one.key() for name, one in confusable.items()}
    assert len(set(keys.values())) == len(keys)


def test_keys_differ_when_inputs_are_spelled_like_outputs() -> None:
    """The first name's length is the number of outputs, and the rest of the inputs reads like
    them, one after the other: only the number of inputs tells the two apart."""
    first, second = (np.array(ord(letter), np.int8) for letter in "ab")
    names = ("\x01" + "\0" * 7 + "z", "y")
    inputs = request(Tensor(names[0], "INT8", first), Tensor(names[1], "INT8", second))
    outputs = request(outputs=("z", "INT8", "", "a", "y", "INT8", "", "b", ""))
    assert inputs.key() != outputs.key()


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_keys_differ_when_only_the_sign_of_zero_does(datatype: str) -> None:
    zero = np.zeros((), NUMPY_DTYPES[datatype])
    assert request(Tensor("x", datatype, zero)).key() != request(Tensor("x", datatype, -zero)).key()


def test_key_is_made_when_a_name_is_half_a_surrogate_pair() -> None:
    keys = {replace(BASE, tenant=tenant).key() for tenant in ("\ud800", "\udfff", "?")}
    assert len(keys) == 3


@pytest.mark.parametrize("length", [0, 15, 65])
def test_key_is_refused_when_the_secret_has_a_wrong_length(length: int) -> None:
    with pytest.raises(ValueError, match=f"secret: got {length} bytes"):
        replace(BASE, secret=bytes(length)).key()
