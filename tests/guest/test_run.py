"""A command in the guest: its output, exit code and files, and that nothing of a guest outlives its caller."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.guest.build import Kernel

SECONDS = 90

#: Calls `guest.run` with what the command line says: KERNEL WRITABLE ARGV…
CALLER = """
import sys
from pathlib import Path
from testbed.errors import TestbedError
from testbed.guest.run import run
try:
    sys.exit(run(sys.argv[3:], kernel=Path(sys.argv[1]), writable=[Path(sys.argv[2])]))
except TestbedError as error:
    print(error, file=sys.stderr)
    sys.exit(int(error.exit_code))
"""


ORDINARY = 54321
AS_ORDINARY = (
    *("setpriv", "--reuid", str(ORDINARY), "--regid", str(ORDINARY), "--clear-groups"),
    *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
)
#: As an ordinary user in whose user namespace no further one can be made, as where a distribution forbids it.
WITHOUT_NAMESPACES = (
    *("setpriv", "--reuid", str(ORDINARY), "--regid", str(ORDINARY), "--clear-groups", "unshare", "-U"),
    *(f"--map-user={ORDINARY}", f"--map-group={ORDINARY}", "--keep-caps", "sh", "-c"),
    'echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --ambient-caps=-all --inh-caps=-all "$@"',
    "sh",
)


class Guest:
    """Starts commands in guests; everything of theirs lies below one folder, by which their processes are known."""

    def __init__(self, kernel: Kernel, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.kernel, self.folder, self.prefix = kernel, folder, prefix
        self.started: list[subprocess.Popen[bytes]] = []
        self.shared = folder / "shared"
        self.shared.mkdir()

    def argv(self, *command: str) -> list[str]:
        return [*self.prefix, sys.executable, "-c", CALLER, str(self.kernel.path), str(self.shared), *command]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.folder), "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.argv(*command), capture_output=True, env=self.environment, timeout=SECONDS, check=False
        )

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(self.argv(*command), stdout=pipe, stderr=pipe, env=self.environment)
        self.started.append(process)
        return process

    def end(self) -> None:
        """Kill what a failed test left running."""
        for process in self.started:
            process.kill()
            process.wait()

    def processes(self) -> list[int]:
        """The live processes of guests below the folder; the stubs of a guest have the guest's environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if str(self.folder).encode() in known and state not in "ZX":
                    found.append(int(entry.name))
        return found


@pytest.fixture
def guest(kernel: Kernel, tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(kernel, tmp_path)
    yield guest
    guest.end()


@pytest.fixture(params=["caller", "ordinary", "without namespaces"])
def anybody(request: pytest.FixtureRequest, kernel: Kernel) -> Iterator[Guest]:
    """Guests of whoever runs the tests, and, where that is root, of an ordinary user in two kinds of surroundings."""
    prefix = {"caller": (), "ordinary": AS_ORDINARY, "without namespaces": WITHOUT_NAMESPACES}[request.param]
    if prefix and os.getuid():
        pytest.skip("only root can be somebody else")
    with tempfile.TemporaryDirectory(prefix="test-guest-") as name:
        guest = Guest(kernel, Path(name), prefix)
        if prefix:
            if kernel.way == "built":  # in a folder of root's
                copy = shutil.copy(kernel.path, guest.folder / "linux")
                guest.kernel = replace(kernel, path=Path(copy))
            for path in (guest.folder, guest.shared):
                os.chown(path, ORDINARY, ORDINARY)
        yield guest
        guest.end()


def test_anybody_can_run_a_command_and_keep_its_files(anybody: Guest) -> None:
    done = anybody.run("sh", "-c", f"id -u; echo data >{anybody.shared}/kept; exit 3")
    assert (done.returncode, done.stdout) == (3, b"0\n"), done.stderr.decode()
    kept = anybody.shared / "kept"
    assert kept.read_text() == "data\n"
    assert kept.stat().st_uid == anybody.shared.stat().st_uid


def wait_until(look: Callable[[], bool]) -> bool:
    return bool(Deadline(30).poll(lambda: look() or None))


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -15 $$", 143)]
)
def test_the_exit_code_is_the_command_s(guest: Guest, script: str, code: int) -> None:
    assert guest.run("sh", "-c", script).returncode == code


