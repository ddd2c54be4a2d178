"""Units: indices along axes of tensors that can only go together, as a union-find.

Which indices those are is for `optimizer.pruning.rules` to say.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""[n]: the unit of each index along an axis."""
FROZEN = 0
"""The unit that can't go."""


class Units:
    def __init__(self) -> None:
        self._parents: list[int] = [FROZEN]

    def fresh(self, n: int) -> Ids:
        """`n` new units."""
        start = len(self._parents)
        self._parents.extend(range(start, start + n))
        return np.arange(start, start + n, dtype=np.int64)

    def merge(self, one: Ids, other: Ids) -> None:
        """Index by index, the two go together from now on. Both [n]."""
        if len(one) != len(other):
            raise ValueError(f"got {len(one)} and {len(other)} indices, want as many")
        for a, b in set(zip(one.tolist(), other.tolist(), strict=True)):
            first, second = sorted((self._root(a), self._root(b)))
            self._parents[second] = first  # the frozen one is the smallest

    def freeze(self, ids: Ids) -> None:
        self.merge(ids, np.zeros_like(ids))

    def roots(self, ids: Ids) -> Ids:
        """One name for each set of units that go together; FROZEN for those that can't."""
        return np.array([self._root(one) for one in ids.tolist()], dtype=np.int64)

    def _root(self, one: int) -> int:
        root = one
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[one] != root:
            self._parents[one], one = root, self._parents[one]
        return root
