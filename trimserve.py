"""The command line `trimserve`: mounts the three programs and owns their exit codes.

The programs' command modules import their engines, frameworks and load generators when called,
so the help of all of them is there whatever is installed.
"""

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

import loadtest.cli
import loadtest.kubernetes.cli
import optimizer.cli
import optimizer.measuring.cli
import optimizer.record_cli
import optimizer.service.cli
import optimizer.service.jobs_cli
import serve.cli
from loadtest.default_command import DefaultCommand
from loadtest.document import DocumentInvalid
from optimizer.errors import MeasurerUnavailable, SpecInvalid
from optimizer.execution import NoExecutor
from serve import VERSION
from serve.engines import EngineUnavailable
from serve.errors import ArtifactInvalid

EXIT_DONE, EXIT_USAGE, EXIT_INTERNAL, EXIT_INTERRUPTED = 0, 2, 70, 130
# What the user can mend: one message, no traceback.
USAGE_ERRORS = (
    ArtifactInvalid, DocumentInvalid, EngineUnavailable, MeasurerUnavailable, NoExecutor, OSError,
    SpecInvalid,
)  # fmt: skip


class _Commands(TyperGroup):
    """Says of an option's value that is refused what it was; Typer says what is allowed."""

    # Typer keeps the class of `ctx` private.
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from pydantic import ValidationError

            if isinstance(error.__cause__, ValidationError):
                given = error.__cause__.errors()[0]["input"]
                error.message = f"got {given!r}: {error.message}"
            raise


class _Service(DefaultCommand):
    """`trimserve service` starts the service; its other commands are named."""

    runs_alone = True


app = typer.Typer(
    name="trimserve",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress a trained model, serve it, and prove that it keeps its promise: p99 latency, "
    "throughput and accuracy, at the lowest cost.\n\n"
    "Exit codes: 0 met or done; 1 violated, or nothing feasible; 2 usage; 3 inconclusive; "
    "70 internal error; 130 interrupted.",
)
app.add_typer(optimizer.cli.app)
app.add_typer(optimizer.measuring.cli.app)
app.add_typer(optimizer.record_cli.app)
app.add_typer(optimizer.service.cli.app, cls=_Service)
app.add_typer(optimizer.service.jobs_cli.app)
app.add_typer(serve.cli.app)
app.add_typer(loadtest.cli.app, name="loadtest")
app.add_typer(loadtest.kubernetes.cli.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options of the command line itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="trimserve")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_DONE if not stop.code else 1
    except USAGE_ERRORS as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001 - the process boundary: the trace helps, the code is ours
        traceback.print_exc()
        return EXIT_INTERNAL
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
