"""One session per backend, and the developer's sessions.

`nox -s vxlan -- OPTIONS` is `./run vxlan -- OPTIONS`: nox from anywhere hands over to `./run`, which makes the
environment; nox from that environment does the work.  nox says 0 or 1; the run's own exit code is in `checks.json`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

HERE = Path(__file__).parent
READY = (Path(sys.prefix) / "testbed-stamp").exists()  # this nox is that of the environment that ./run made

BACKENDS = ["vxlan", "vxlan_direct", "host_gw", "ipip", "ipip_direct", "udp", "wireguard", "ipsec", "dual_stack"]

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


def work(session: nox.Session, name: str, *commands: tuple[str, ...]) -> None:
    """Run a session's commands as modules of this environment's Python, or let `./run` do so in its own."""
    if not READY:
        session.run(str(HERE / "run"), name, "--", *session.posargs, external=True)
        return
    for command in commands:
        session.run(sys.executable, "-m", *command, external=True)


def backend(name: str) -> None:
    """Declare the session of a backend."""

    @nox.session(name=name)
    def run(session: nox.Session) -> None:
        work(session, name, ("testbed", "run", name, "--", *session.posargs))


for each in BACKENDS:
    backend(each)


@nox.session
def tests(session: nox.Session) -> None:
    """The project's own tests."""
    work(session, "tests", ("pytest", *session.posargs))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and types."""
    work(session, "lint", ("ruff", "check"), ("ruff", "format", "--check"), ("mypy",))


@nox.session
def bench(session: nox.Session) -> None:
    """What measures speed, memory and scale. Words after -- are for flanneld's figures, which then come alone."""
    others = () if session.posargs else (("benchmarks.bench_labs",), ("benchmarks.bench_render",))
    work(session, "bench", ("benchmarks.bench_flanneld", *session.posargs), *others)


@nox.session
def bench_labs(session: nox.Session) -> None:
    """How long labs take, and what they weigh: network namespaces, and containers as root."""
    work(session, "bench_labs", ("benchmarks.bench_labs", *session.posargs))


@nox.session
def soak(session: nox.Session) -> None:
    """What takes long: kills at random moments, healing in full, a million inputs each parser, runs, every mutant."""
    session.env.setdefault("TESTBED_KILLS", os.environ.get("TESTBED_KILLS", "200"))
    session.env.setdefault("TESTBED_CLAB_KILLS", os.environ.get("TESTBED_CLAB_KILLS", "50"))
    session.env.setdefault("TESTBED_SOAK", "1")
    chosen = ("pytest", "tests/soak", "tests/heals", "tests/fuzz", *session.posargs)
    # With words that choose among the tests these alone are meant.
    others = () if session.posargs else (("tests.heals.inguest",), ("testbed.mutants", "--full", "--no-proofs"))
    work(session, "soak", chosen, *others)


@nox.session
def bundle(session: nox.Session) -> None:
    """flanneld and its CNI plugin as one folder, dist/bundle/flannel, that runs where no Python is."""
    where = ("--distpath", str(HERE / "dist/bundle"), "--workpath", str(HERE / "build/bundle"))
    work(session, "bundle", ("PyInstaller", "--noconfirm", "--log-level=WARN", *where, "tools/bundle/flannel.spec"))


@nox.session
def mutants(session: nox.Session) -> None:
    """The proof that each check fails under the fault that it is there for."""
    work(session, "mutants", ("testbed.mutants", *session.posargs))
