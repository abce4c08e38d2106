"""The command line: which commands there are, and how each ends.

A command is a module of `testbed.commands` with a click command of its name in it, imported only when it is asked
for, so that `testbed --help` costs no more than click.  It returns its exit code, or nothing for 0.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import click

from testbed import __version__
from testbed.errors import Exit, TestbedError, printable

COMMANDS = {
    "run": "Run the checks of one or more backends on labs of their own.",
    "up": "Bring up a lab and leave it running.",
    "status": "Tell which labs are up, and what is in them.",
    "exec": "Run a command on a node or in a pod.",
    "shell": "Open a shell on a node or in a pod.",
    "capture": "Show or save the packets of an interface.",
    "trace": "Follow one packet over every interface between two ends of a lab.",
    "graph": "Draw a lab.",
    "down": "Remove a lab, and check that nothing of it is left.",
    "doctor": "Tell what this machine lacks, with the cure and its cost.",
    "kernel": "Build, find, check and use the guest kernel.",
    "engine": "Start or remove a private Docker engine, for labs of containers.",
    "images": "List, make or export the container images of a lab's machines.",
    "render": "Write a lab for containerlab, FRR, kind and kubectl.",
    "lint": "Name every fault of a manifest for flannel, without a lab.",
    "checks": "List the catalogue of checks, and what is implemented.",
}
"""Every command with one line about it, in the order of the help.  One without a module is not there yet."""

FOLDER = Path(__file__).parent / "commands"


class LazyGroup(click.Group):
    """Commands by name of their module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands that are there."""
        return [name for name in COMMANDS if (FOLDER / f"{name}.py").exists()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None where there is none of that name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"testbed.commands.{cmd_name}")
        command = getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_")  # exec_ leaves exec alone
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is asked for; an unknown one is a usage error that names its likeness."""
        name = args[0]
        if name not in self.list_commands(ctx) and not name.startswith("-"):
            close = get_close_matches(name, self.list_commands(ctx), 1)
            hint = f"did you mean {close[0]}?" if close else "`testbed --help` lists the commands"
            raise click.UsageError(f"there is no command called {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="testbed", message="%(prog)s %(version)s")
def cli() -> None:
    """A test-bed and conformance suite for flannel.

    Exit codes: 0 held, 1 a check failed or was inconclusive, 2 the lab or this machine is at fault, 3 the input is
    wrong, 5 nothing ran, 130 interrupted.
    """


def complain(error: TestbedError) -> int:
    """Print an error for its user on standard error; return its exit code."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {printable(str(error))}", err=True)
    return int(error.exit_code)


def _unexpected(error: BaseException) -> int:
    """Tell of an error of the test-bed's own in one line, and keep the traceback for whoever mends it."""
    text = "".join(traceback.format_exception(error))
    short = printable(f"{type(error).__name__}: {error}".strip().splitlines()[0][:300])
    if os.environ.get("TESTBED_DEBUG"):
        click.echo(text, err=True)
        kept = "see above"
    else:
        try:
            number, path = tempfile.mkstemp(prefix="testbed-traceback-", suffix=".txt", text=True)
            with os.fdopen(number, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            kept = f"the traceback is in {path} (TESTBED_DEBUG=1 shows it)"
        except OSError:
            kept = "TESTBED_DEBUG=1 shows the traceback"
    click.echo(f"{click.style('error:', fg='red', bold=True)} internal: {short}\n  hint: {kept}", err=True)
    return int(Exit.LAB)


def _usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error.format_message()}", err=True)
    if context is not None:
        click.echo(f"  hint: {context.get_usage()}\n        `{context.command_path} --help` says more", err=True)
    return int(Exit.INPUT)


def invoke(arguments: Sequence[str]) -> int:
    """Run a command line; return its exit code, with whatever went wrong said on standard error."""
    try:
        code = cli.main(args=list(arguments), prog_name="testbed", standalone_mode=False)
        return code if isinstance(code, int) else int(Exit.HELD)
    except TestbedError as error:
        return complain(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return int(Exit.INPUT)
    except click.ClickException as error:
        return _usage(error)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return int(Exit.INTERRUPTED)
    except SystemExit:
        # Commands return their code; it is click that exits, where whoever read our output has gone, and with 1.
        return int(Exit.LAB)
    except Exception as error:  # noqa: BLE001 - the last resort: no traceback for a user
        return _unexpected(error)


def main() -> NoReturn:
    """Entry point of `testbed`."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # An end that is asked for runs the same clean-up as Ctrl-C; what nohup ignores stays ignored.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    code = invoke(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
