"""Exit codes of the load test's commands, and what each failure says: one table for all of them."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

import typer

EXIT_USAGE, EXIT_INTERNAL, EXIT_INTERRUPTED = 2, 70, 130


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what the command raises into its exit code, and SIGTERM into an interruption."""
    from loadtest.comparison import NotComparable
    from loadtest.document import DocumentInvalid
    from loadtest.driver import GeneratorFailed, GeneratorMissing
    from loadtest.endpoint import TargetUnusable
    from loadtest.inputs import InputsInvalid
    from loadtest.labels import LabelsInvalid
    from loadtest.prometheus import PrometheusUnusable
    from loadtest.server_metrics import MetricsUnusable
    from loadtest.session import SettingsInvalid
    from loadtest.signature import SignatureUnusable
    from loadtest.target import TargetInvalid

    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except (
        DocumentInvalid,
        GeneratorMissing,
        InputsInvalid,
        LabelsInvalid,
        NotComparable,
        SettingsInvalid,
        SignatureUnusable,
        TargetInvalid,
        TargetUnusable,
    ) as error:
        _fail(str(error), EXIT_USAGE)
    except MetricsUnusable as error:
        _fail(
            f"--metrics-url: {error}; want the server's metrics, or --no-server-metrics",
            EXIT_USAGE,
        )
    except PrometheusUnusable as error:
        _fail(
            f"--prometheus: {error}; or leave it out, and the counters are read from /metrics",
            EXIT_USAGE,
        )
    except KeyboardInterrupt:
        _fail("interrupted, nothing was judged", EXIT_INTERRUPTED)
    except GeneratorFailed as error:
        _fail(str(error), EXIT_INTERNAL)
    except typer.Exit:
        raise
    except Exception:  # noqa: BLE001 - the process boundary: the trace helps, the code is ours
        traceback.print_exc()
        _fail("internal error, please report it with the lines above", EXIT_INTERNAL)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: object) -> Never:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> Never:
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(code)