def test_a_command_that_is_not_there_exits_as_in_a_shell(guest: Guest) -> None:
    done = guest.run("no-such-command")
    assert done.returncode == 127
    assert b"no-such-command: No such file or directory" in done.stderr


def test_it_is_another_kernel(guest: Guest) -> None:
    assert guest.run("uname", "-r").stdout.decode().strip() != os.uname().release


def test_every_byte_of_both_outputs_comes_through(guest: Guest) -> None:
    program = (
        "import sys; data = bytes(range(256)) * 400\nsys.stdout.buffer.write(data); sys.stderr.buffer.write(data[::-1])"
    )
    done = guest.run("/usr/bin/python3", "-I", "-S", "-c", program)
    data = bytes(range(256)) * 400
    assert done.stdout == data
    assert done.stderr == data[::-1]


def test_output_comes_as_it_is_made(guest: Guest) -> None:
    go = guest.shared / "go"
    process = guest.start("sh", "-c", f"echo first; while ! [ -e {go} ]; do :; done; echo second")
    assert process.stdout
    assert process.stdout.readline() == b"first\n"  # the command waits for what comes next
    go.touch()
    assert process.communicate(timeout=SECONDS)[0] == b"second\n"
    assert process.returncode == 0


def test_only_the_writable_folder_keeps_what_was_written(guest: Guest) -> None:
    kept, lost = guest.shared / "sub" / "kept", guest.folder / "lost"
    before = Path("/etc/hostname").read_bytes() if Path("/etc/hostname").exists() else None
    script = (
        f"mkdir {kept.parent} && echo data >{kept}.new && mv {kept}.new {kept} && echo x >{lost} && cat {kept} {lost}"
    )
    done = guest.run("sh", "-c", f"{script}; echo changed >/etc/hostname; cat /etc/hostname")
    assert done.stdout.decode().split() == ["data", "x", "changed"], done.stderr.decode()
    assert kept.read_text() == "data\n"
    assert kept.stat().st_uid == os.getuid()
    assert not lost.exists()
    assert (Path("/etc/hostname").read_bytes() if before is not None else None) == before


ESCAPE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
os.mkdir("/host")
if libc.mount(b"none", b"/host", b"hostfs", 0, b"/"):
    sys.exit(f"not mounted: {os.strerror(ctypes.get_errno())}")
for path in sys.argv[1:]:
    try:
        with open("/host" + path, "w") as file:
            file.write("from the guest")
        print("written", path)
    except OSError as error:
        print("refused", path, error.strerror)
