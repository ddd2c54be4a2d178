"""A bounded cache of responses in memory, and the key that tells requests apart.

The least recently used go first. It is owned by one event loop and has no lock; it doesn't know
whose answers it holds beyond the owner that it is told, nor whether caching is right for them.
"""

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from serve.tensor import Array, Tensor, encode_raw

KEY_BYTES = 32
MIN_SECRET_BYTES = 16
# About what Python's objects take around the bytes of an answer: key, entry and dicts; an array.
ENTRY_OVERHEAD_BYTES = 1024
TENSOR_OVERHEAD_BYTES = 256


@dataclass(frozen=True, slots=True)
class _Entry:
    owner: str
    outputs: Mapping[str, Array]
    n_bytes: int


class ResponseCache:
    """Outputs by key, `max_bytes` of them at most. The counters only rise, but for `n_bytes`.

    `owner` names what made the outputs, a loaded version of a model, so that they can be forgotten
    with it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._keys: dict[str, set[bytes]] = {}
        self.n_bytes = 0
        self.n_hits = 0
        self.n_misses = 0
        self.n_evictions = 0

    def get(self, key: bytes) -> Mapping[str, Array] | None:
        """The outputs stored under `key`, read-only."""
        entry = self._entries.get(key)
        if entry is None:
            self.n_misses += 1
            return None
        self.n_hits += 1
        self._entries.move_to_end(key)
        return entry.outputs

    def put(self, key: bytes, owner: str, outputs: Mapping[str, Array]) -> None:
        """Store copies of `outputs`, unless they are larger than the whole cache."""
        if key in self._entries:
            self._remove(key)
        n_bytes = entry_bytes(outputs)
        if n_bytes > self._max_bytes:
            return
        while self.n_bytes + n_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))
            self.n_evictions += 1
        copies = {name: _private(array) for name, array in outputs.items()}
        self._entries[key] = _Entry(owner, MappingProxyType(copies), n_bytes)
        self._keys.setdefault(owner, set()).add(key)
        self.n_bytes += n_bytes

    def forget(self, owner: str) -> None:
        """Drop all that `owner` made."""
        for key in tuple(self._keys.get(owner, ())):
            self._remove(key)

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.n_bytes -= entry.n_bytes
        keys = self._keys[entry.owner]
        keys.remove(key)
        if not keys:
            del self._keys[entry.owner]


def entry_bytes(outputs: Mapping[str, Array]) -> int:
    """What an entry with `outputs` counts for: their bytes, those of BYTES elements as Python
    holds them, and a fixed overhead."""
    n_bytes = ENTRY_OVERHEAD_BYTES + TENSOR_OVERHEAD_BYTES * len(outputs)
    for name, array in outputs.items():
        n_bytes += sys.getsizeof(name) + array.nbytes
        if array.dtype == object:
            n_bytes += sum(map(sys.getsizeof, array.ravel().tolist()))
    return n_bytes


def request_key(
    secret: bytes,
    tenant: str,
    owner: str,
    inputs: Mapping[str, Array],
    datatypes: Mapping[str, str],
    outputs: Sequence[str],
) -> bytes:
    """A keyed BLAKE2b of 256 bits over all that decides an answer. Inputs count by name, in any
    order; `outputs` in theirs. Values count bit for bit: 0.0 and -0.0 are different requests.

    `secret` has 16 to 64 random bytes; who doesn't know it can't look for collisions, nor find
    out by a key what somebody asked. `datatypes` has one for each of `inputs`.
    """
    if not MIN_SECRET_BYTES <= len(secret) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ValueError(f"secret: got {len(secret)} bytes, want {MIN_SECRET_BYTES} to 64")
    state = hashlib.blake2b(key=secret, digest_size=KEY_BYTES, person=b"response cache")
    _add_text(state, tenant)
    _add_text(state, owner)
    _add_number(state, len(inputs))
    for name in sorted(inputs):
        _add_tensor(state, Tensor(name, datatypes[name], inputs[name]))
    _add_number(state, len(outputs))
    for name in outputs:
        _add_text(state, name)
    return state.digest()


def _add_tensor(state: hashlib.blake2b, tensor: Tensor) -> None:
    _add_text(state, tensor.name)
    _add_text(state, tensor.datatype)
    _add_number(state, len(tensor.shape))
    for size in tensor.shape:
        _add_number(state, size)
    if tensor.datatype == "BYTES":
        _add_bytes(state, encode_raw(tensor))
    else:
        # Of bytes, since BF16 has no buffer of its own; no copy where it is contiguous.
        _add_bytes(state, np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).data)


def _add_text(state: hashlib.blake2b, text: str) -> None:
    _add_bytes(state, text.encode("utf-8", "surrogatepass"))


def _add_bytes(state: hashlib.blake2b, raw: bytes | memoryview) -> None:
    """With their length in front: what follows can't be taken for a part of them."""
    _add_number(state, len(raw))
    state.update(raw)


def _add_number(state: hashlib.blake2b, number: int) -> None:
    state.update(number.to_bytes(8, "little"))


def _private(array: Array) -> Array:
    """A copy: the original may be a view of a whole batch, or be written to."""
    copy = np.array(array, order="C")
    copy.flags.writeable = False
    return copy
