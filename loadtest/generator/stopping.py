"""How a generator's processes are asked to stop: by SIGINT or SIGTERM, in gevent's loop."""

import signal
from collections.abc import Callable

import gevent


def on_signals(stop: Callable[[], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stop)
