"""The pytest plugin of the suites: options, which checks apply, verdicts, and the report.

Without `--backend` it does nothing but know its marker, so that the project's own tests are plain pytest.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest

from testbed import collecting, pause
from testbed.aftermath import Aftermath, check_ends
from testbed.errors import Exit, Fault, InputError, TestbedError, printable
from testbed.fixtures import alone, captures, cluster, facts, figures, path, paths, window
from testbed.fixtures6 import facts6
from testbed.options import (
    KERNELS,
    KERNELS_HERE,
    LABS,
    LABS_HERE,
    RULES,
    RULES_HERE,
    STORES,
    STORES_HERE,
    RunOptions,
    default_name,
    image_of,
    key_values,
    node_paths,
    one_of,
    raise_faults,
)
from testbed.report.conclude import Ending, conclude
from testbed.report.expectations import load_expectations
from testbed.report.following import Following
from testbed.report.parts import PartWriter
from testbed.report.record import RunRecord, Verdict, storable
from testbed.report.terminal import Screen
from testbed.report.write import ReportFolder
from testbed.reporter import CheckReporter
from testbed.runstate import RUN, Run
from testbed.verdicts import outcome_of

__all__ = ["alone", "captures", "cluster", "facts", "facts6", "figures", "path", "paths", "window"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `testbed run`."""
    group = parser.getgroup("testbed", "flannel test-bed")
    add = group.addoption
    add("--backend", metavar="NAME", help="which run: vxlan, vxlan_direct, host_gw, udp, …")
    add("--topology", metavar="NAME", help="the lab's topology, or the path of one; default: the backend's")
    add("--set", dest="testbed_set", action="append", default=[], metavar="K=V", help="an option of the topology")
    add("--mtu", type=int, metavar="BYTES", help="MTU of the underlay")
    add("--rules", metavar="KIND", help=f"{', '.join(RULES)}; default: what net-conf.json says, else iptables-nft")
    add("--net-conf", action="append", default=[], metavar="KEY=VALUE", help="a key of net-conf.json, as Port=4789")
    add("--store", default="etcd", metavar="KIND", help=f"{', '.join(STORES)}; default etcd")
    add("--manifest", metavar="FILE", help="a kube-flannel.yml that says what is deployed and expected")
    add("--flanneld", action="append", default=[], metavar="[NODE=]PATH", help="the flanneld to put under test")
    add("--cni-plugin", action="append", default=[], metavar="[NODE=]PATH", help="the CNI plugin to put under test")
    way = "follow a packet between two ends (worker1/client worker3/testapp) once the lab is up"
    add("--path-trace", nargs=2, action="append", default=[], metavar=("SRC", "DST"), help=way)
    add("--pause-on-fail", action="store_true", help="stop where a check fails, with the lab up, and go on by Enter")
    add("--pause-timeout", type=float, metavar="SECONDS", help="of --pause-on-fail: go on by itself")
    add("--keep", action="store_true", help="leave the lab up at the end")
    add("--name", metavar="ID", help="the lab's name; default: the run's and a hash of the folder")
    add("--reports", metavar="DIR", help="where the report goes; default reports/NAME")
    add("--lab", default="netns", metavar="KIND", help=f"{' or '.join(LABS_HERE)}; default netns")
    add("--image", default="", metavar="NAME", help="containers' image: host, full or one of the engine's own")
    add("--image-prefix", default="", metavar="MIRROR/", help="pull leaves' and spines' FRR from a registry mirror")
    add("--full", action="store_true", help="every row of the catalogue; default: its smoke part, or what -k chooses")
    add("--kernel", default="host", metavar="KIND", help=f"{', '.join(KERNELS)}; default auto")


