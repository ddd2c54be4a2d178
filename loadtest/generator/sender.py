"""What the dispatcher asks of a transport."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Answer:
    status: int
    """as in loadtest.samples"""
    n_bytes: int = 0
    """length of the answer's body"""
    error: str = ""
    """what the server, or the connection, said, where it failed"""
    body: bytes = b""
    """of a success"""
    json_bytes: int | None = None
    """length of a REST body's JSON part, where binary tensors follow it"""


class Sender(Protocol):
    def send(self, payload: int) -> Answer:
        """Send the payload of that index and wait for its answer, letting others run.

        Never raises for what the network or the server does. A gevent.Timeout from outside
        passes through, and the connection it interrupted isn't used again.
        """

    def close(self) -> None: ...
