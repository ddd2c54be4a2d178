"""The command `trimserve k8s`: an SLO in, what a cluster needs to know of it out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadtest.exits import exit_codes
from loadtest.kubernetes.size_cli import HELP as SIZE_HELP
from loadtest.kubernetes.size_cli import size

if TYPE_CHECKING:
    from loadtest.kubernetes.component import Autoscaling
    from loadtest.slo import Slo

HELP = """\
What a Kubernetes cluster needs to know of an SLO.

`trimserve k8s render slo.yaml --model resnet --capacity capacity.json --output k8s/components/slo`

`trimserve k8s size slo.yaml --capacity capacity.json --rate 100000`
"""

RENDER_HELP = """\
Write a kustomize component from the SLO's file: rules and alerts of the Prometheus operator,
Grafana's dashboard, the autoscalers' target, the canary's analysis, and the SLO and the model's
name for server and load test. So they can't disagree.

List it as the last of an overlay's `components`; where an autoscaler or the canary isn't among
them, its patch changes nothing. For the load test's Job list `DIR/config`.

The target is the requests in flight in a replica at `--utilization` of the capacity that
`trimserve loadtest --find-capacity` measured. Without `--capacity` it stays unset, and an
autoscaler refuses its resource.

**Examples**

`trimserve loadtest slo.yaml --target http://10.0.0.1:8000 --model resnet --find-capacity
--json capacity.json`

`trimserve k8s render slo.yaml --model resnet --capacity capacity.json --output k8s/components/slo`
"""

app = typer.Typer(
    name="k8s",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def group() -> None:
    """There are no options before the command; this makes the commands a group."""


@app.command("render", help=RENDER_HELP, no_args_is_help=True)
def render(
    slo: Annotated[Path, typer.Argument(metavar="SLO", help="The SLO, a YAML file.")],
    model: Annotated[str, typer.Option(help="Name of the model on the server.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where to: a new folder, or one that was rendered before.",
        ),
    ],
    capacity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What `trimserve loadtest --find-capacity --json` wrote."
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1, help="Behind the targets of --capacity; by default one behind each target."
        ),
    ] = None,
    utilization: Annotated[
        float, typer.Option(help="The share of its capacity that a replica may have.")
    ] = 0.8,
    period_days: Annotated[
        float, typer.Option(min=1, max=90, help="That the error budget is for.")
    ] = 30.0,
    namespace: Annotated[str, typer.Option(help="Of the server, as its overlay names it.")] = (
        "trimserve"
    ),
) -> None:
    """See HELP; the function only translates arguments and outcomes."""
    with exit_codes():
        from loadtest.kubernetes.component import Promise, component
        from loadtest.rules import rules_of
        from loadtest.rules_cli import say_what_is_left_out
        from loadtest.scaling import check_utilization
        from loadtest.session import SettingsInvalid
        from loadtest.slo import read_slo

        if replicas is not None and capacity is None:
            raise SettingsInvalid("--replicas: got it without --capacity, want both")
        _check_name("--namespace", namespace)
        given = read_slo(slo)
        text, period_s = slo.read_text("utf-8"), period_days * 86_400
        scaling = None
        try:
            check_utilization(utilization)
            if capacity is not None:
                scaling = _autoscaling(capacity, given, model, replicas, utilization)
            rules = rules_of(given, model, period_s)
            promise = Promise(given, text, model, namespace, period_s)
            files = component(promise, rules, scaling)
        except ValueError as error:
            raise SettingsInvalid(str(error)) from error
        say_what_is_left_out(rules)
        _write(output, files)
        if scaling is None:
            typer.echo("no --capacity: the autoscalers' target is unset", err=True)
        else:
            typer.echo(
                f"autoscalers' target: {scaling.threshold} requests in flight a replica, at "
                f"{utilization * scaling.target.capacity_per_s:.4g} requests/s",
                err=True,
            )


app.command("size", help=SIZE_HELP, no_args_is_help=True)(size)


def _autoscaling(
    capacity: Path, slo: "Slo", model: str, replicas: int | None, utilization: float
) -> "Autoscaling":
    from loadtest.kubernetes.component import Autoscaling
    from loadtest.kubernetes.replica import load_at, read_replica
    from loadtest.scaling import scaling_target

    replica = read_replica(capacity, slo, replicas)
    rate_per_s = utilization * replica.capacity_per_s
    load = load_at(replica, rate_per_s)
    if replica.confirmation != "met":
        said = replica.confirmation or "missing"
        typer.echo(f"{capacity}: the run that confirms the capacity is {said}", err=True)
    mean_s = load.in_flight / rate_per_s
    return Autoscaling(scaling_target(model, replica.capacity_per_s, mean_s, utilization), load)


def _check_name(option: str, name: str) -> None:
    import re

    from loadtest.session import SettingsInvalid

    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
        raise SettingsInvalid(
            f"{option}: got {name!r}, want a name of Kubernetes: up to 63 of a-z, 0-9 and -, "
            "neither first nor last a -"
        )


def _write(folder: Path, files: dict[str, str]) -> None:
    """Raises SettingsInvalid for a folder that can't be written, or isn't one for this."""
    from loadtest.outputs import write_files
    from loadtest.session import SettingsInvalid

    try:
        _check_folder(folder)
    except OSError as error:
        raise SettingsInvalid(
            f"--output: got {folder} ({error.strerror}), want a folder that can be read"
        ) from error
    write_files("--output", folder, files)


def _check_folder(folder: Path) -> None:
    """Raises SettingsInvalid for a folder that holds anything but what was rendered."""
    from loadtest.kubernetes.component import KUSTOMIZATION, RENDERED
    from loadtest.session import SettingsInvalid

    there = folder / KUSTOMIZATION
    if folder.exists() and not folder.is_dir():
        raise SettingsInvalid(f"--output: got {folder}, a file, want a folder")
    if there.exists() and RENDERED not in there.read_text("utf-8", "replace"):
        raise SettingsInvalid(
            f"--output: got {folder}, whose {KUSTOMIZATION} isn't one that was rendered, want "
            "another folder"
        )
    if not there.exists() and folder.exists() and (others := sorted(folder.iterdir())):
        raise SettingsInvalid(
            f"--output: got {folder}, which holds {others[0].name}, want a new or empty folder, or "
            "one that was rendered before"
        )
