"""What comes after a check: what it left behind on the nodes, and, where it failed, everything that may say why."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from testbed import checks, collecting, journal, pause
from testbed.errors import Fault, InputError, TestbedError
from testbed.model import LabSpec
from testbed.probes.capture import Captures, Window
from testbed.report import evidence
from testbed.report.evidence import MOST_IN_FULL, Evidence
from testbed.report.parts import CHECKS
from testbed.report.record import Outcome, Verdict
from testbed.report.write import safe_name, save_artefacts
from testbed.runstate import Run
from testbed.statewatch import (
    State,
    StateWatch,
    as_it_is,
    differences,
    machine_of,
    machines_of,
    tunnel_devices,
    with_tunnels_named,
)

if TYPE_CHECKING:
    from _pytest.fixtures import FixtureDef, SubRequest

    from testbed.nodes.deploy import Cluster
    from testbed.trace.follow import Wish as Wanted

GRACE_SECONDS, DISRUPTIVE_SECONDS = 3.0, 20.0
"""How long it may take until everything is as it was before a check, and before one that is marked as disruptive."""

TRACED = (Verdict.FAILED, Verdict.INCONCLUSIVE)
"""How checks end whose path is traced."""


def check_ends(lab: LabSpec, traces: Sequence[tuple[str, str]]) -> None:
    """Check the ends of --path-trace before there is a lab. Raises InputError naming those that there will be."""
    pods = [f"{node.name}/testapp" for node in lab.cluster_nodes] + [f"{checks.client_node(lab)}/client"]
    known = [*(node.name for node in lab.nodes), *pods]
    strangers = sorted({end for ends in traces for end in ends} - set(known))
    hint = f"it has: {', '.join(known)}"
    found = [Fault("command line", 0, "--path-trace", f"{lab.topology} has no {end}", hint) for end in strangers]
    found += [Fault("command line", 0, "--path-trace", f"both ends are {a}") for a, b in traces if a == b]
    if found:
        raise InputError(faults=found)


class Aftermath:
    """Hooks of pytest's around each check of a run.

    `watching` can be turned off where the lab is wrong on purpose; what a failed check leaves is then its captures.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.watching = True
        self.watch: StateWatch | None = None
        self.state: State = {}
        self.silent: set[str] = set()  # machines that could not be asked at some time, which was said
        self.kept: list[str] = []  # the checks of which everything was gathered
        self.told: set[str] = set()  # those that have left something at all
        self.traces: list[dict[str, Any]] = []
        self.elsewhere = {"readings": 0, "seconds": 0.0}  # what workers have spent
        self._captures: Captures | None = None
        self._window: Window | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: FixtureDef[Any], request: SubRequest) -> Generator[None, object, object]:
        """Know the lab and its captures once they are there."""
        made = yield
        if isinstance(made, Captures):
            self._captures, self._window = made, made.window()
        elif fixturedef.argname == "cluster" and self.run.cluster is not None:
            self._lab_is_up(self.run.cluster, collecting.worker_id(request.config))
        return made

    def _lab_is_up(self, cluster: Cluster, worker: str) -> None:
        watch = StateWatch(cluster)
        with journal.paused():
            try:
                self.state = watch.read() if self.watching else {}
                self.watch = watch
            except Exception as error:  # noqa: BLE001 (a lab that cannot be watched can be checked)
                self._say(f"nobody looks at what checks leave behind: {type(error).__name__}: {error}")
            if worker in ("", "gw0"):
                for source, target in self.run.options.path_traces:
                    self._trace(cluster, source, target)

    def _trace(self, cluster: Cluster, source: str, target: str) -> None:
        """Follow a packet, as --path-trace asks; that it is lost is no check's verdict."""
        from testbed.trace import layout, show
        from testbed.trace.follow import trace

        try:
            found = trace(layout.of_cluster(cluster), source, target)
        except TestbedError as error:
            self._say(f"no path trace from {source} to {target}: {error}")
            return
        self.traces.append(found.to_json())
        if self.run.screen is not None:
            show.show(found, self.run.screen.console)

    def _say(self, text: str) -> None:
        if self.run.screen is not None:
            self.run.screen.close_bar()
            self.run.screen.say(text, "yellow")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Remember from when on the captures are a check's."""
        self._window = self._captures.window() if self._captures else None
        return (yield)

    # --- what a check leaves behind

    @pytest.fixture(autouse=True)
    def _leaves_nothing(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Look at the nodes once all that is the check's own has been undone: this was set up first."""
        yield
        if self.watch is None or not self.watching or request.node.get_closest_marker("check") is None:
            return
        lines: list[str] = []
        try:
            with journal.paused():
                lines = self._left_changed(self.watch, disruptive=collecting.is_disruptive(request.node))
        except Exception as error:  # noqa: BLE001 (a lab that has died is told by its checks)
            self.watch = None
            self._say(f"nobody looks any more at what checks leave behind: {type(error).__name__}: {error}")
        if lines:
            request.node.stash[LEAKED] = lines

    def _left_changed(self, watch: StateWatch, *, disruptive: bool) -> list[str]:
        """What is another way than before the check; from now on that is how it is."""
        before, after = self.state, watch.read()
        seen_as = self._but_for_macs if disruptive else as_it_is
        if after != before:
            after = watch.settled(before, DISRUPTIVE_SECONDS if disruptive else GRACE_SECONDS, seen_as)
        then, now = machines_of(before), machines_of(after)
        # A machine that cannot be asked now is asked again behind the next check, and for that it is as it was last.
        self.state = {**{place: lines for place, lines in before.items() if machine_of(place) not in now}, **after}
        for name in sorted(then - now - self.silent):
            self._say(f"{name} told nothing of its state in time: what changes there shows behind a later check")
        self.silent |= then - now
        before, after = seen_as(before), seen_as(self.state)  # whole: MACs of silent machines are known to others
        # One that could not be asked, then or now, has told nothing.
        old, new = ({p: s for p, s in state.items() if machine_of(p) in then & now} for state in (before, after))
        return differences(old, new) if old != new else []

    def _but_for_macs(self, state: State) -> State:
        """What a disruptive check has to leave as it was: a tunnel's device may be another one behind it."""
        assert self.run.cluster is not None  # it is what is looked at
        return with_tunnels_named(state, tunnel_devices(self.run.cluster.flannel))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Tell of a leak with the report of the clean-up."""
        report = yield
        if call.when == "teardown" and (lines := item.stash.get(LEAKED, None)):
            setattr(report, "testbed_leaked", [item.name, lines])  # noqa: B010 (travels with the report from a worker)
        return report

    # --- what a failed check leaves for its reader

    def keep(self, report: pytest.TestReport, outcome: Outcome) -> None:
        """Keep everything about a check that did not hold. Whatever goes wrong with that costs no verdict."""
        staging = self.run.staging
        if staging is None:
            return
        found = Evidence(f"{CHECKS}/{safe_name(outcome.item)}")
        # Its clean-up must not replace what was gathered when it failed: by then much has been undone.
        again = report.when == "teardown" and outcome.item in self.told
        self.told.add(outcome.item)
        name = "report-of-the-clean-up.txt" if again else "report.txt"
        text = report.longreprtext.encode(errors="backslashreplace")
        try:
            with journal.paused():
                for path in save_artefacts(staging, outcome.item, {name: text}):
                    kept = {"path": path, "node": "", "what": name.removesuffix(".txt"), "bytes": len(text), "cut": 0}
                    found.files.append(kept)
                if again:
                    return
                names = {name: f"{safe_name(name.replace(':', '+'))}.pcap" for name in self._tapped()}
                evidence.keep_captures(staging, outcome.item, found, self._window, names)
                self._keep_state(outcome, found)
        except Exception as error:  # noqa: BLE001 (a lab may be broken in any way, and that is why there is evidence)
            found.missing.append(f"not all could be kept: {type(error).__name__}: {error}")
        finally:
            outcome.artefacts = [str(file["path"]) for file in found.files]
            outcome.evidence = found.to_json()
        if self.run.options.pause_on_fail and outcome.verdict is not Verdict.EXPECTED_FAILURE and self.run.cluster:
            self._pause(outcome, str(staging / found.folder))

    def _tapped(self) -> Sequence[str]:
        return list(self._captures.taps) if self._captures else []

    def _keep_state(self, outcome: Outcome, found: Evidence) -> None:
        """The nodes' state, what of it has changed, and a trace along the check's path."""
        cluster, staging = self.run.cluster, self.run.staging
        if cluster is None or staging is None or not self.watching or outcome.verdict is Verdict.EXPECTED_FAILURE:
            return
        if outcome.item not in self.kept and len(self.kept) >= MOST_IN_FULL:
            found.missing.append(f"{MOST_IN_FULL} failures have been kept in full; of this one only its captures are")
            return
        self.kept.append(outcome.item)
        began = time.monotonic()
        if self.watch is not None:
            found.changes = differences(self.state, self.watch.read())
        found.seconds += time.monotonic() - began
        evidence.keep_answers(staging, outcome.item, found, cluster, outcome.path)
        began = time.monotonic()
        if outcome.verdict in TRACED and len(outcome.path) == 2:
            self._keep_trace(cluster, outcome, found)
        found.seconds += time.monotonic() - began

    @staticmethod
    def _keep_trace(cluster: Cluster, outcome: Outcome, found: Evidence) -> None:
        """Trace a packet like the first that the check has lost, and where it lost none one between its ends."""
        from testbed.trace import layout
        from testbed.trace.follow import trace

        flows = notes.flows if (notes := journal.latest()) else []
        flow = next((flow for flow in flows if flow.lost), None)
        source, target = outcome.path
        places = layout.of_cluster(cluster, six=flow is not None and ":" in flow.target)
        if flow is not None:
            ends = flow.source, places.endpoint_at(flow.target)
            if ends[1] is None:
                nobody = f"{flow.target} is no pod's or machine's address"
                found.missing.append(f"no path trace of what was lost, {flow.what}: {nobody}")
                return
            source, target = ends[0], ends[1]
        with suppress(InputError):  # an end that the check itself has removed
            traced = trace(places, source, target, wish_for(flow))
            if flow is None:
                traced.notes.append(
                    "no packet of the check is known to be lost: this is an ordinary one between its ends"
                )
            found.trace = traced.to_json()

    def _pause(self, outcome: Outcome, folder: str) -> None:
        screen = self.run.screen
        if screen is not None:
            screen.close_bar()
            pause.pause(self.run.options, outcome, folder, screen.say)

    # --- the end

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Put what is of no single check into the record, or send it to who has that."""
        if self.watch is not None:
            self.watch.close()
        own = {
            "readings": self.watch.readings if self.watch else 0,
            "seconds": self.watch.seconds if self.watch else 0.0,
        }
        if collecting.worker_id(session.config):
            getattr(session.config, "workeroutput")["testbed_aftermath"] = [self.traces, own]  # noqa: B009 (xdist's)
        elif self.run.record is not None:
            total = {key: own[key] + self.elsewhere[key] for key in own}
            self.run.record.facts["traces"] = self.traces
            self.run.record.facts["watch"] = total | {"seconds": round(total["seconds"], 3)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what a worker of xdist has sent."""
        traces, spent = getattr(node, "workeroutput", {}).get("testbed_aftermath", ([], {}))
        self.traces += traces
        for key, value in spent.items():
            self.elsewhere[key] += value


def wish_for(flow: journal.Flow | None) -> Wanted:
    """A packet like the one that was lost: a small one comes through where a large one does not, ICMP where no TCP."""
    from testbed.trace.follow import DEFAULT_SIZE, LEAST_SIZE, Wish

    if flow is None:
        return Wish(wait=0.5)
    size = max(flow.size, LEAST_SIZE) if flow.size else DEFAULT_SIZE
    return Wish(flow.protocol, size, dont_fragment=flow.dont_fragment, wait=0.5, port=flow.port)


LEAKED: pytest.StashKey[list[str]] = pytest.StashKey()
