"""The page of a run: what it says, that nothing in it is taken for markup, and that it stays small."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from testbed.checks import load_catalogue
from testbed.report.page.build import ORDER, page_of, view
from testbed.report.record import Outcome, RunRecord, Verdict
from testbed.report.write import ReportFolder, to_text
from tests.report.documents import Texts, changed, check, document, everything, failed, flow, lab, long, packet

GOLDEN = Path(__file__).parents[1] / "golden" / "page" / "page.txt"

HOSTILE = (
    "</script></style><script>alert(1)</script><img src=http://192.0.2.1/x onerror=alert(2)>\"'><svg onload=x>{{ 7*7 }}"
)

#: Strings of a run that are its own words, chosen from a list or made of safe characters.
OWN = ("verdict", "id", "role", "machine", "rack", "at")


def test_the_text_is_the_golden_one() -> None:
    """TESTBED_UPDATE_GOLDEN=1 writes the file anew; read the difference before it is committed."""
    text = Texts(page_of(everything())).text
    if os.environ.get("TESTBED_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_it_says_first_what_failed_and_where_packets_were_lost() -> None:
    text = Texts(page_of(everything())).text
    headline = text.index("2 failed of 5")
    lost = text.index("none came to worker3:flannel.1.")
    assert headline < lost < text.index("every group")
    assert text.index("WAY-02[") < text.index("WAY-01["), "what failed stands before what held"


def test_checks_that_fail_for_one_reason_are_open_once() -> None:
    shown = view(document(failed("WAY-02"), failed("WAY-03"), check()))
    assert [check["open"] for check in shown["checks"]] == [True, False, False]
    assert [len(place["checks"]) for place in shown["places"]] == [2]


def test_a_row_s_claim_and_source_are_the_catalogue_s() -> None:
    row = load_catalogue()["VXE-01"]
    text = Texts(page_of(document(check("VXE-01")))).text
    assert re.sub(r"\s+", " ", row.claim) in text
    assert f"source {row.source}" in text


# --- strangers' strings


def hostile() -> dict[str, Any]:
    """A run in which every string is hostile."""
    run = everything()
    run["labs"]["lab-1"]["machines"] = lab()["machines"]
    made: dict[str, Any] = changed(run, lambda text: text + HOSTILE, OWN)
    made["labs"] = {"lab-1" + HOSTILE: made["labs"]["lab-1"]}
    for machine in made["labs"]["lab-1" + HOSTILE]["machines"]:
        machine["name"] = machine["name"].removesuffix(HOSTILE)  # cables and ways find machines by their names
    return made


def test_no_string_of_a_run_is_markup() -> None:
    tame, page = Texts(page_of(everything())), Texts(page_of(hostile()))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in tame.tags}, "a tag that the page has not of its own"
    assert sum(tag == "script" for tag, _ in page.tags) == sum(tag == "style" for tag, _ in page.tags) == 1
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
    assert HOSTILE.replace("  ", " ") in page.text
    assert not page.open, "what is open at the end"


def test_links_lead_nowhere_but_to_the_page_and_the_report() -> None:
    run = hostile()
    run["checks"][1]["evidence"]["files"][0]["path"] = "../../../etc/passwd"
    run["checks"][1]["evidence"]["folder"] = "https://192.0.2.1/x"
    run["checks"][1]["artefacts"] = ["javascript:alert(1)", "//192.0.2.1/x"]
    for tag, attributes in Texts(page_of(run)).tags:
        assert not {"src", "action", "data", "srcset", "poster"} & set(attributes), (tag, attributes)
        if link := attributes.get("href"):
            assert tag == "a"
            assert re.fullmatch(r"#[\w-]+|checks\.json|junit\.xml|\./(?!.*\.\./)[^:]*", link), link


def test_the_policy_lets_its_own_style_and_script_in_and_nothing_else() -> None:
    page = page_of(hostile())
    policy = next(dict(a)["content"] for t, a in Texts(page).tags if t == "meta" and a.get("http-equiv")) or ""
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    for name in ("style", "script"):
        text = page.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{name}-src") == f"'sha256-{digest}'"
    assert not rules


# --- runs of every sort


def test_two_hundred_checks_are_less_than_three_megabytes() -> None:
    assert 200_000 < len(page_of(long(200, 20)).encode()) < 3_000_000
    assert len(page_of(long(200, 200)).encode()) < 6_000_000


@pytest.mark.parametrize(
    "run",
    [
        {"run": {}, "checks": []},
        {"schema": 1, "run": {"backend": "udp"}, "checks": [{"id": "X-1", "verdict": "held"}]},
        {"run": {}, "checks": [{"id": "X-1", "verdict": "another one of a later version", "seconds": 1}], "labs": {}},
        document(check(account={"flows": [], "packets": []})),
        document(failed(flows=[{"what": "HTTP", "source": "a", "target": "b", "answered": "timed out"}])),
        document(failed(flows=[flow(last=-1)]), run="more", traces=None),
    ],
    ids=lambda run: str(len(str(run))),
)
def test_runs_that_lack_something_have_a_page(run: dict[str, Any]) -> None:
    assert "<h1>" in page_of(run)


def test_every_verdict_has_a_place() -> None:
    assert set(ORDER) == {str(verdict) for verdict in Verdict}
    run = document(*(check(f"X-{number}", str(verdict)) for number, verdict in enumerate(Verdict)))
    texts = Texts(page_of(run))
    assert {a.get("data-verdict") for t, a in texts.tags if t == "details" and "data-verdict" in a} == set(ORDER)


def test_several_labs_of_one_run_are_all_shown() -> None:
    """As with -n 2, where each worker has a lab of its own, with subnets of its own."""
    run = document(check(), failed(lab="lab-2"))
    run["labs"]["lab-2"] = copy.deepcopy(lab()) | {"subnets": {"worker1": "10.244.77.0/24"}}
    text = Texts(page_of(run)).text
    assert "10.244.77.0/24" in text
    assert "· lab lab-2" in text
    assert "testbed exec --name lab-2 worker3 -- iptables" in text


def test_figures_are_drawn_against_what_is_asked() -> None:
    rows = [
        {"figure": "TCP", "value": 0.5, "unit": "of bare", "bound": 0.25},
        {"figure": "RTT", "value": 2, "unit": "×"},
    ]
    shown = view(document(check("P-1", figures=rows)))["figures"]
    assert [(group["unit"], group["rows"][0]["width"], group["rows"][0]["mark"]) for group in shown] == [
        ("of bare", 100.0, 50.0),
        ("×", 100.0, None),
    ]


def test_a_wrong_mtu_is_marked() -> None:
    wrong = [a for t, a in Texts(page_of(document(check()))).tags if a.get("class") == "wrong"]
    assert len(wrong) == 1, "the tunnel of worker3"


# --- with the report


def test_the_report_has_the_page_and_a_check_a_line(tmp_path: Path) -> None:
    outcome = Outcome("WAY-01", "WAY-01[x]", "vxlan", Verdict.HELD, account={"lab": "a"}, sketch=lab())
    record = RunRecord({"backend": "vxlan"}, [])
    record.add(outcome)
    record.add(Outcome("WAY-02", "WAY-02", "vxlan", Verdict.FAILED, reason="the reason"))
    place = ReportFolder(tmp_path / "run").write(record)
    assert "the reason" in Texts((place / "index.html").read_text()).text
    text = (place / "checks.json").read_text()
    assert [line for line in text.splitlines() if '"WAY-02"' in line] == [
        next(x for x in text.splitlines() if "WAY-02" in x)
    ]
    written = json.loads(text)
    assert [row["name"] for row in written["checks"]] == ["WAY-01[x]", "WAY-02"]
    assert list(written["labs"]) == ["a"]
    assert json.loads(to_text({})) == {}


def test_a_page_that_cannot_be_made_costs_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> str:
        raise KeyError("<b>odd</b>")

    monkeypatch.setattr("testbed.report.write.page_of", broken)
    record = RunRecord({}, [Outcome("WAY-01", "WAY-01", "vxlan", Verdict.HELD)])
    place = ReportFolder(tmp_path / "run").write(record)
    assert "could not be made" in (place / "index.html").read_text()
    assert "<b>" not in (place / "index.html").read_text()
    assert json.loads((place / "checks.json").read_text())["checks"]


def test_a_packet_where_it_was_last_seen_is_open() -> None:
    shown = view(document(failed(packets=[packet("worker1:eth0"), packet("worker3:eth0"), packet("worker3:eth0")])))
    assert [one["open"] for one in shown["checks"][0]["packets"]] == [False, True, False]


@pytest.mark.parametrize(
    ("request_hops", "answer_hops", "missing", "ways"),
    [
        (2, 2, "", ["there", "back"]),
        (2, 0, "request", ["there"]),
        (0, 0, "request", ["there"]),
        (2, 0, "answer", ["there", "back"]),
    ],
    ids=["delivered", "lost", "never sent", "not answered"],
)
def test_a_trace_has_no_heading_over_nothing(
    request_hops: int, answer_hops: int, missing: str, ways: list[str]
) -> None:
    hop = {"machine": "worker1", "place": "worker1", "interface": "eth0", "way": "out", "at": 0.0, "length": 98}
    gone = {"direction": missing, "place": "worker3", "interface": "flannel.1", "way": "in", "cause": {}}
    trace = {
        "packet": {"protocol": "icmp", "size": 56},
        "request": {"hops": [hop] * request_hops},
        "answer": {"hops": [hop] * answer_hops},
        "missing": gone if missing else None,
    }
    page = page_of(document(check(), traces=[trace]))
    assert re.findall(r'<tr class="direction"><th colspan="8">(\w+)</th>', page) == ways
    assert page.count("never came here") == (1 if missing else 0)
