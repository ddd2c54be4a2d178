"""A Ray cluster as the place where a study's work is done: builds on any of its nodes, measurements
alone on one that is marked for them.

This module holds what is chosen about it, and imports no Ray; `connection` alone talks to that.
What travels are bytes of JSON and of frames, and the class of an actor by its name: each node has
trimserve installed, and sees spec, data and artifacts under the same paths.
"""

import re
from dataclasses import dataclass

MEASURE_RESOURCE = "trimserve_measure"
"""The custom resource that marks nodes of the target's kind, one of it each."""
MAX_PENDING_S = 120.0
_HOST_AND_PORT = re.compile(r"[^\s/@:]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}")
_RESOURCE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
_TAKEN = frozenset({"CPU", "GPU", "memory", "object_store_memory"})


@dataclass(frozen=True)
class Cluster:
    """`address` is HOST:PORT of the head (its GCS). The machine that leads a study has to be a node
    of it, with no CPUs if it shall build nothing."""

    address: str
    build_cpus: int = 1
    """Of a builder: so many run on a node, and so many threads compute in each."""
    measure_resource: str = MEASURE_RESOURCE
    max_pending_s: float = MAX_PENDING_S
    """How long to wait for a node that has room for a builder, or one that may measure."""

    def problems(self) -> list[str]:
        """What is wrong with the values, each as `name: got …, want …`; none where they can be
        used."""
        found = []
        if not _is_address(self.address):
            hint = ": Ray's client sends code" if self.address.startswith("ray://") else ""
            found.append(f"address: got {self.address!r}, want HOST:PORT of the head{hint}")
        if not 1 <= self.build_cpus <= 4096:
            found.append(f"build_cpus: got {self.build_cpus}, want 1 to 4096")
        name = self.measure_resource
        if not _RESOURCE.fullmatch(name) or name in _TAKEN:
            found.append(
                f"measure_resource: got {name!r}, want a custom resource's name: a letter, then "
                "letters, digits and _"
            )
        if not 0 < self.max_pending_s <= 86_400:
            found.append(f"max_pending_s: got {self.max_pending_s:g}, want 0 to 86400")
        return found

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


@dataclass(frozen=True)
class Node:
    """A node that is alive. `resources` are all that it has, by Ray's names."""

    id: str
    host: str
    address: str
    resources: dict[str, float]

    def can_build(self, cluster: Cluster) -> bool:
        """Whether builders may be placed on it: it has CPUs for one, and isn't for measuring."""
        resources = self.resources
        is_marked = resources.get(cluster.measure_resource, 0.0) >= 1
        return resources.get("CPU", 0.0) >= cluster.build_cpus and not is_marked

    def __str__(self) -> str:
        """Without what Ray counts for itself."""
        own = {k: v for k, v in self.resources.items() if not k.startswith("node:")}
        shown = [f"{k} {v:g}" for k, v in sorted(own.items()) if not k.endswith("memory")]
        return f"{self.host} ({self.address}): {', '.join(shown) or 'no CPUs'}"


def _is_address(address: str) -> bool:
    matched = _HOST_AND_PORT.fullmatch(address)
    return matched is not None and 1 <= int(address.rpartition(":")[2]) <= 65_535
