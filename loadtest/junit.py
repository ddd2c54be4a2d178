"""A load test's verdict as JUnit XML, the form in which CI systems show tests.

One case for each objective and each action of a chaos profile: broken is a failure, and a run that
shows nothing is an error, which CI systems tell from it.
"""

from xml.etree import ElementTree

from loadtest.chaos.facts import ActionFacts, summary_of
from loadtest.report import ObjectiveResult, Report


def to_junit(report: Report) -> str:
    cases = [_objective(report, one) for one in report.objectives]
    if report.chaos is not None:
        cases.extend(_action(report, one) for one in report.chaos.actions)
    suite = ElementTree.Element(
        "testsuite",
        {
            "name": f"{report.slo.name} {report.run.model}",
            "tests": str(len(cases)),
            "failures": str(sum(case.find("failure") is not None for case in cases)),
            "errors": str(sum(case.find("error") is not None for case in cases)),
            "skipped": "0",
            "time": f"{report.run.duration_s:g}",
            "timestamp": report.created_at,
        },
    )
    suite.extend(cases)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, "unicode", xml_declaration=True) + "\n"


def _objective(report: Report, objective: ObjectiveResult) -> ElementTree.Element:
    summary = f"{objective.observed * 100:.6g} %, want {objective.wanted * 100:.6g} %"
    return _case(report, objective.name, summary, objective.kept)


def _action(report: Report, action: ActionFacts) -> ElementTree.Element:
    return _case(report, f"chaos {action.label}", _printable(summary_of(action)), action.kept)


def _case(report: Report, name: str, summary: str, kept: bool) -> ElementTree.Element:
    """A kept objective passes unless the whole run is inconclusive."""
    case = ElementTree.Element(
        "testcase",
        {"classname": f"loadtest.{report.slo.name}", "name": name,
         "time": f"{report.run.duration_s:g}"},
    )  # fmt: skip
    text = _printable("\n".join(one.message for one in report.reasons))
    if report.verdict == "inconclusive":
        ElementTree.SubElement(
            case, "error", {"type": "inconclusive", "message": summary}
        ).text = text
    elif not kept:
        ElementTree.SubElement(
            case, "failure", {"type": "violated", "message": summary}
        ).text = text
    ElementTree.SubElement(case, "system-out").text = summary
    return case


def _printable(text: str) -> str:
    """Without the control characters that XML 1.0 has no form for."""
    return "".join(one if one >= " " or one in "\n\t" else "\ufffd" for one in text)
