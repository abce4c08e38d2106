"""Known failures: which outcomes they change, how they show, and that a wrong list is refused with its line."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree as Xml

import pytest
from click.testing import CliRunner

from testbed import verdicts
from testbed.checks import load_catalogue
from testbed.commands.checks import checks, listing, reason_on
from testbed.errors import Exit, InputError
from testbed.flannelspec import BACKENDS
from testbed.labs.base import Result
from testbed.nodes.undertest import implementations
from testbed.report.expectations import Expectation, Implementation, judged, load_expectations, within
from testbed.report.junit import to_junit
from testbed.report.record import Outcome, RunRecord, Verdict
from testbed.report.terminal import Screen
from testbed.runstate import Run

UPSTREAM, BUNDLED = Implementation("flanneld", "v0.28.9"), Implementation("bundled", "0.1.0")
ENTRY = Expectation(
    "WG-08", "upstream", "flannel.1 stays", ("wireguard",), versions="<=0.28.9", link="rancher/rke2#9338"
)


def outcome(verdict: Verdict = Verdict.FAILED, row: str = "WG-08", backend: str = "wireguard") -> Outcome:
    return Outcome(row, f"{row}[{backend}-XS]", backend, verdict, reason="a route by flannel.1")


@pytest.mark.parametrize(
    ("version", "bounds", "kept"),
    [
        ("v0.28.9", "", True),
        ("", "", True),
        ("", ">=0.1", False),
        ("v0.28.9", "<=0.28.9", True),
        ("v0.28.10", "<=0.28.9", False),
        ("v0.28.9-5-gabc", ">=0.20 <0.29", True),
        ("0.19.2", ">=0.20 <0.29", False),
        ("v0.29.0", ">=0.20, <0.29", False),
        ("v0.28.9", "==0.28.9", True),
        ("v1", ">0.99.9", True),
    ],
)
def test_bounds_of_versions(version: str, bounds: str, kept: bool) -> None:
    assert within(version, bounds) is kept


@pytest.mark.parametrize(
    ("given", "nodes", "verdict"),
    [
        (outcome(), [UPSTREAM], Verdict.EXPECTED_FAILURE),
        (outcome(), [UPSTREAM, BUNDLED], Verdict.EXPECTED_FAILURE),
        (outcome(), [BUNDLED], Verdict.FAILED),
        (outcome(), [Implementation("flanneld", "v0.29.0")], Verdict.FAILED),
        (outcome(), [Implementation("flanneld", "")], Verdict.FAILED),
        (outcome(row="WG-07"), [UPSTREAM], Verdict.FAILED),
        (outcome(backend="vxlan"), [UPSTREAM], Verdict.FAILED),
        (outcome(Verdict.HELD), [UPSTREAM], Verdict.UNEXPECTED_PASS),
        (outcome(Verdict.HELD), [UPSTREAM, BUNDLED], Verdict.HELD),
        (outcome(Verdict.HELD), [BUNDLED], Verdict.HELD),
        (outcome(Verdict.INCONCLUSIVE), [UPSTREAM], Verdict.INCONCLUSIVE),
        (outcome(Verdict.LAB_ERROR), [UPSTREAM], Verdict.LAB_ERROR),
        (outcome(Verdict.SKIPPED), [UPSTREAM], Verdict.SKIPPED),
    ],
)
def test_which_outcomes_change(given: Outcome, nodes: list[Implementation], verdict: Verdict) -> None:
    assert judged(given, [ENTRY], nodes).verdict is verdict


def test_only_a_strict_entry_minds_that_a_check_holds() -> None:
    loose = Expectation("WG-08", "upstream", "x", ("wireguard",), strict=False)
    assert judged(outcome(Verdict.HELD), [loose], [UPSTREAM]).verdict is Verdict.HELD
    assert judged(outcome(), [loose], [UPSTREAM]).verdict is Verdict.EXPECTED_FAILURE


def test_a_file_name_names_an_implementation() -> None:
    mine = Expectation("WG-08", "flanneld-mine", "x", ("wireguard",))
    assert judged(outcome(), [mine], [Implementation("flanneld-mine", "")]).verdict is Verdict.EXPECTED_FAILURE
    assert judged(outcome(), [mine], [UPSTREAM]).verdict is Verdict.FAILED


def test_the_committed_list() -> None:
    entries = load_expectations()
    assert {"WG-08", "IPS-04", "RES-03", "V6-06"} <= {entry.id for entry in entries}
    rows = load_catalogue()
    for entry in entries:
        assert entry.reason
        if set(entry.backends) != set(BACKENDS):  # which stands for a list that names none
            assert set(entry.backends) <= set(rows[entry.id].backends), entry.id
        assert entry.implementation != "bundled", "the bundled flanneld passes every row"


@pytest.mark.parametrize(
    ("text", "line", "what", "hint"),
    [
        ("- {id: WG-80, implementation: upstream, reason: x}", 2, "WG-80 is not in the catalogue", "did you mean WG-0"),
        ("- {id: WG-08, implementation: upstream, reason: x, sctrict: true}", 2, "not known", "did you mean strict?"),
        ("- {id: WG-08, implementation: upstream}", 2, "missing", ""),
        (
            "- id: WG-08\n  implementation: upstream\n  reason: x\n  backends: [wiregard]",
            5,
            "'wiregard' is no run",
            "wireguard",
        ),
        (
            "- id: WG-08\n  implementation: upstream\n  reason: x\n  rules: [iptables]",
            5,
            "'iptables' is no kind of rules",
            "iptables-legacy",
        ),
        ("- {id: WG-08, implementation: upstream, reason: x, rules: nftables}", 2, "'nftables' is no kind", "a list"),
        ("- {id: WG-08, implementation: upstream, reason: x, store: [kube]}", 2, "'kube' is no store", "kubernetes"),
        ("- {id: WG-08, implementation: upstream, reason: x, store: []}", 2, "names no store at all", "kubernetes"),
        ("- {id: WG-08, implementation: upstream, reason: x, introduced: 7}", 2, "has to be text", ""),
        ("- {id: WG-08, implementation: upstream, reason: x, versions: new}", 2, "are no bounds", ">=0.20"),
        ("- {id: WG-08, implementation: upstream, reason: x, strict: perhaps}", 2, "true or false", ""),
        ("- 5", 2, "an entry with an id", ""),
        ("  {}", 1, "a list", ""),
    ],
)
def test_a_wrong_list_is_refused_with_its_line(tmp_path: Path, text: str, line: int, what: str, hint: str) -> None:
    path = tmp_path / "expected.yaml"
    path.write_text(f"expected:\n{text}\n")
    with pytest.raises(InputError) as error:
        load_expectations(path)
    faults = error.value.faults
    assert error.value.exit_code is Exit.INPUT
    assert any((f.line, what in f.what, hint in f.hint) == (line, True, True) for f in faults), faults


class FakeNode:
    """A node whose flanneld says its version."""

    def __init__(self, name: str, says: str) -> None:
        self.name, self.says, self.asked = name, says, 0

    def run(self, argv: list[str], **_: Any) -> Result:
        self.asked += 1
        assert argv == ["/opt/flannel/flanneld", "--version"]
        return Result(self.name, tuple(argv), 0, "", f"{self.says}\n", 0.0)


def fake_run(
    *nodes: FakeNode, given: Path | None, entry: Expectation = ENTRY, rules: str = "nftables", store: str = "etcd"
) -> Run:
    by_name = {node.name: node for node in nodes}
    options = SimpleNamespace(implementation=lambda name: given, store=store)
    lab = SimpleNamespace(node=by_name.__getitem__)
    cluster = SimpleNamespace(members=tuple(nodes), lab=lab, options=options)
    flannel = SimpleNamespace(rules=rules)
    run = SimpleNamespace(cluster=cluster, options=options, flannel=flannel, expectations=(entry,), implementations={})
    return cast("Run", run)


def test_a_run_asks_the_flanneld_on_its_node_and_only_where_it_matters() -> None:
    nodes = FakeNode("worker1", "v0.28.9"), FakeNode("worker2", "v0.28.9")
    run = fake_run(*nodes, given=Path("/somewhere/flanneld"))
    assert verdicts.as_expected(outcome(row="WG-01"), run).verdict is Verdict.FAILED
    assert [node.asked for node in nodes] == [0, 0]
    assert verdicts.as_expected(outcome(), run).verdict is Verdict.EXPECTED_FAILURE
    assert verdicts.as_expected(outcome(Verdict.HELD), run).verdict is Verdict.UNEXPECTED_PASS
    assert [node.asked for node in nodes] == [1, 0], "one program is asked once"
    assert set(implementations(cast("Any", run.cluster), run.implementations).values()) == {UPSTREAM}


@pytest.mark.parametrize(
    ("about", "rules", "store", "verdict"),
    [
        ({}, "nftables", "etcd", Verdict.EXPECTED_FAILURE),
        ({"rules": ("nftables",)}, "nftables", "kubernetes", Verdict.EXPECTED_FAILURE),
        ({"rules": ("nftables",)}, "iptables-nft", "etcd", Verdict.FAILED),
        ({"rules": ("iptables-nft", "iptables-legacy")}, "iptables-legacy", "etcd", Verdict.EXPECTED_FAILURE),
        ({"store": ("etcd",)}, "nftables", "etcd", Verdict.EXPECTED_FAILURE),
        ({"store": ("etcd",)}, "nftables", "kubernetes", Verdict.FAILED),
        ({"rules": ("nftables",), "store": ("etcd",)}, "nftables", "kubernetes", Verdict.FAILED),
    ],
)
def test_an_entry_may_be_about_some_rules_and_stores_alone(
    about: dict[str, tuple[str, ...]], rules: str, store: str, verdict: Verdict
) -> None:
    entry = replace(ENTRY, **cast("dict[str, Any]", about))
    run = fake_run(FakeNode("worker1", "v0.28.9"), given=Path("flanneld"), entry=entry, rules=rules, store=store)
    assert verdicts.as_expected(outcome(), run).verdict is verdict
    passed = Verdict.UNEXPECTED_PASS if verdict is Verdict.EXPECTED_FAILURE else Verdict.HELD
    assert verdicts.as_expected(outcome(Verdict.HELD), run).verdict is passed


@pytest.mark.parametrize(
    ("link", "introduced", "told"),
    [
        ("", "", "flannel.1 stays"),
        ("a/b#1", "", "flannel.1 stays (a/b#1)"),
        ("", "a/b#2", "flannel.1 stays (introduced by a/b#2)"),
        ("a/b#1", "a/b#2", "flannel.1 stays (a/b#1; introduced by a/b#2)"),
    ],
)
@pytest.mark.parametrize("verdict", [Verdict.FAILED, Verdict.HELD])
def test_a_report_is_told_from_the_change_that_brought_it(
    link: str, introduced: str, told: str, verdict: Verdict
) -> None:
    entry = replace(ENTRY, link=link, introduced=introduced)
    assert f": {told}\n" in judged(outcome(verdict), [entry], [UPSTREAM]).reason


def test_keys_of_the_file_become_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "expected.yaml"
    path.write_text(
        "expected:\n- {id: NAT-01, implementation: upstream, reason: x, rules: [nftables], store: [etcd, kubernetes], "
        "introduced: 'a/b#2'}\n"
    )
    (entry,) = load_expectations(path)
    assert (entry.rules, entry.store, entry.introduced) == (("nftables",), ("etcd", "kubernetes"), "a/b#2")
    assert entry.backends == tuple(BACKENDS)


def test_the_bundled_one_is_never_expected_to_fail() -> None:
    run = fake_run(FakeNode("worker1", "0.1.0"), given=None)
    assert verdicts.as_expected(outcome(), run).verdict is Verdict.FAILED
    assert verdicts.as_expected(outcome(Verdict.HELD), run).verdict is Verdict.HELD


def test_exit_codes_terminal_and_junit_show_them_apart() -> None:
    known = judged(outcome(), [ENTRY], [UPSTREAM])
    record = RunRecord({"backend": "wireguard"}, [known, outcome(Verdict.HELD, "WG-01")])
    assert record.finish(strict=True) == Exit.HELD
    stream = io.StringIO()
    Screen(stream).summary(record, None, ["WG"], "")
    assert "expected failure WG-08[wireguard-XS]: expected of upstream: flannel.1 stays" in stream.getvalue()
    case = Xml.fromstring(to_junit(record)).find(".//testcase[@name='WG-08[wireguard-XS]']/skipped")
    assert case is not None
    assert case.get("type") == "expected_failure"
    assert "rancher/rke2#9338" in str(case.get("message"))
    record.outcomes.append(judged(outcome(Verdict.HELD), [ENTRY], [UPSTREAM]))
    assert record.finish(strict=False) == Exit.FAILED


def test_checks_says_what_is_proven_and_why_a_row_cannot_run() -> None:
    rows = {row["id"]: row for row in listing()}
    assert rows["VXE-01"]["implemented"] is True
    assert {row["proven"] for row in rows.values()} <= {True, False}
    on_clab = json.loads(CliRunner().invoke(checks, ["--json", "--lab", "clab"]).output)["checks"]
    cluster_only = next(row for row in on_clab if row["id"] == "DEP-01")
    assert "Kubernetes" in cluster_only["reason"]
    netem = next(row for row in load_catalogue().values() if row.needs == "netem")
    assert "netem" in reason_on(netem, True, "netns")
    assert reason_on(netem, True, None) == ""
    here = load_catalogue()["VXE-01"]
    assert reason_on(here, True, "netns") == ""
    assert reason_on(here, True, "nowhere").startswith("not on a lab of kind nowhere, but on netns")
