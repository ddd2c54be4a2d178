"""One process of this machine and this user, held so that no other is hit in its place.

Linux only: a process is held by a descriptor (pidfd), which never means another process that got
the same number, and /proc says who listens where.
"""

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from loadtest.target import Target

PROC = Path("/proc")
LISTENING = "0A"
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound
MAX_PID_FILE_BYTES = 64
STOPPED_WITHIN_S = 1.0
LOOK_EVERY_S = 0.002


class ProcessUnusable(Exception):
    """A process that may not, or can't, be disturbed; `str()` says which and why."""


class Process:
    """A running process; close it after use."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessUnusable where there is none, or it is another user's."""
        if not hasattr(os, "pidfd_open"):
            raise ProcessUnusable(f"processes are held by Linux's pidfd, not on {sys.platform}")
        self.pid = pid
        try:
            self.descriptor = os.pidfd_open(pid)
        except OSError as error:
            raise ProcessUnusable(f"there is no process {pid} ({error.strerror})") from error
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def send(self, number: signal.Signals) -> None:
        """Raises ProcessUnusable where it has ended."""
        try:
            signal.pidfd_send_signal(self.descriptor, number)
        except OSError as error:
            raise ProcessUnusable(
                f"process {self.pid} can't be sent {number.name}: {error.strerror}"
            ) from error

    def ends_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1e3))

    def stops_within(self, seconds: float = STOPPED_WITHIN_S) -> bool:
        """Whether SIGSTOP has taken effect."""
        deadline_s = time.monotonic() + seconds
        while self._state() != "T":
            if time.monotonic() > deadline_s or self.ends_within(LOOK_EVERY_S):
                return False
        return True

    def listens_on(self, targets: Sequence[Target]) -> bool:
        """It holds a listening socket of one of the targets' addresses."""
        return bool(listening_inodes(targets) & self._socket_inodes())

    def close(self) -> None:
        os.close(self.descriptor)

    def _check(self) -> None:
        if self.pid == os.getpid():
            raise ProcessUnusable(f"process {self.pid} is the load test itself, want a server")
        try:
            owner = (PROC / str(self.pid)).stat().st_uid
        except OSError as error:
            raise ProcessUnusable(f"there is no process {self.pid}") from error
        if owner != os.geteuid():
            raise ProcessUnusable(
                f"process {self.pid} is user {owner}'s, want one of user {os.geteuid()}"
            )
        if self.ends_within(0):
            raise ProcessUnusable(f"process {self.pid} has ended")

    def _state(self) -> str:
        try:
            text = (PROC / str(self.pid) / "stat").read_text("utf-8", "replace")
        except OSError:
            return ""
        # The name before it is in brackets and may hold any character.
        return text.rpartition(")")[2].split()[0]

    def _socket_inodes(self) -> set[str]:
        found, folder = set(), PROC / str(self.pid) / "fd"
        try:
            names = os.listdir(folder)
        except OSError:
            return set()
        for name in names:
            try:
                link = os.readlink(folder / name)
            except OSError:
                continue
            if link.startswith("socket:["):
                found.add(link.removeprefix("socket:[").removesuffix("]"))
        return found


def open_process(
    pid: int | None, pid_file: str | None, any_process: bool, targets: Sequence[Target]
) -> Process:
    """The process by its number, or by the file that holds it now; one that listens on a
    target's address, unless any will do.

    Raises ProcessUnusable.
    """
    process = Process(read_pid(Path(pid_file)) if pid_file is not None else pid or 0)
    if any_process or process.listens_on(targets):
        return process
    process.close()
    addresses = ", ".join(target.address for target in targets)
    raise ProcessUnusable(
        f"process {process.pid} doesn't listen on {addresses}: want the server's own process, or "
        "any_process: true"
    )


def read_pid(path: Path) -> int:
    """Raises ProcessUnusable."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_PID_FILE_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        raise ProcessUnusable(f"pid_file {path}: {error.strerror}") from error
    if not text.isdecimal() or int(text) < 2:
        raise ProcessUnusable(f"pid_file {path}: got {text!r}, want the number of a process")
    return int(text)


def listening_inodes(targets: Sequence[Target]) -> set[str]:
    """Of the sockets of this machine on which a target's requests arrive."""
    wanted: set[tuple[str, int]] = set()
    for target in targets:
        for address in local_addresses(target.host):
            wanted |= {(one, target.port) for one in (address, *EVERYWHERE)}
    return {inode for host, port, inode in listening_sockets() if (host, port) in wanted}


def local_addresses(host: str) -> set[str]:
    """Those of the host's addresses that are this machine's own."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return set()
    return {str(where[0]) for family, *_, where in found if _is_local(family, str(where[0]))}


def _is_local(family: int, address: str) -> bool:
    """Only an address of one's own can be bound."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind((address, 0))
    except OSError:
        return False
    return True


def listening_sockets() -> Iterator[tuple[str, int, str]]:
    """(address, port, inode) of each TCP socket that listens."""
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            lines = (PROC / "net" / table).read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == LISTENING:
                address, _, port = columns[1].partition(":")
                yield _address_of(address, family), int(port, 16), columns[9]


def _address_of(text: str, family: int) -> str:
    """The kernel prints an address as words of 4 bytes in its own byte order."""
    words = [text[begin : begin + 8] for begin in range(0, len(text), 8)]
    packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    address = socket.inet_ntop(family, packed)
    # An IPv6 socket may serve an IPv4 address.
    return address.removeprefix("::ffff:")