def run_options(config: pytest.Config) -> RunOptions:
    """Read the run's options. Raises InputError with every fault of the command line at once."""
    from testbed.flannelspec import normalise
    from testbed.labs.state import checked_id

    faults: list[Fault] = []
    value = config.getoption
    backend = normalise(value("--backend"))
    name = value("--name") or default_name(backend, Path.cwd())
    try:
        checked_id(name)
    except InputError as error:
        faults.append(Fault("command line", 0, "--name", error.what, error.hint))
    worker = collecting.worker_id(config)
    options = RunOptions(
        backend=backend,
        name=f"{name}-{worker}" if worker else name,
        topology=value("--topology"),
        settings=key_values("--set", value("testbed_set"), faults),
        mtu=value("--mtu"),
        rules=one_of("--rules", value("--rules"), RULES_HERE, RULES, faults) if value("--rules") is not None else None,
        net_conf=key_values("--net-conf", value("--net-conf"), faults),
        store=one_of("--store", value("--store"), STORES_HERE, STORES, faults),
        manifest=Path(value("--manifest")) if value("--manifest") else None,
        flanneld=node_paths("--flanneld", value("--flanneld"), faults),
        cni_plugin=node_paths("--cni-plugin", value("--cni-plugin"), faults),
        lab=one_of("--lab", value("--lab"), LABS_HERE, LABS, faults),
        image=image_of(value("--image"), value("--lab"), faults),
        image_prefix=image_of(value("--image-prefix"), value("--lab"), faults, option="--image-prefix"),
        kernel=one_of("--kernel", value("--kernel"), KERNELS_HERE, KERNELS, faults),
        keep=value("--keep"),
        path_traces=tuple((source, target) for source, target in value("--path-trace")),
        pause_on_fail=value("--pause-on-fail"),
        pause_seconds=value("--pause-timeout"),
        reports=Path(value("--reports") or Path("reports") / backend),
    )
    faults += pause.faults(options, several=bool(config.getoption("numprocesses", None) or worker))
    raise_faults(faults)
    return options


def _start(config: pytest.Config) -> Run:
    """Find out what the run is. Raises InputError before anything is made."""
    from testbed.nodes.deploy import describe_lab

    options = run_options(config)
    lab, flannel = describe_lab(options)
    known = {node.name for node in lab.cluster_nodes}
    strangers = sorted({node for node in [*options.flanneld, *options.cni_plugin] if node} - known)
    if strangers:
        hint = f"its nodes are {', '.join(sorted(known))}"
        raise InputError(f"{lab.topology} has no node called {', '.join(strangers)}", where="--flanneld", hint=hint)
    check_ends(lab, options.path_traces)
    return Run(options, lab, flannel, expectations=load_expectations())


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Check the options, and open the report."""
    config.addinivalue_line("markers", "check(id): the catalogue row that a function of the suites checks")
    if not config.getoption("--backend"):
        return
    try:
        run = config.stash[RUN] = _start(config)
        run.aftermath = Aftermath(run)
        config.pluginmanager.register(run.aftermath, "testbed-aftermath")
        run.following = Following(run)
        config.pluginmanager.register(run.following, "testbed-following")
        if collecting.worker_id(config):
            run.staging = Path(getattr(config, "workerinput")["testbed_staging"])  # noqa: B009 (xdist's attribute)
            return
        _open_report(config, run)
    except TestbedError as error:
        _refuse(config, error)


class _Refusal(pytest.exit.Exception):  # type: ignore[name-defined,misc] # pytest has no name for its type
    """Ends pytest before it has begun."""


_Refusal.__name__ = "error"  # pytest prints a class's name in front of its message


def _refuse(config: pytest.Config, error: TestbedError) -> NoReturn:
    """Give up with one message, in the words of every other command."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.unregister(reporter)  # it would say it again, as an exception
    raise _Refusal(printable(str(error)), returncode=int(error.exit_code))