"""


def test_root_of_the_guest_cannot_write_to_the_host(anybody: Guest) -> None:
    """It may mount the host's root again, and as writable, but its host side holds nothing that can be written."""
    if anybody.prefix == WITHOUT_NAMESPACES:
        pytest.skip("nothing can be taken away from whoever may make no namespace: the guest has the user's rights")
    inside, outside = anybody.shared / "inside", anybody.folder / "outside"
    common = Path(f"/var/tmp/testbed-escape-{os.getpid()}")
    assert not common.exists()
    argv = ("/usr/bin/python3", "-I", "-S", "-c", ESCAPE, str(inside), str(outside), str(common), "/etc/escape")
    done = anybody.run(*argv)
    said = done.stdout.decode()
    assert f"written {inside}" in said, said + done.stderr.decode()  # the same way works where it may
    assert said.count("refused") == 3, said
    assert f"refused {common} Read-only file system" in said, said  # where its mode would let anybody
    assert not any(path.exists() for path in (outside, common, Path("/etc/escape")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_command_which_ends_in_its_own_time(guest: Guest, number: signal.Signals) -> None:
    program = (
        "import os, signal, sys, time\n"
        "def end(number, frame):\n    os.write(1, b'told %d\\n' % number); os._exit(5)\n"
        "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.05)"
    )
    process = guest.start("/usr/bin/python3", "-I", "-S", "-c", program)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=SECONDS)
    assert out == f"told {int(number)}\n".encode(), err.decode()
    assert process.returncode == 5
    assert wait_until(lambda: not guest.processes())


def test_a_second_ctrl_c_ends_a_guest_that_will_not(guest: Guest) -> None:
    script = "import signal, time\nsignal.signal(2, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    process = guest.start("/usr/bin/python3", "-I", "-S", "-c", script)
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # two signals at once are one
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert wait_until(lambda: not guest.processes())


def test_kill_9_of_the_caller_leaves_no_guest(anybody: Guest) -> None:
    process = anybody.start("sh", "-c", "sleep 600 & echo ready; sleep 600")
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    assert len(anybody.processes()) > 2  # they can be seen at all
    process.kill()
    process.communicate(timeout=SECONDS)
    assert wait_until(lambda: not anybody.processes()), anybody.processes()


@pytest.mark.parametrize(
    "end",
    [
        "libc.reboot(0x4321FEDC)",  # powered off before its command could end
        "open('/proc/sysrq-trigger', 'w').write('c')",  # a panic
    ],
)
def test_a_guest_that_dies_is_the_lab_s_fault_and_shows_its_console(guest: Guest, end: str) -> None:
    program = f"import ctypes; libc = ctypes.CDLL(None); open('/dev/kmsg', 'w').write('<0>last words'); {end}"
    done = guest.run("/usr/bin/python3", "-I", "-S", "-c", program)
    assert done.returncode == 2, done
    assert b"the guest kernel" in done.stderr
    assert b"last words" in done.stderr


def test_it_leaves_no_file_behind(guest: Guest) -> None:
    assert guest.run("true").returncode == 0
    assert [path.name for path in guest.folder.iterdir()] == ["shared"]


def test_on_a_terminal_the_command_has_one_and_ctrl_c_reaches_it(guest: Guest) -> None:
    program = (
        "import os, sys, time\n"
        "open('/dev/tty').close()\n"
        "try:\n"
        "    print(os.isatty(1), os.isatty(2), tuple(os.get_terminal_size()), 'ready', flush=True)\n"
        "    while True: time.sleep(0.05)\n"  # briefly: a signal just before a sleep is seen after it
        "except KeyboardInterrupt:\n    print('cleaned'); sys.exit(9)"
    )
    pid, terminal = pty.fork()
    if not pid:
        argv = guest.argv("/usr/bin/python3", "-I", "-S", "-c", program)
        os.execve(argv[0], argv, guest.environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 101, 0, 0))
    said = b""

    def hear() -> bool:
        nonlocal said
        try:
            said += os.read(terminal, 4096)
        except OSError:
            return True  # the other end is closed
        return b"ready" in said

    ended: list[int] = []
    try:
        assert wait_until(hear)
        os.write(terminal, b"\x03")
        hearing = threading.Thread(target=lambda: wait_until(lambda: bool(hear() and ended)), daemon=True)
        hearing.start()
        ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        hearing.join(SECONDS)
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
        os.close(terminal)
    assert b"True True (101, 41)" in said
    assert b"cleaned" in said
    assert ended == [9]


@pytest.mark.skipif(os.getuid() != 0, reason="only root has folders that its guest may not read")
def test_root_s_guest_sees_of_closed_folders_what_it_needs_and_no_more(guest: Guest) -> None:
    needed, other = guest.folder / "needed", guest.folder / "other"
    for folder in (needed, other):
        folder.mkdir()
        (folder / "file").write_text("data\n")
    guest.folder.chmod(0o700)
    script = f"cat {needed}/file; cat {other}/file; echo x >{needed}/file; cat {needed}/file; cat /etc/shadow"
    argv = guest.argv("sh", "-c", script)
    done = subprocess.run(argv, capture_output=True, env=guest.environment, cwd=needed, timeout=SECONDS, check=False)
    assert done.stdout == b"data\nx\n", done.stderr.decode()
    assert done.stderr.count(b"No such file") == 1
    assert b"/etc/shadow: Permission denied" in done.stderr
    assert (needed / "file").read_text() == "data\n"
