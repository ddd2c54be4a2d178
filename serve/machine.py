"""The machine that a measurement belongs to: its processor, cores allowed, and runtimes.

Only what stays from one run to the next is in it; how busy the machine was isn't.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

# Flags that decide which kernels a CPU engine can choose.
RELEVANT_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino", "torch", "numpy")
_MAX_CGROUP_DEPTH = 64
_CPUS = Path("/sys/devices/system/cpu")
_UNKNOWN = ("", None)


@dataclass(frozen=True)
class Machine:
    """What makes timings comparable; two equal ones may still differ by their neighbours.

    The last four are "" or None where the system doesn't say, as in records made before there
    were any.
    """

    processor: str
    flags: tuple[str, ...]
    cores: int
    system: str
    runtimes: dict[str, str]
    governor: str = ""
    """Of frequencies, of the allowed cores; several are joined by commas."""
    smt: str = ""
    """Whether threads share cores: the kernel's "on", "off", "forceoff", "notsupported", ..."""
    turbo: str = ""
    """Whether the processor may exceed its base frequency: "on" or "off"."""
    quota_cores: float | None = None
    """Of the cgroup; None for no quota too."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, lists in place of tuples where it passed through JSON."""
        return cls(**{**stored, "flags": tuple(stored["flags"])})

    def differences(self, other: "Machine") -> list[str]:
        """One line for each field in which `other` differs, itself first. What one of the two
        doesn't know is no difference, nor is a runtime that one of them lacks: what both run is run
        by one that both have."""
        mine, theirs = asdict(self), asdict(other)
        shared = self.runtimes.keys() & other.runtimes.keys()
        for one in (mine, theirs):
            one["runtimes"] = {name: one["runtimes"][name] for name in sorted(shared)}
        return [
            f"{name}: {mine[name]} here, {theirs[name]} there"
            for name in mine
            if list_like(mine[name]) != list_like(theirs[name])
            and mine[name] not in _UNKNOWN
            and theirs[name] not in _UNKNOWN
        ]


def list_like(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    processor, flags = _cpuinfo(Path("/proc/cpuinfo"))
    return Machine(
        processor=processor or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in RELEVANT_FLAGS if flag in flags),
        cores=allowed_cores(),
        system=f"{platform.system()} {platform.machine()} Python {platform.python_version()}",
        runtimes={name: version for name in RUNTIMES if (version := _version(name))},
        governor=governor(_CPUS, allowed_cpus()),
        smt=_read(_CPUS / "smt" / "control"),
        turbo=turbo(_CPUS),
        quota_cores=_own_quota(),
    )


def allowed_cpus() -> tuple[int, ...]:
    """The numbers of the processors that this thread may run on, lowest first."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def allowed_cores() -> int:
    """Whole cores that this process may use: the affinity mask, capped by the cgroup's quota."""
    cores, quota = len(allowed_cpus()), _own_quota()
    return max(1, min(cores, int(quota) if quota is not None else cores))


def governor(root: Path, cpus: Sequence[int]) -> str:
    """The frequency governors of `cpus` below `root`, /sys/devices/system/cpu; "" for none."""
    found = {_read(root / f"cpu{cpu}" / "cpufreq" / "scaling_governor") for cpu in cpus}
    return ",".join(sorted(found - {""}))


def turbo(root: Path) -> str:
    """ "on" or "off" as the driver of frequencies says below `root`; "" where none does."""
    without = _read(root / "intel_pstate" / "no_turbo")
    boost = _read(root / "cpufreq" / "boost")
    return {"0": "on", "1": "off"}.get(without) or {"1": "on", "0": "off"}.get(boost, "")


def _own_quota() -> float | None:
    return _cgroup_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))


def _read(path: Path) -> str:
    """What the system says there, "" for nothing."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cgroup_quota(root: Path, own: Path) -> float | None:
    """The tightest CPU quota, in cores, of this process's cgroup (version 2) and its parents."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    relative = next((line[3:] for line in lines if line.startswith("0::")), None)
    if relative is None:
        return None
    group = root / relative.lstrip("/")
    quotas = []
    for _ in range(_MAX_CGROUP_DEPTH):
        try:
            limit, period = (group / "cpu.max").read_text().split()
            if limit != "max":
                quotas.append(int(limit) / int(period))
        except (OSError, ValueError):
            pass
        if group == root:
            break
        group = group.parent
    return min(quotas, default=None)


def _cpuinfo(path: Path) -> tuple[str, frozenset[str]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return "", frozenset()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name", fields.get("cpu part", ""))
    return name, frozenset((fields.get("flags") or fields.get("features") or "").split())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