def _open_report(config: pytest.Config, run: Run) -> None:
    run.part = PartWriter.of_environment()
    if run.part is not None:
        run.staging = run.part.folder
    elif not config.getoption("collectonly"):
        run.report = ReportFolder(run.options.reports)
        run.staging = run.report.staging
    options = run.options
    nodes = [node.name for node in run.lab.cluster_nodes]
    run.record = RunRecord(
        {
            "name": options.name,
            "backend": options.backend,
            "lab": options.lab,
            "kernel": options.kernel,
            "topology": run.lab.topology,
            "mtu": run.lab.mtu,
            "rules": run.flannel.rules,
            "store": options.store,
            "implementations": {node: str(options.implementation(node) or "bundled") for node in nodes},
        }
    )
    run.whole = not (config.getoption("keyword") or config.getoption("markexpr")) and collecting.whole_suites(config)
    # The terminal itself: during a check standard output is captured.
    run.screen = Screen(os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace"))
    old = config.pluginmanager.getplugin("terminalreporter")
    if old is not None:
        config.pluginmanager.unregister(old)
        config.pluginmanager.register(CheckReporter(config, run), "terminalreporter")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist where its failed checks' files go."""
    run = node.config.stash.get(RUN, None)
    if run is not None:
        node.workerinput["testbed_staging"] = str(run.staging)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, obj: object) -> list[pytest.Item] | None:
    """Name the checks by their rows."""
    if collector.config.stash.get(RUN, None) is None or not isinstance(collector, pytest.Module):
        return None
    return collecting.named_by_row(collector, obj)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a check once for each path of its row."""
    run = metafunc.config.stash.get(RUN, None)
    if run is not None and "path" in metafunc.fixturenames:
        collecting.parametrise(metafunc, run)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """Leave out the checks that are about other backends, and show the rows that nothing checks.

    What is left to another pass of the run is taken from what options such as -k have chosen.
    """
    marked = [item for item in items if item.get_closest_marker("check")]
    run = config.stash.get(RUN, None)
    if run is None and marked:
        message = "error: the suites need to know which backend\n  hint: --backend vxlan, or `testbed run vxlan`"
        pytest.exit(message, returncode=int(Exit.INPUT))
    if run is not None:
        collecting.select(session, config, items, run)
    yield
    if run is not None:
        others = set(collecting.left_to_others(config, items))
        items[:] = [item for item in items if item not in others]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Remember how many checks there are."""
    run = session.config.stash.get(RUN, None)
    if run is not None:
        run.total = len(getattr(session, "items", ()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """The same, where only workers collect."""
    run = node.config.stash.get(RUN, None)
    if run is not None:
        run.total = len(ids)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here before anything is brought up for it."""
    if item.config.stash.get(RUN, None) is not None:
        reason = collecting.skip_reason(item)
        if reason:
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the verdict to pytest's report, and keep what a failed check leaves."""
    report = yield
    run = item.config.stash.get(RUN, None)
    if run is None or item.get_closest_marker("check") is None:
        return report
    outcome = outcome_of(item, call, report, run)
    if outcome is None:
        return report
    if run.following is not None:
        outcome.account = run.following.account(item, call, outcome)
    if run.aftermath is not None and outcome.verdict not in (Verdict.HELD, Verdict.SKIPPED):
        run.aftermath.keep(report, outcome)
    setattr(report, "testbed", outcome.to_message())  # noqa: B010 (travels with the report from a worker)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let a worker's report travel, whatever characters strangers' programs have put into it."""
    return storable((yield))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the report, show the table, settle the exit code."""
    run = session.config.stash.get(RUN, None)
    if run is None or run.record is None or run.screen is None:
        return
    if session.config.getoption("collectonly"):
        return
    record = run.record
    if exitstatus == pytest.ExitCode.USAGE_ERROR:  # pytest says which; the report of an earlier run stays
        if run.report:
            run.report.discard()
        return
    if exitstatus == pytest.ExitCode.INTERNAL_ERROR or _collection_failed(session, record):
        record.broken = "the test runner itself failed; see above"
    ending = Ending(
        backend=run.options.backend,
        selection=_selection(run, full=session.config.getoption("full")),
        comparable=_comparable(run),
        stopped=bool(session.shouldfail or session.shouldstop),
        refused=run.refused,
    )
    if run.part is not None:
        run.screen.close_bar()
        run.part.end(record, ending=asdict(ending))
        session.exitstatus = record.finish(strict=False)
    else:
        session.exitstatus = conclude(record, ending, run.screen, run.report)


def _collection_failed(session: pytest.Session, record: RunRecord) -> bool:
    """Whether a file of the suites could not even be read."""
    return session.testsfailed > 0 and not record.outcomes


def _selection(run: Run, *, full: bool) -> str:
    """Under which name the run's expected counts are: some checks are about rules of nftables or Kubernetes only."""
    special = [run.flannel.rules] if run.flannel.rules == "nftables" else []
    special += [run.options.store] if run.options.store != "etcd" else []
    return "_".join(["full" if full else "smoke", *special])


def _comparable(run: Run) -> bool:
    """Whether the run is the one that expected counts are committed for."""
    plain = not (run.options.settings or run.options.net_conf or run.options.manifest or run.options.mtu)
    return run.whole and plain
