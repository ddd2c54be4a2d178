"""The HTTP server beneath the agent.

It knows nothing of measuring.
"""

import signal
from collections.abc import Callable

from optimizer.http_server import Address, serve_app
from optimizer.measuring.agent import Agent

_MAX_CONNECTIONS = 128

__all__ = ["Address", "serve"]


async def serve(agent: Agent, address: Address, announce: Callable[[str], None]) -> signal.Signals:
    """Serve until SIGTERM or SIGINT, and say which it was; the call under way fails then.

    `announce` is given the URL. Raises OSError where the address or the certificate can't be used.
    """
    return await serve_app(agent.app, address, announce, agent.stop, _MAX_CONNECTIONS)
