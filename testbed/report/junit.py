"""A run as JUnit XML, which every CI system reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree as Xml

from testbed.checks import load_catalogue
from testbed.report.record import Outcome, RunRecord, Verdict

_ELEMENT: Mapping[Verdict, str] = {
    Verdict.FAILED: "failure",
    Verdict.INCONCLUSIVE: "failure",
    Verdict.UNEXPECTED_PASS: "failure",
    Verdict.LAB_ERROR: "error",
    Verdict.SKIPPED: "skipped",
    Verdict.EXPECTED_FAILURE: "skipped",
}

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """The text without the characters that XML cannot hold: reasons quote what strangers' programs print."""
    return _FORBIDDEN.sub("�", text)


def to_junit(record: RunRecord) -> str:
    """The run as a JUnit document: a test case a check and path, with its row's claim and source as properties."""
    counts = {
        "tests": len(record.outcomes),
        "failures": sum(_ELEMENT.get(o.verdict) == "failure" for o in record.outcomes),
        "errors": sum(_ELEMENT.get(o.verdict) == "error" for o in record.outcomes) + bool(record.broken),
        "skipped": sum(_ELEMENT.get(o.verdict) == "skipped" for o in record.outcomes),
    }
    suite = Xml.Element("testsuite", name=clean(str(record.facts.get("backend", "testbed"))))
    for name, number in counts.items():
        suite.set(name, str(number))
    suite.set("time", f"{sum(o.seconds for o in record.outcomes):.3f}")
    _properties(suite, {key: str(value) for key, value in record.facts.items()})
    for outcome in record.outcomes:
        suite.append(_case(outcome))
    if record.broken:  # a run that was cut short must not look like a short one
        case = Xml.SubElement(suite, "testcase", classname="testbed", name="the run itself", time="0")
        Xml.SubElement(case, "error", message="the run was cut short").text = clean(record.broken)
    root = Xml.Element("testsuites")
    root.append(suite)
    Xml.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(root, encoding="unicode") + "\n"


def _properties(parent: Xml.Element, values: Mapping[str, str]) -> None:
    properties = Xml.SubElement(parent, "properties")
    for key, value in values.items():
        Xml.SubElement(properties, "property", name=key, value=clean(value))


def _case(outcome: Outcome) -> Xml.Element:
    case = Xml.Element("testcase", classname=outcome.group, name=clean(outcome.item), time=f"{outcome.seconds:.3f}")
    row = load_catalogue().get(outcome.id)
    facts = {"id": outcome.id, "backend": outcome.backend, "verdict": str(outcome.verdict)}
    if outcome.path:
        facts["path"] = " -> ".join(outcome.path)
    if row:
        facts |= {"claim": row.claim, "source": row.source}
    if outcome.artefacts:
        facts["artefacts"] = ", ".join(outcome.artefacts)
    if outcome.slow:
        facts["slow"] = "; ".join(map(str, outcome.account.get("late", ()))) or "yes"
    if outcome.leaked:
        facts["leaked"] = "; ".join(outcome.leaked)
    _properties(case, facts)
    element = _ELEMENT.get(outcome.verdict)
    if element:
        lines = outcome.reason.strip().splitlines() or [str(outcome.verdict)]
        detail = Xml.SubElement(case, element, message=clean(lines[0]), type=str(outcome.verdict))
        detail.text = clean(outcome.reason)
    return case
