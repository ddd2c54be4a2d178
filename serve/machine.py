"""The machine that a measurement belongs to: its processor, cores allowed, and runtimes."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

# Flags that decide which kernels a CPU engine can choose.
RELEVANT_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino", "torch", "numpy")
_MAX_CGROUP_DEPTH = 64


@dataclass(frozen=True)
class Machine:
    """What makes timings comparable; two equal ones may still differ by their neighbours."""

    processor: str
    flags: tuple[str, ...]
    cores: int
    system: str
    runtimes: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def differences(self, other: "Machine") -> list[str]:
        """One line for each field in which `other` differs, itself first."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name}: {mine[name]} here, {theirs[name]} there"
            for name in mine
            if list_like(mine[name]) != list_like(theirs[name])
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
    )


def allowed_cores() -> int:
    """Whole cores that this process may use: the affinity mask, capped by the cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    cores = affinity or os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return max(1, min(cores, int(quota) if quota is not None else cores))


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
