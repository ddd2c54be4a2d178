"""The command `trimserve loadtest worker`, and the options that share a load among workers."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from loadtest.exits import exit_codes

if TYPE_CHECKING:
    from loadtest.driver import Workers

HELP = """\
Play parts of the load tests that a master has to share: one test after the other, until
interrupted.

The master is `trimserve loadtest run ... --expect-workers N --bind HOST:PORT`. It gives each worker
its part of the plan, which says whom to send what, and gets its raw samples. Locust's messages
carry both without encryption or password.

`trimserve loadtest worker --master 10.0.0.1:5557`
"""
DEFAULT_BIND = "127.0.0.1:5557"
MAX_WORKERS = 1000
MAX_PORT = 65_535
RETRY_S = 1.0


def work(
    master: Annotated[str, typer.Option(metavar="HOST:PORT", help="The master's --bind.")],
    once: Annotated[
        bool, typer.Option("--once", help="End after one test, with the exit code of its part.")
    ] = False,
) -> None:
    """See HELP."""
    with exit_codes():
        from loadtest.driver import check_generator
        from loadtest.driver import work as play_part

        check_generator()
        address = check_address("--master", master)
        while True:
            code = play_part(address)
            if once:
                raise typer.Exit(code)
            time.sleep(RETRY_S)


def choose_workers(workers: int | None, expect_workers: int | None, bind: str) -> "Workers | None":
    """Raises SettingsInvalid."""
    from loadtest.driver import Workers
    from loadtest.session import SettingsInvalid

    if workers is not None and expect_workers is not None:
        raise SettingsInvalid(
            "--workers: got it with --expect-workers, want one of them: processes of this machine, "
            "or workers that are started elsewhere"
        )
    if bind != DEFAULT_BIND and expect_workers is None:
        raise SettingsInvalid("--bind: got it without --expect-workers, want both or neither")
    if expect_workers is not None:
        return Workers(expect_workers, check_address("--bind", bind))
    return None if workers is None else Workers(workers)


def check_address(option: str, text: str) -> str:
    """Raises SettingsInvalid for what isn't HOST:PORT."""
    from loadtest.session import SettingsInvalid

    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= MAX_PORT:
        raise SettingsInvalid(f"{option}: got {text!r}, want HOST:PORT, for example {DEFAULT_BIND}")
    return text
