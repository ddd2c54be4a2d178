"""The server's counters where its process was ended on purpose: what they can still say.

A process takes its counters with it. Those of its successor, and of the servers that stayed, are
the least that was counted; more than the client sent is a doubt all the same.
"""

from collections.abc import Sequence
from dataclasses import replace

from loadtest.chaos.conductor import Performed
from loadtest.chaos.profile import Command, Kill, Stop
from loadtest.server_metrics import Scrapes
from loadtest.verdict import ServerEvidence


def expect_losses(
    server: ServerEvidence, performed: Sequence[Performed], urls: tuple[str, ...]
) -> ServerEvidence:
    """The evidence with what was asked for no longer a doubt; `urls` are all servers'.

    Where an action ended a process, or a command may have: a restart, and metrics that can't be
    read. Where any action took place: scrapes of Prometheus that failed, since a server that
    stands still answers none, and one that began anew is told by its start and its counters.
    """
    began = [one.action for one in performed if one.started_s is not None]
    if not began:
        return server
    server = replace(server, disturbed=True)
    if not any(isinstance(one, Kill | Stop | Command) for one in began):
        return server
    if server.error:
        return replace(server, lost=urls)
    return replace(
        server,
        scrapes=tuple(_since_the_start(pair) for pair in server.scrapes),
        lost=tuple(pair.url for pair in server.scrapes if pair.restarted),
    )


def _since_the_start(pair: Scrapes) -> Scrapes:
    """Counted from 0 where the process is another."""
    if not pair.restarted:
        return pair
    nothing = replace(pair.after, counts={}, n_batches=0.0, n_rows=0.0)
    return Scrapes(pair.url, nothing, pair.after)
