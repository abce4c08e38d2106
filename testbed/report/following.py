"""Follows the checks of a run while they go on, and tells of each what it did: its account, for the report.

    "account": {"lab": "vxlan-1f", "began": 1764000000.0,
     "asserted": [{"text": "packet.udp.dport == cluster.flannel.port", "seen": "8472", "wanted": "8472",
                   "sign": "==", "held": true, "times": 6, "line": 61}, …],
     "commands": [{"where": "worker1/client", "argv": ["ping", …], "rc": 0, "seconds": 0.01, "output": "",
                   "fed": false}, …],
     "flows": [{"what": "3 × ping, 56 bytes", "source": "worker1/client", "target": "10.244.3.2",
                "answered": "0 of 3", "marked": true, "route": [STAGE, …],
                "seen": [{"at": "worker1:eth0", "there": 3, "back": 0, "errors": 0, "tunnelled": true,
                          "first": 0.0021}, …]}, …],
     "packets": [PACKET, …],                    # those that the check looked at; see `testbed.report.page.layers`
     "late": ["it came after 3.2 s of at most 5.0 s"],       # what it waited for and saw only close to the deadline
     "left_out": {"commands": 3}}

A STAGE is an interface that the flow has to come through: {"at": "worker1:eth0", "machine": "worker1", "readable":
true}; one that is not readable shows it encrypted, if at all.  A flow that is not marked cannot be told from others.
`first` is in seconds since the check began.
"""

from __future__ import annotations

import ast
import re
import reprlib
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from testbed import journal
from testbed.fixtures import Facts
from testbed.probes.capture import Captures, Window
from testbed.report import sightings, sketch
from testbed.report.record import Outcome, Verdict, masked_assertion
from testbed.runstate import Run

if TYPE_CHECKING:
    from _pytest.fixtures import FixtureDef, SubRequest

TEXT = 400
"""Characters that are kept of an expression and of its values."""

BAD = (Verdict.FAILED, Verdict.INCONCLUSIVE, Verdict.EXPECTED_FAILURE, Verdict.LAB_ERROR)


_ADDRESS = re.compile(r"IPv[46](?:Address|Network|Interface)\('([^']*)'\)")


