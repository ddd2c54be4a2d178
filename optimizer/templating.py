"""The Jinja environment of the report and of the service's page: one set of filters, everything
escaped."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from optimizer.quantities import bytes_, duration, milliseconds, number, percent, shape
from optimizer.wording import explain, guarantee, slo_latency_s


def environment() -> Environment:
    """Templates are those of `optimizer/templates`. A name that nobody gave is an error."""
    made = Environment(
        loader=PackageLoader("optimizer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (bytes_, duration, explain, guarantee, milliseconds, number, percent, shape):
        made.filters[filter_.__name__.rstrip("_")] = filter_
    made.filters["slo_latency"] = slo_latency_s
    return made
