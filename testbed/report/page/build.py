"""The page of a run from the data of its `checks.json`: what is derived is derived here, the template only shows.

The page is one file that asks for nothing else: its style and its script stand in it, and its policy lets a browser
take these two, by their hashes, and nothing more.  Everything in it is escaped: names, packets and what programs print
come from strangers.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from testbed.checks import Row, load_catalogue
from testbed.report.page import lost
from testbed.report.page.charts import bars, figures_of
from testbed.report.page.drawing import Drawing, both_sizes
from testbed.report.page.traces import trace_view

HERE = Path(__file__).parent

ORDER = ("failed", "unexpected_pass", "lab_error", "inconclusive", "expected_failure", "held", "skipped")
"""Verdicts, the most urgent first."""

BAD = ("failed", "unexpected_pass", "lab_error", "inconclusive")
"""Verdicts that fail a run."""

WORDS = {
    "failed": "failed",
    "unexpected_pass": "unexpected pass",
    "lab_error": "lab error",
    "inconclusive": "inconclusive",
    "expected_failure": "expected failure",
    "held": "held",
    "skipped": "skipped",
}

PROGRAM = 160
"""Characters from which a word of a command is a program that stands at the end of the page."""

SLOWEST = 12

EMPTY_PCAP = 24
"""Bytes of a capture without packets."""


class Programs:
    """The long words of commands, each once on the page."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number that a program is called by."""
        return self.numbers.setdefault(text, len(self.numbers) + 1)


def page_of(document: Mapping[str, Any]) -> str:
    """The page of a run; `document` is what `checks.json` holds."""
    return _environment().get_template("page.html.j2").render(**view(document))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


