"""A real Kubernetes API that makes trouble: away, 410, 429, 500, half a line, silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.labs import interpreter
from testbed.nodes.kubernetes import FOLDER, Call
from testbed.tools import ToolUnavailable, build_tool
from tests.heals.heallab import FULL, HealLab
from tests.heals.test_etcd import routed, unrouted
from tests.heals.traffic import Traffic
from tests.labs.test_kubernetes import stranger

PORT = 6444
MODE = "/run/apiproxy.mode"
#: Seconds that trouble lasts.
LASTS = 30.0 if FULL else 4.0
STARTS_WITHIN = 30.0
"""Seconds for which a flanneld that starts tries to read its node, before it ends for others to start it again."""

AWAY = 600.0 if FULL else 8.0
#: Between two tries flanneld waits at most 15 s.
RECOVERS_WITHIN = 20.0
#: An API that sends bookmarks every minute is given up after so many seconds of silence.
SILENCE = 180.0
CIDR, HOST = "10.244.77.0/24", 77


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., HealLab]) -> HealLab:
    """vxlan with leases in a real API; all flannelds reach it by a proxy that can make trouble."""
    try:
        build_tool("kubernetes")
    except ToolUnavailable as error:
        pytest.skip(str(error))
    made = make_lab("vxlan", store="kubernetes")
    cluster = made.cluster
    plane, node = cluster.kubernetes.plane, cluster.lab.node(cluster.lab.spec.control_plane)
    program = "/opt/apiproxy.py"
    node.write(program, (Path(__file__).parent / "apiproxy.py").read_bytes())
    node.write(MODE, "pass")
    node.start(
        [interpreter(), "-I", "-S", program, str(PORT), plane.address, str(plane.port), FOLDER, MODE], name="apiproxy"
    )
    assert Deadline(10).poll(lambda: "listening" in made.sh("cat /var/log/apiproxy.log", node=node.name) or None)
    for name in made.names:
        cluster.stop_flanneld(name)
        environment = {**cluster.flannel.env, **cluster.store.environment(name), "KUBERNETES_SERVICE_PORT": str(PORT)}
        made.sh(": >/var/log/flanneld.log", node=name)
        cluster.lab.node(name).start(cluster.flanneld_argv(name), name="flanneld", env=environment)
    assert Deadline(20).poll(lambda: all(map(made.serves, made.names)) or None), made.log()
    return made


@pytest.fixture
def trouble(lab: HealLab) -> Iterator[Callable[[str], None]]:
    """Return a function that has the proxy make trouble; `pass` ends it."""
    node = lab.cluster.lab.node(lab.cluster.lab.spec.control_plane)

    def make(mode: str) -> None:
        node.write(MODE + ".new", mode)
        node.run(["mv", MODE + ".new", MODE])

    yield make
    make("pass")
    lab.cluster.kubernetes.try_delete("stranger")
    assert Deadline(SILENCE if FULL else RECOVERS_WITHIN).poll(lambda: unrouted(lab, HOST) or None)


@pytest.mark.parametrize("mode", ["away", "410", "429", "500", "503", "half", "hang"])
def test_trouble_costs_nothing_and_what_was_missed_is_learned(
    lab: HealLab, trouble: Callable[[str], None], mode: str
) -> None:
    if mode == "hang" and not FULL:
        pytest.skip(f"silence is given up after {SILENCE:.0f} s only: the soak waits for that")
    pids = {name: lab.cluster.flanneld_pid(name) for name in lab.names}
    before = lab.settled()
    with Traffic.between(lab, "worker2") as traffic:
        trouble(mode)
        Deadline(3.0).poll(lambda: None, every=0.5)  # the proxy looks for its mode every 50 ms, and ends what it is at
        lasts = Deadline(AWAY if mode == "away" else LASTS)
        lab.cluster.kubernetes.ask(Call("POST", "/api/v1/nodes", stranger(CIDR)))
        while not lasts.passed:
            assert lab.state() == before, "trouble changed something"
            assert {name: lab.cluster.flanneld_pid(name) for name in lab.names} == pids
            Deadline(min(1.0, lasts.left)).poll(lambda: None, every=0.5)
        trouble("pass")
        within = RECOVERS_WITHIN + (SILENCE if mode == "hang" else 0)
        lab.eventually(f"API: {mode} for {lasts.seconds:.0f} s", lambda: routed(lab, HOST), within)
        assert lab.cluster.kubernetes.try_delete("stranger")
        lab.eventually(f"API: a removal after {mode}", lambda: unrouted(lab, HOST), RECOVERS_WITHIN)
    assert not traffic.missing, str(traffic)
    assert lab.answers()
    assert {name: lab.cluster.flanneld_pid(name) for name in lab.names} == pids


@pytest.mark.parametrize("mode", ["away", "429", "500", "half"])
def test_trouble_at_the_start_is_waited_out(lab: HealLab, trouble: Callable[[str], None], mode: str) -> None:
    before = lab.settled()
    lab.cluster.stop_flanneld(lab.victim)
    trouble(mode)
    cluster = lab.cluster
    port = {"KUBERNETES_SERVICE_PORT": str(PORT)}
    environment = {**cluster.flannel.env, **cluster.store.environment(lab.victim), **port}
    lab.sh(": >/var/log/flanneld.log")
    cluster.lab.node(lab.victim).start(cluster.flanneld_argv(lab.victim), name="flanneld", env=environment)
    Deadline(min(LASTS, STARTS_WITHIN / 3)).poll(lambda: None, every=0.5)
    assert cluster.flanneld_pid(lab.victim) is not None, lab.log()
    assert not lab.serves(lab.victim), "it does not need the API to start"
    assert lab.state() == before
    trouble("pass")
    what = f"API: {mode} at the start"
    lab.eventually(what, lambda: lab.serves(lab.victim) and lab.state() == before, RECOVERS_WITHIN)
    assert lab.answers()
