"""Memory: what the engines of a contender add to this process.

It is meaningful only in a process that has loaded no engine before (`optimizer.measuring.child`
starts one), since libraries stay and allocators keep what they had.
"""

from pathlib import Path

from optimizer.measuring import Batch
from optimizer.timing import Contender, Instances

STATUS = Path("/proc/self/status")


def grown_bytes(contender: Contender, batch: Batch) -> int:
    """Resident memory after all instances ran the batch, less what there was before: the
    runtime's libraries, weights and buffers. Raises OSError where the system doesn't say."""
    before = resident_bytes()
    with Instances(contender) as instances:
        instances.each(lambda engine: engine.run(batch))
        return max(0, resident_bytes() - before)


def resident_bytes(status: Path = STATUS) -> int:
    """VmRSS of this process (proc(5)): anonymous, shared and mapped pages."""
    with status.open() as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "VmRSS":
                return int(value.split()[0]) * 1024
    raise OSError(f"{status}: has no VmRSS")