@cache
def _asset(name: str) -> tuple[Markup, str]:
    """A text of ours that stands in the page as it is, and what the policy calls it."""
    text = (HERE / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"  # noqa: S704 (a file of this package)


def view(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows."""
    run, labs = document.get("run", {}), document.get("labs", {})
    any_lab: Mapping[str, Any] = next(iter(labs.values()), {})
    programs = Programs()
    checks = [
        check_view(check, labs, programs, number) for number, check in enumerate(document.get("checks", ()), start=1)
    ]
    places = lost_places(checks)
    open_some(checks, places)
    for check in [check for check in checks if check["loud"]][MOST_TOLD:]:
        check["drawing"] = ""
        leave_out(check, FEW_PACKETS)
    for check in [check for check in checks if not check["loud"]]:
        leave_out(check, SOME_PACKETS)
    counts = {verdict: sum(check["verdict"] == verdict for check in checks) for verdict in ORDER}
    leaks = sum(bool(check["leaked"]) for check in checks)
    style, style_hash = _asset("page.css")
    script, script_hash = _asset("page.js")
    return {
        "run": run,
        "title": f"{run.get('backend', 'run')}: {_headline(counts, leaks)}",
        "headline": _headline(counts, leaks),
        "leaks": leaks,
        "slow": sum(check["slow"] for check in checks),
        "tone": "bad" if any(counts[verdict] for verdict in BAD) or run.get("exit") else "good",
        "counts": [(verdict, WORDS[verdict], number) for verdict, number in counts.items() if number],
        "checks": sorted(checks, key=lambda check: ORDER.index(check["verdict"])),
        "groups": group_rows(checks),
        "nodes": sorted({node for check in checks for node in check["nodes"]}),
        "places": places,
        "labs": [lab_view(name, lab) for name, lab in labs.items()],
        "slowest": bars([(c["name"], c["seconds"], c["anchor"]) for c in checks if c["verdict"] != "skipped"], SLOWEST),
        "figures": figures_of(checks, document),
        "traces": [trace_view(trace, labs.get(trace.get("lab")) or any_lab) for trace in run.get("traces") or ()],
        "facts": run_facts(run, checks),
        "programs": [(number, text) for text, number in programs.numbers.items()],
        "style": style,
        "script": script,
        "policy": f"default-src 'none'; style-src {style_hash}; script-src {script_hash}; base-uri 'none'; "
        "form-action 'none'",
    }


def _headline(counts: Mapping[str, int], leaks: int) -> str:
    """How the run ended, in a few words."""
    ran = sum(number for verdict, number in counts.items() if verdict != "skipped")
    if not ran:
        return "nothing ran"
    bad = [f"{counts[verdict]} {WORDS[verdict]}" for verdict in BAD if counts[verdict]]
    said = f"{', '.join(bad)} of {ran}" if bad else f"all {ran} held" if counts["held"] == ran else f"{ran} as expected"
    return f"{said}, {leaks} left changes behind" if leaks else said


def run_facts(run: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The run's options and facts as rows of text."""
    began = min((check["began"] for check in checks if check["began"]), default=0.0)
    rows = [("began", datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))] if began else []
    for key, value in run.items():
        if key in ("traces", "watch", "implementations") or value in (None, "", [], {}):
            continue
        rows.append((key, shlex.join(map(str, value)) if isinstance(value, list) else str(value)))
    rows += [(f"flanneld on {node}", str(path)) for node, path in dict(run.get("implementations") or {}).items()]
    return rows


def group_rows(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups with how their checks ended and how long they took."""
    groups: dict[str, dict[str, Any]] = {}
    for check in checks:
        row = groups.setdefault(check["group"], {"name": check["group"], "seconds": 0.0, "counts": {}})
        row["seconds"] += check["seconds"]
        row["counts"][check["verdict"]] = row["counts"].get(check["verdict"], 0) + 1
    for row in groups.values():
        row["counts"] = [(v, WORDS[v], row["counts"][v]) for v in ORDER if v in row["counts"]]
    return list(groups.values())


# --- one check


def check_view(check: Mapping[str, Any], labs: Mapping[str, Any], programs: Programs, number: int) -> dict[str, Any]:
    """One check as the template shows it."""
    account = check.get("account") or {}
    lab_name = str(account.get("lab", ""))
    lab: Mapping[str, Any] = labs.get(lab_name) or next(iter(labs.values()), {})
    row: Row | None = load_catalogue().get(str(check["id"]))
    verdict = str(check["verdict"])
    flows = [flow_view(flow, lab) for flow in account.get("flows", ())]
    losing = [flow for flow in flows if flow["lost"]]
    first = next((flow for flow in losing if flow["lost"].after), next(iter(losing), None))
    loud = verdict in (*BAD, "expected_failure")
    evidence = check.get("evidence") or {}
    return {
        "number": number,
        "anchor": f"check-{number}",
        "id": str(check["id"]),
        "name": str(check.get("name") or check["id"]),
        "group": str(check["id"]).rpartition("-")[0],
        "verdict": verdict if verdict in ORDER else "lab_error",
        "word": WORDS.get(verdict, verdict),
        "loud": loud,
        "open": False,
        "claim": row.claim if row else "",
        "source": row.source if row else "",
        "mutation": row.mutation if row and loud and row.mutation not in ("–", "-") else "",
        "path": " → ".join(map(str, check.get("path", ()))),
        "nodes": [str(node) for node in check.get("nodes", ())],
        "seconds": float(check.get("seconds", 0.0)),
        "slow": bool(check.get("slow")),
        "late": [str(line) for line in account.get("late", ())],
        "began": float(account.get("began", 0.0)),
        "reason": str(check.get("reason", "")).strip(),
        "lab": lab_name,
        "several_labs": len(labs) > 1,
        "flows": flows,
        "lost": first,
        "drawing": drawing_of(check, lab, first) if first and loud else "",
        "asserted": list(account.get("asserted", ())),
        "packets": packets_of(account, first["lost"] if first and loud else None),
        "packets_left_out": int(account.get("packets_left_out", 0)),
        "commands": [command_view(command, lab_name, programs) for command in account.get("commands", ())],
        "left_out": dict(account.get("left_out", {})),
        "leaked": [change_view(line) for line in check.get("leaked") or ()],
        "changes": [change_view(line) for line in evidence.get("changes") or ()],
        "missing": [str(line) for line in evidence.get("missing") or ()],
        "folder": link(evidence["folder"]) if evidence.get("folder") else None,
        "files": by_node(files_of(check, evidence)),
        "trace": trace_view(evidence["trace"], lab) if evidence.get("trace") else None,
    }


def packets_of(account: Mapping[str, Any], found: lost.Lost | None) -> list[dict[str, Any]]:
    """The packets of a check; of a flow that was lost the first one where it was last seen is open."""
    packets = [dict(packet, open=False) for packet in account.get("packets", ())]
    if found is not None and found.after is not None:
        for packet in packets:
            if packet["at"] == found.after.at:
                packet["open"] = True
                break
    return packets


def flow_view(flow: Mapping[str, Any], lab: Mapping[str, Any]) -> dict[str, Any]:
    """A flow with its way and, where it was lost, where."""
    way = lost.stations(flow, lab)
    found = lost.lost(flow, way)
    text, commands = lost.suspects(found, lab, flow) if found else ("", [])
    on_way = {station.at for station in way}
    return {
        "what": str(flow.get("what", "")),
        "source": str(flow.get("source", "")),
        "target": str(flow.get("target", "")),
        "answered": str(flow.get("answered", "")),
        "unanswered": lost.unanswered(flow),
        "way": way,
        "lost": found,
        "sentence": found.sentence if found else "",
        "suspects": text,
        "look": commands,
        "elsewhere": [row for row in flow.get("seen", ()) if row["at"] not in on_way],
    }


def drawing_of(check: Mapping[str, Any], lab: Mapping[str, Any], flow: Mapping[str, Any]) -> Markup:
    """The lab with the way of a flow that was lost."""
    return both_sizes(lab, flow["way"], flow["lost"], f"{check['id']}: {flow['sentence']}")


def command_view(command: Mapping[str, Any], lab: str, programs: Programs) -> dict[str, Any]:
    """A command as it can be run by hand while the lab is up; its words, some of them programs by their numbers."""
    words: list[tuple[str, int]] = []
    name = ["--name", lab] if lab else []
    for word in ["testbed", "exec", *name, str(command["where"]), "--", *map(str, command.get("argv", ()))]:
        long = len(word) > PROGRAM or "\n" in word
        words.append((word if long else shlex.quote(word), programs.number(word) if long else 0))
    return {
        "words": words,
        "rc": int(command.get("rc", 0)),
        "seconds": float(command.get("seconds", 0.0)),
        "output": str(command.get("output", "")).strip(),
        "fed": bool(command.get("fed")),
    }


def change_view(line: object) -> dict[str, str]:
    """A line about a node's state: `worker1: + route …` is one that came, `-` one that went."""
    where, _, rest = str(line).partition(": ")
    sign = rest[:1] if rest[:2] in ("+ ", "- ") else ""
    return {"where": where, "sign": sign, "text": rest[2:] if sign else rest}


def files_of(check: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the check left behind, with links relative to the page."""
    rows = [
        {
            "path": str(file["path"]),
            "href": link(file["path"]),
            "node": str(file.get("node", "")),
            "what": str(file.get("what", "")),
            "bytes": int(file.get("bytes", 0)),
            "cut": int(file.get("cut", 0)),
        }
        for file in evidence.get("files", ())
    ]
    known = {row["path"] for row in rows}
    for path in check.get("artefacts", ()):
        if path not in known:
            name = str(path).rpartition("/")[2]
            rows.append({"path": path, "href": link(path), "node": "", "what": name, "bytes": 0, "cut": 0})
    return rows


def by_node(files: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Files by the node that they are of, captures with nothing in them left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        if file["what"] == "pcap":
            if file["bytes"] <= EMPTY_PCAP:
                continue
            file["what"] = str(file["path"]).rpartition("/")[2]
        found.setdefault(file["node"] or "check", []).append(file)
    return list(found.items())


def link(path: object) -> str:
    """A relative link to a file of the report; never one that leads elsewhere."""
    return "./" + "/".join(quote(part) for part in str(path).split("/") if part not in ("", ".."))


# --- over all checks

MOST_TOLD, FEW_PACKETS, SOME_PACKETS = 20, 3, 5
"""Checks that failed and are told in full, the packets of further ones, and those of checks that held."""

MOST_OPEN = 5
"""Failed checks that are open from the beginning: one for each place where packets are lost, and some without one."""


def leave_out(check: dict[str, Any], most: int) -> None:
    """Keep so many of a check's packets on the page, of every sort and place one before there are two of any."""
    packets, known = check["packets"], set()
    ranked = []
    for number, packet in enumerate(packets):
        sort = (packet["at"], packet["summary"])
        ranked.append((sort in known, number))
        known.add(sort)
    kept = {number for _, number in sorted(ranked)[:most]}
    check["packets"] = [packet for number, packet in enumerate(packets) if number in kept]
    check["packets_left_out"] += len(packets) - len(kept)


def open_some(checks: Sequence[dict[str, Any]], places: Sequence[Mapping[str, Any]]) -> None:
    """Open what has to be read; ten checks that fail for one reason are read once."""
    known = {id(check) for place in places for check in place["checks"]}
    others = [check for check in checks if check["verdict"] in BAD and id(check) not in known]
    for check in [*(place["checks"][0] for place in places), *others][:MOST_OPEN]:
        check["open"] = True


def lost_places(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where the packets of failed checks were lost, the place with most of them first, and drawn."""
    places: dict[str, dict[str, Any]] = {}
    for check in checks:
        if check["lost"] and check["verdict"] in BAD:
            found: lost.Lost = check["lost"]["lost"]
            key = f"{found.segment} {found.direction}"
            place = places.setdefault(key, {"segment": found.segment, "direction": found.direction, "checks": []})
            place["checks"].append(check)
    ordered = sorted(places.values(), key=lambda place: -len(place["checks"]))
    for place in ordered:
        first = place["checks"][0]
        place |= {key: first["lost"][key] for key in ("suspects", "look", "sentence")}
        place |= {"lab": first["lab"], "drawing": first["drawing"]}
        causes = (check["trace"]["cause"] for check in place["checks"] if check["trace"])
        place["cause"] = next(filter(None, causes), None)
    return ordered


def lab_view(name: str, lab: Mapping[str, Any]) -> dict[str, Any]:
    """A lab with its drawing and its tables."""
    return {
        "name": name,
        "drawing": Drawing(lab).markup(f"{name}: {lab.get('topology', '')}"),
        "pods": list(lab.get("pods", ())),
        "subnets": dict(lab.get("subnets", {})),
        "mtus": [mtu_row(row) for row in lab.get("mtus", ())],
        "versions": dict(lab.get("versions", {})),
    }


def mtu_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A node's MTUs, each with whether it is the one that flannel has to set."""
    wanted = row.get("wanted")
    tunnel = row.get("tunnel_wanted", wanted)

    def cell(value: object, wanted: object = wanted) -> dict[str, Any]:
        return {"value": "–" if value is None else value, "wrong": None not in (value, wanted) and value != wanted}

    pods = [(str(name), cell(value)) for name, value in dict(row.get("pods", {})).items()]
    return {
        "machine": row["machine"],
        "underlay": {"value": row.get("underlay") or "–", "wrong": False},
        "tunnel": cell(row.get("tunnel"), tunnel),
        "bridge": cell(row.get("bridge")),
        "pods": pods,
        "wanted": ("–" if wanted is None else wanted) if tunnel == wanted else f"{wanted}, tunnel {tunnel}",
    }
