"""The command `trimserve loadtest compare`: two JSON reports in, what changed out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadtest.exits import exit_codes

if TYPE_CHECKING:
    from loadtest.comparison import Comparison
    from loadtest.report import Report

EXIT_CODES = {"better": 0, "no difference shown": 0, "worse": 1}

HELP = """\
Compare two runs of the same SLO and load, by their JSON reports.

The share of good requests decides: better or worse where the 95 % interval of the difference,
which allows for requests that hang together, leaves 0 out. Exit code 1 for worse, 0 otherwise, 2
for reports that can't be compared.

`trimserve loadtest compare before.json after.json`
"""


def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE.json", help="The earlier report.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER.json", help="The later report.")],
) -> None:
    """See HELP; the function only translates arguments and outcomes."""
    with exit_codes():
        from loadtest.comparison import compare

        compared = compare(read_report(before), read_report(after))
        typer.echo(table(compared))
        raise typer.Exit(EXIT_CODES[compared.change])


def read_report(path: Path) -> "Report":
    """Raises SettingsInvalid."""
    from pydantic import ValidationError

    from loadtest.report import from_json
    from loadtest.session import SettingsInvalid

    wanted = "want a file that `trimserve loadtest --json` wrote"
    try:
        return from_json(path.read_text("utf-8"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SettingsInvalid(
            f"{path}: no load test's report ({first['msg']}), {wanted}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{path}: can't be read ({error}), {wanted}") from error


def table(compared: "Comparison") -> str:
    rows = [
        f"{compared.change}: {compared.share_difference * 100:+.4g} points of good requests, "
        f"{compared.share_low * 100:+.4g} to {compared.share_high * 100:+.4g}",
        "goodput  {:.4g}/s -> {:.4g}/s".format(*compared.goodput_per_s),
    ]
    for quantile, one_s, other_s in compared.latencies_s:
        rows.append(f"p{quantile * 100:<7g} {_shown(one_s)} -> {_shown(other_s)}")
    return "\n".join(rows)


def _shown(latency_s: float | None) -> str:
    return "no answer" if latency_s is None else f"{latency_s * 1e3:.4g} ms"
