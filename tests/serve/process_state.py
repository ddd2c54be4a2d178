"""What a server's process holds, as Linux tells: memory and descriptors. It asks the kernel, not
the server."""

import re
from pathlib import Path

from tests.serve.running_server import RunningServer, until


def memory_mib(server: RunningServer, name: str = "VmRSS") -> float:
    """VmRSS, what it holds now, or VmHWM, the most it ever held."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    match = re.search(rf"{name}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


def n_descriptors(server: RunningServer) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def assert_nothing_is_left(server: RunningServer) -> None:
    """Wait until no request is under way, in the queue or beyond it."""
    until(lambda: server.metric("trimserve_requests_in_flight") == 0)
    until(lambda: server.metric("nv_inference_pending_request_count") == 0)
