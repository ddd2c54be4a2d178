"""Energy: what the processor's packages used, by Intel's RAPL counters in the kernel's powercap.

AMD's are there too, under the same names. Nothing is subtracted: whoever runs an engine pays for
the idle share of the package as well. It doesn't know memory, disks or fans.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MAX_SECONDS = 60.0
"""Between two looks at a counter, which starts again from 0 after minutes at full power."""
_PACKAGE = re.compile(r"intel-rapl:\d+")
_JOULES_PER_COUNT = 1e-6


@dataclass(frozen=True)
class Counter:
    """One package's: it counts microjoules up to `range_uj` and then from 0."""

    energy_uj: int
    range_uj: int


def read_counters(root: Path = POWERCAP) -> Mapping[str, Counter]:
    """Every package's by its name; empty where there is none that this process may read."""
    try:
        zones = sorted(zone for zone in root.iterdir() if _PACKAGE.fullmatch(zone.name))
        # The zone of the whole platform contains the packages'.
        packages = [zone for zone in zones if _text(zone / "name").startswith("package")]
        return {
            zone.name: Counter(
                int(_text(zone / "energy_uj")), int(_text(zone / "max_energy_range_uj"))
            )
            for zone in packages
        }
    except (OSError, ValueError):
        return {}


def spent_joules(before: Mapping[str, Counter], after: Mapping[str, Counter]) -> float | None:
    """Of all packages together, each of which started again at most once in between; None where
    the two don't name the same ones, or none."""
    if not before or before.keys() != after.keys():
        return None
    counts = [
        (after[name].energy_uj - counter.energy_uj) % (counter.range_uj + 1)
        for name, counter in before.items()
    ]
    return sum(counts) * _JOULES_PER_COUNT


def _text(path: Path) -> str:
    return path.read_text().strip()
