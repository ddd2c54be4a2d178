"""The command that writes what watches an SLO in production: rules, alerts, OpenSLO, dashboard."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadtest.exits import exit_codes

if TYPE_CHECKING:
    from loadtest.rules import SloRules
    from loadtest.slo import Slo

HELP = """\
Write what watches an SLO in production, from the same file that the load test judges by.

`rules`: Prometheus recording rules, and alerts on two windows each, by how fast the error budget
burns (the SRE workbook's 14.4, 6, 3 and 1 times for 30 days; windows that an objective can't reach
are made longer or left out, which is said). `prometheus-rule`: the same for the Prometheus operator
of a Kubernetes cluster. `openslo`: OpenSLO v1. `dashboard`: a dashboard for
Grafana. `scaling`: the autoscaler's metric and its target for each replica, from the capacity that
was measured.

**Examples**

`trimserve loadtest rules slo.yaml --model resnet > rules.yaml`

`trimserve loadtest rules slo.yaml --model resnet --as dashboard --output dashboard.json`

`trimserve loadtest rules slo.yaml --model resnet --as scaling --capacity-per-s 400
--mean-latency-ms 9`
"""


class Form(StrEnum):
    RULES = "rules"
    PROMETHEUS_RULE = "prometheus-rule"
    OPENSLO = "openslo"
    DASHBOARD = "dashboard"
    SCALING = "scaling"


def write_rules(
    slo: Annotated[Path, typer.Argument(metavar="SLO", help="The SLO, a YAML file.")],
    model: Annotated[str, typer.Option(help="Name of the model on the server.")],
    form: Annotated[Form, typer.Option("--as", help="What to write.")] = Form.RULES,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; by default standard output.")
    ] = None,
    period_days: Annotated[
        float, typer.Option(min=1, max=90, help="That the error budget is for.")
    ] = 30.0,
    capacity_per_s: Annotated[
        float | None,
        typer.Option(help="For scaling: the highest rate at which one replica keeps the SLO."),
    ] = None,
    mean_latency_ms: Annotated[
        float | None, typer.Option(help="For scaling: the mean latency at that rate.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(help="For scaling: the share of the capacity that a replica may have.")
    ] = 0.8,
) -> None:
    """See HELP; the function only translates arguments and outcomes."""
    with exit_codes():
        from loadtest.outputs import check_file, write_file
        from loadtest.session import SettingsInvalid
        from loadtest.slo import read_slo

        if form is Form.SCALING and (capacity_per_s is None or mean_latency_ms is None):
            raise SettingsInvalid("--as scaling: want --capacity-per-s and --mean-latency-ms")
        check_file("--output", output)
        given = read_slo(slo)
        try:
            if form is Form.SCALING:
                from loadtest.scaling import scaling_target

                assert capacity_per_s is not None
                assert mean_latency_ms is not None
                target = scaling_target(model, capacity_per_s, mean_latency_ms / 1e3, utilization)
                text = json.dumps(target.document(), indent=2) + "\n"
            else:
                text = _text(form, given, model, period_days * 86_400)
        except ValueError as error:
            raise SettingsInvalid(str(error)) from error
        if output is None:
            typer.echo(text, nl=False)
        else:
            write_file("--output", output, text)


def _text(form: Form, slo: "Slo", model: str, period_s: float) -> str:
    import yaml

    from loadtest.dashboard import dashboard
    from loadtest.openslo import openslo_documents
    from loadtest.plain_yaml import plain_yaml
    from loadtest.rules import prometheus_rule, rules_of

    made = rules_of(slo, model, period_s)  # refuses a name that no query can hold
    if form is Form.DASHBOARD:
        return json.dumps(dashboard(slo, model, period_s), indent=2) + "\n"
    if form is Form.OPENSLO:
        return yaml.safe_dump_all(openslo_documents(slo, model, period_s), sort_keys=False)
    say_what_is_left_out(made)
    if form is Form.PROMETHEUS_RULE:
        return plain_yaml(prometheus_rule(slo, made))
    return plain_yaml(made.document())


def say_what_is_left_out(rules: "SloRules") -> None:
    """The windows that an objective can't reach, on stderr."""
    from loadtest.burn import shown

    for name, windows in rules.left_out.items():
        for window in windows:
            typer.echo(
                f"{name}: no {window.severity} over {shown(window.long_s)}: {window.reason}",
                err=True,
            )
