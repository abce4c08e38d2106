"""`testbed run NAME…`: the checks of one or more backends, each on a lab of its own.

One run is pytest in this process, with the suites' own configuration; several are one such process each, one after
the other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from testbed.data import folder
from testbed.doctor import require_tools, search_path
from testbed.errors import Exit, Fault, InputError, worst
from testbed.flannelspec import BACKENDS, normalise
from testbed.interrupts import handling, has_terminal

if TYPE_CHECKING:
    import pytest

CONFIGURATION = Path(__file__).parents[1] / "pytest.ini"

EPILOG = (
    f"NAME is one of {', '.join(BACKENDS)}. OPTIONS are those of the suites and pytest's own; "
    "`testbed run NAME --help` lists the former."
)


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    options_metavar="",
    epilog=EPILOG,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="NAME... [[--] OPTIONS]")
@click.pass_context
def run(context: click.Context, arguments: tuple[str, ...]) -> int:
    """Bring up a lab, deploy flannel on it, check it, report, and remove the lab."""
    names, options = split(arguments)
    if {"-h", "--help"} & set(options):
        click.echo(f"{context.get_help()}\n")
        click.echo(suite_options())
        return int(Exit.HELD)
    if not names:
        raise click.UsageError("which backend? Give at least one NAME", context)
    require_tools(*names)
    if len(names) == 1:
        return in_this_process(names[0], options)
    return worst(in_a_process(name, with_reports_apart(name, options)) for name in names)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the command line into run names, in their one spelling and each once, and pytest's options.

    The names come first; the first word that begins with a hyphen ends them.  Raises InputError with every name that
    is unknown.
    """
    words: list[str] = []
    options = list(arguments)
    while options and not options[0].startswith("-"):
        words.append(options.pop(0))
    if options[:1] == ["--"]:
        options.pop(0)
    faults = []
    names: dict[str, None] = {}
    for word in words:
        try:
            names[normalise(word)] = None
        except InputError as error:
            faults.append(Fault("command line", 0, "NAME", error.what, error.hint))
    if faults:
        raise InputError(faults=faults)
    return list(names), options


def pytest_arguments(name: str, options: Sequence[str]) -> list[str]:
    """What pytest is called with for a run."""
    suites = folder("suites")
    return ["-c", str(CONFIGURATION), "--rootdir", str(suites.parent), "--backend", name, *options, str(suites)]


class Outcome:
    """Tells apart what pytest's exit code does not: an interrupt, an error of pytest's own, and a check that failed."""

    def __init__(self) -> None:
        self.interrupted = False
        self.broken = False

    def pytest_addoption(self, parser: pytest.Parser) -> None:
        """Let pytest's own words about a wrong option name the command that was given."""
        parser.prog = "testbed run NAME"

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Called by pytest on Ctrl-C; also on pytest.exit(), and where it cannot read a file: kinds of their own."""
        self.interrupted = type(excinfo.value) is KeyboardInterrupt

    def pytest_internalerror(self) -> None:
        """Called by pytest when it, or a plugin, fails."""
        self.broken = True

    def code(self, ended: int) -> int:
        """The run's exit code where pytest ended with that one.

        The suites' plugin sets it in most cases; what it had no chance to see is put right here.
        """
        if self.interrupted:
            return int(Exit.INTERRUPTED)
        if self.broken:
            return int(Exit.LAB)
        if ended == 4:  # pytest's own "usage error", which is no code of ours
            return int(Exit.INPUT)
        return ended


ONLY_TELLING = {"--collect-only", "--co", "--markers", "--fixtures", "--fixtures-per-test", "--version", "-V"}
"""Options of pytest's by which no check is run, so that no lab and no other kernel is needed."""


def in_this_process(name: str, options: Sequence[str]) -> int:
    """Run a backend's checks, here or in a guest kernel; return the run's exit code."""
    from testbed.guest import passes, runs

    if os.environ.get(runs.IN_GUEST):
        return pytest_here(name, options)
    if ONLY_TELLING & set(options):
        runs.checked_kernel(options)
        return pytest_here(name, runs.without("--kernel", options))
    if runs.choose(name, options) == "guest":
        if part := os.environ.get(runs.VARIABLE):  # one of several guests
            return runs.in_guest(name, options, runs.kernel_for(name, options), Path(part))
        return passes.in_guests(name, options)
    if lacking := runs.deferrable(name, options):
        return passes.on_both(name, options, lacking, lambda options: pytest_here(name, options))
    return pytest_here(name, runs.without("--kernel", options))


def pytest_here(name: str, options: Sequence[str]) -> int:
    """Run pytest on the suites in this process; return the run's exit code."""
    import pytest

    os.environ["PATH"] = search_path()
    outcome = Outcome()
    return outcome.code(int(pytest.main(pytest_arguments(name, options), plugins=[outcome])))


def with_reports_apart(name: str, options: Sequence[str]) -> list[str]:
    """The options of one of several runs: a given `--reports DIR` becomes DIR/NAME, so that none overwrites another."""
    changed = list(options)
    for position, option in enumerate(options):
        if option == "--reports" and position + 1 < len(options):
            changed[position + 1] = str(Path(options[position + 1]) / name)
        elif option.startswith("--reports="):
            changed[position] = f"--reports={Path(option.partition('=')[2]) / name}"
    return changed


def in_a_process(name: str, options: Sequence[str]) -> int:
    """Run one of several backends in a process of its own; return its exit code.

    An interrupt ends that run in its own time, with its lab removed, and then the rest: raises KeyboardInterrupt.
    """
    # Where this process is killed the run is asked to end, as by SIGTERM, instead of going on unseen.
    tied = ["setpriv", "--pdeathsig", "TERM", "--"]
    argv = [*tied, sys.executable, "-m", "testbed", "run", name, "--", *options]
    interrupts: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def note(number: int, _: FrameType | None) -> None:
        interrupts.append(number)
        # A terminal's Ctrl-C reaches the child by itself, and a second one would cut its clean-up short.
        if child is not None and child.poll() is None and not (number == signal.SIGINT and has_terminal()):
            child.send_signal(number)

    with handling(note, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        child = subprocess.Popen(argv)
        code = child.wait()
    if interrupts or code in (Exit.INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    return code if code >= 0 else int(Exit.LAB)


class _OptionList:
    """Stands in for pytest's parser, and keeps what the plugin adds to it as lines of help."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def getgroup(self, *_: object, **__: object) -> _OptionList:
        """Every group is this one."""
        return self

    def addoption(self, *names: str, **attributes: Any) -> None:
        """Keep an option's names and its help."""
        metavar = "" if str(attributes.get("action", "")).startswith("store_") else attributes.get("metavar", "VALUE")
        value = metavar if isinstance(metavar, str) else " ".join(metavar)
        help_text = str(attributes.get("help", "")).replace("%default", str(attributes.get("default")))
        self.rows.append((" ".join(filter(None, (", ".join(names), value))), help_text))

    addini = addoption


def suite_options() -> str:
    """Help about the options of the suites, as the plugin declares them."""
    from testbed import plugin

    options = _OptionList()
    getattr(plugin, "pytest_addoption")(options)  # noqa: B009 - typed for pytest's own parser
    formatter = click.HelpFormatter()
    with formatter.section("Options of the suites (and pytest's own, such as -k, -m and -n)"):
        formatter.write_dl(options.rows or [("--help", "")])
    return formatter.getvalue()