def shortened(text: str, most: int = TEXT) -> str:
    """The text in one line, addresses as people write them; the middle is left out of one that is too long."""
    line = _ADDRESS.sub(r"\1", " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 60]} … {line[-50:]}"


class Following:
    """Hooks of pytest's that write the journal of each check of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sketched = False
        self._versions: Future[dict[str, str]] | None = None
        self._captures: Captures | None = None
        self._window: Window | None = None
        self._compared: tuple[str, object, object] | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Follow a check from its fixtures to its clean-up."""
        if item.get_closest_marker("check") is not None:
            journal.begin()
        self._compared = None
        self._window = self._captures.window() if self._captures else None
        try:
            return (yield)
        finally:
            journal.end()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: FixtureDef[Any], request: SubRequest) -> Generator[None, object, object]:
        """What the whole run needs, such as the lab, is nobody's own doing."""
        if fixturedef.scope != "session":
            return (yield)
        if fixturedef.argname == "cluster":  # asking many programs takes a while, and so does bringing up a lab
            with ThreadPoolExecutor(1) as pool:
                self._versions = pool.submit(sketch.machine_versions)
                with journal.paused():
                    return (yield)
        with journal.paused():
            made = yield
        if isinstance(made, Captures):
            self._captures, self._window = made, made.window()
        return made

    @pytest.fixture(autouse=True)
    def _captured(self, request: pytest.FixtureRequest) -> None:
        """Have captures from the first check of a lab on, whether that looks at them or not: it may fail."""
        if request.node.get_closest_marker("check") is not None and "cluster" in request.fixturenames:
            request.getfixturevalue("captures")

    def pytest_assertion_pass(self, item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
        """Note what held, and with which values."""
        compared, self._compared = self._compared, None
        notes = journal.current()
        noted = notes.held(shortened(orig), lineno) if notes is not None else None
        if noted is None:
            return
        if compared is not None:
            noted.sign, noted.seen, noted.wanted = compared[0], _value(compared[1]), _value(compared[2])
        else:
            noted.seen = shortened(expl.partition("\n")[0])

    def pytest_assertrepr_compare(self, op: str, left: object, right: object) -> None:
        """Remember both sides of the latest comparison: of a failed assertion the first that did not hold."""
        self._compared = op, left, right

    # --- the account

    def account(self, item: pytest.Item, call: pytest.CallInfo[None], outcome: Outcome) -> dict[str, Any]:
        """What the check has done, as plain data."""
        notes = journal.current()
        if notes is None or outcome.verdict is Verdict.SKIPPED:
            return {}
        with journal.paused():
            found = {"lab": self.run.options.name, "began": round(call.start, 3)}
            try:
                if call.excinfo is not None and (asserted := _assertion(call.excinfo.value)) is not None:
                    notes.assertions.append(self._failed(pytest.ExceptionInfo.from_exception(asserted), item.path))
                outcome.slow = outcome.verdict is Verdict.HELD and bool(notes.late)
                found |= _plain(notes)
                return found | self._seen(item, notes, outcome)
            except Exception as error:  # noqa: BLE001 (whatever is wrong with a lab, its checks have a verdict)
                return found | {"lost": f"{type(error).__name__}: {error}"}

    def _seen(self, item: pytest.Item, notes: journal.Journal, outcome: Outcome) -> dict[str, Any]:
        """What the captures have of the check's flows; the first time the lab is looked at too."""
        cluster, arguments = self.run.cluster, getattr(item, "funcargs", {})
        if cluster is None:
            return {}
        if not self.sketched:
            self.sketched = True
            versions = self._versions.result() if self._versions else {}
            outcome.sketch = sketch.of(cluster, arguments.get("facts") or Facts(cluster), versions)
        window = arguments.get("window") or self._window  # captures go on also where a check looks at none
        if not isinstance(window, Window):
            return {}
        return sightings.of(notes, window, cluster, thorough=outcome.verdict in BAD)

    def _failed(self, excinfo: pytest.ExceptionInfo[AssertionError], suite: Path) -> journal.Assertion:
        """The assertion that failed, with what was compared where it is a comparison.

        Of what failed inside a probe, the statement of the suites that asked for it: that is what the check wanted.
        """
        inside = [one for one in excinfo.traceback if Path(one.path).parent == suite.parent]
        entry, innermost = (inside or excinfo.traceback)[-1], excinfo.traceback[-1]
        text = shortened(_asserted(str(entry.statement).strip()))
        failed = journal.Assertion(text, shortened(str(excinfo.value)), held=False, line=entry.lineno + 1)
        if self._compared is not None and str(innermost.statement).lstrip().startswith("assert"):
            sign, left, right = self._compared
            failed.sign, failed.seen, failed.wanted = sign, _value(left), _value(right)
        return failed


def _assertion(error: BaseException) -> AssertionError | None:
    """The assertion that failed, also where another error came up instead of it; None where there is none."""
    return error if isinstance(error, AssertionError) else masked_assertion(error)


def _asserted(statement: str) -> str:
    """What a statement asserts, without its message."""
    try:
        parsed = ast.parse(statement).body[0]
    except (SyntaxError, IndexError):
        return statement
    return ast.unparse(parsed.test) if isinstance(parsed, ast.Assert) else statement


class _Short(reprlib.Repr):
    """Values as far as people read them: a table of a whole node takes longer to write out than the check does."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxset, self.maxfrozenset, self.maxdict = 5, 16, 16, 16, 16, 12
        self.maxstring, self.maxother, self.maxlong = 300, 160, 60


_short = _Short()


def _value(value: object) -> str:
    return shortened(_short.repr(value), 1200)


def _plain(notes: journal.Journal) -> dict[str, Any]:
    """What the journal itself has, but for the flows."""
    return {
        "asserted": [asdict(assertion) for assertion in notes.assertions],
        "commands": [asdict(c) | {"argv": list(c.argv), "seconds": round(c.seconds, 4)} for c in notes.commands],
        "left_out": dict(notes.left_out),
        "late": list(notes.late),
    }
