"""./run: what it installs, when it makes the environment, and what it starts.

The script runs for real, in a checkout of its own, on a PATH that holds nothing but a few tools and fakes that keep a
record of how they were called.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "run"
REAL = (
    *("sh", "bash", "cat", "chmod", "dirname", "env", "flock", "grep", "id", "mkdir", "readlink"),
    *("rm", "rmdir", "sha256sum", "sleep", "true", "uname"),
)

PYTHON = """#!/bin/sh
echo "python $*" >>"$CALLS"
case "$1 $2" in
    "-c "*) echo "$0" ;;
    "-m venv") mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python"; echo >"$3/pyvenv.cfg" ;;
    "-m pip") sleep "${PIP_SECONDS-0}"; exit "${PIP_EXIT-0}" ;;
    "-m testbed" | "-m nox") exit "${WORK_EXIT-0}" ;;
esac
"""

DPKG_QUERY = """#!/bin/sh
for package; do
    case " -W -f $LACKS " in *" $package "*) ;; *) printf '%s/installed ' "$package" ;; esac
done
"""

APT_GET = """#!/bin/sh
echo "apt-get $*" >>"$CALLS"
[ ! -e "$POLICY" ] || { echo "policy $("$POLICY"; echo $?)" >>"$CALLS"; }
case "$*" in *update*) exit 0 ;; "-s "*) exit "${SIMULATION-0}" ;; *) exit "${APT_EXIT-0}" ;; esac
"""


class Machine:
    """A checkout, a PATH of fakes, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.checkout = folder / "checkout"
        self.calls_file = folder / "calls"
        self.policy = folder / "policy-rc.d"
        self.lacks = ""
        self.environment = {"HOME": str(folder / "home")}
        for path in (self.bin, self.checkout):
            path.mkdir()
        for tool in REAL:
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)
        text = RUN.read_text().replace("/usr/sbin/policy-rc.d", str(self.policy))
        text = text.replace("/run/systemd/system", str(folder / "systemd"))
        text = text.replace("docker_socket=/var/run/docker.sock", f"docker_socket={folder}/docker.sock")
        text = text.replace("/usr/bin/python3", str(self.fake("python3", PYTHON)))
        assert "PATH=$PATH:" in text
        text = text.replace("PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin\n", "")
        self.script = self.checkout / "run"
        self.script.write_text(text)
        self.script.chmod(0o755)
        (self.checkout / "requirements.lock").write_text("click==8.1 --hash=sha256:00\n")
        self.fake("dpkg-query", DPKG_QUERY)
        self.fake("apt-get", APT_GET)
        self.user(0)

    def fake(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def user(self, uid: int) -> None:
        self.fake("id", f"#!/bin/sh\necho {uid}\n")

    def sudo(self, *, password: bool = False) -> None:
        refuse = 'case "$1" in -n) echo "sudo: a password is required" >&2; exit 1 ;; esac' if password else ""
        self.fake("sudo", f'#!/bin/sh\necho "sudo $*" >>"$CALLS"\n{refuse}\n[ "$1" != -n ] || shift\nexec "$@"\n')

    def start(self, *words: str, uid: int | None = None, **environment: str) -> subprocess.Popen[str]:
        env = {"PATH": str(self.bin), "CALLS": str(self.calls_file), "POLICY": str(self.policy), "LACKS": self.lacks}
        env |= self.environment | environment
        return subprocess.Popen(
            [str(self.script), *words],
            env=env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=uid,
        )

    def run(self, *words: str, uid: int | None = None, **environment: str) -> tuple[int, str]:
        process = self.start(*words, uid=uid, **environment)
        out, err = process.communicate(timeout=30)
        return process.returncode, out + err

    def calls(self, beginning: str = "") -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if line.startswith(beginning)]


@pytest.fixture
def machine() -> Iterator[Machine]:
    # Not below pytest's own folder, which no other user may enter.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Machine(Path(folder))


def test_nothing_missing_starts_the_run_and_nothing_else(machine: Machine) -> None:
    code, said = machine.run("vxlan", "host_gw", "--", "-k", "VXE", WORK_EXIT="1")
    assert code == 1
    assert machine.calls("apt-get") == []
    assert machine.calls()[-1] == "python -m testbed run vxlan host_gw -- -k VXE", said


def test_missing_packages_are_installed_exactly(machine: Machine) -> None:
    machine.lacks = "frr etcd-server"
    code, said = machine.run("vxlan")
    assert code == 0, said
    installs = [call for call in machine.calls("apt-get") if " install " in call and " -s " not in call]
    assert len(installs) == 1
    assert installs[0].endswith("install -y --no-install-recommends etcd-server frr")
    assert not any("update" in call for call in machine.calls("apt-get")), "the lists have them: no update"


def test_a_backend_s_own_packages_are_asked_for_with_it_alone(machine: Machine) -> None:
    machine.lacks = "wireguard-tools"
    machine.run("vxlan")
    assert not machine.calls("apt-get")
    machine.run("vxlan", "wireguard")
    installs = [call for call in machine.calls("apt-get") if " install " in call and " -s " not in call]
    assert [call.split()[-1] for call in installs] == ["wireguard-tools"]


COMPILER = "bc binutils bison debian-archive-keyring flex gcc libc6-dev make xz-utils"


def installed(machine: Machine) -> list[str]:
    """The packages of every installation, in its order."""
    calls = [call for call in machine.calls("apt-get") if " install " in call and " -s " not in call]
    return [call.partition("--no-install-recommends ")[2] for call in calls]


def kernel(machine: Machine, *known: str) -> None:
    """A kernel that can make only those kinds of devices."""
    kinds = "|".join(f"*' type {kind} '*" for kind in known) or "none"
    machine.fake("unshare", f'#!/bin/sh\necho "unshare $*" >>"$CALLS"\ncase "$* " in {kinds}) exit 0 ;; esac\nexit 2\n')


needs_amd64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guest kernel is built on amd64 only")


@needs_amd64
def test_a_compiler_is_installed_only_where_a_guest_kernel_has_to_be_built(machine: Machine) -> None:
    machine.lacks = COMPILER
    kernel(machine, "vxlan")
    machine.run("vxlan", "host_gw")
    machine.run("vxlan", "ipip", "--", "--kernel", "host")
    assert installed(machine) == []
    code, said = machine.run("vxlan", "ipip")
    assert code == 0, said
    assert installed(machine) == [COMPILER]
    machine.run("host_gw", "--", "-k", "x", "--kernel", "guest")
    machine.run("host_gw", "--", "--kernel=guest")
    assert installed(machine) == [COMPILER] * 3


@needs_amd64
def test_a_guest_kernel_that_is_there_needs_no_compiler(machine: Machine) -> None:
    machine.lacks = COMPILER
    kernel(machine)
    machine.run("wireguard", TESTBED_GUEST_KERNEL="/some/linux")
    built = machine.folder / "cache/testbed/guest-kernel/0123/linux"
    built.parent.mkdir(parents=True)
    built.touch()
    built.chmod(0o755)
    machine.run("wireguard", XDG_CACHE_HOME=str(machine.folder / "cache"))
    assert installed(machine) == []
    built.chmod(0o644)
    machine.run("wireguard", XDG_CACHE_HOME=str(machine.folder / "cache"))
    assert installed(machine) == [COMPILER]


@needs_amd64
def test_where_no_compiler_can_be_installed_the_run_says_so_and_goes_on(machine: Machine) -> None:
    machine.lacks = "gcc"
    machine.user(1000)
    kernel(machine)
    code, said = machine.run("ipsec")
    assert code == 0, said
    assert "cannot be built without: gcc" in said
    assert "as root: apt-get install --no-install-recommends gcc" in said
    assert machine.calls()[-1] == "python -m testbed run ipsec --"


@needs_amd64
def test_with_a_compiler_the_kernel_is_not_looked_at(machine: Machine) -> None:
    kernel(machine)
    machine.run("wireguard")
    assert machine.calls("unshare") == []


def test_prepare_installs_what_any_run_needs_and_runs_nothing(machine: Machine) -> None:
    machine.lacks = f"{COMPILER} wireguard-tools charon-systemd frr"
    code, said = machine.run("prepare")
    assert code == 0, said
    expected = ["frr wireguard-tools charon-systemd", *([COMPILER] if os.uname().machine == "x86_64" else [])]
    assert installed(machine) == expected
    assert not machine.calls("python -m testbed")
    assert (machine.checkout / ".venv/testbed-stamp").exists()
    assert machine.run("prepare", "vxlan")[0] == 3


CLAB = [("--lab", "clab"), ("--lab=clab",)]


@pytest.mark.parametrize("options", CLAB)
def test_an_engine_is_installed_where_root_asks_for_containers_and_none_answers(
    machine: Machine, options: tuple[str, ...]
) -> None:
    code, said = machine.run("vxlan", "--", *options)
    assert code == 0, said
    assert installed(machine) == ["docker.io"]
    assert all(call == "policy 101" for call in machine.calls("policy")), "its service stays off"
    assert machine.calls("policy")
    assert machine.calls()[-1] == f"python -m testbed run vxlan -- {' '.join(options)}"


def test_no_engine_is_installed_for_other_labs_or_beside_one(machine: Machine) -> None:
    assert machine.run("vxlan", "--", "--lab", "netns")[0] == 0
    assert machine.run("vxlan", "--", "--name", "clab")[0] == 0
    assert machine.run("prepare")[0] == 0
    assert machine.run("vxlan", "--", "--lab", "clab", DOCKER_HOST="tcp://engine.invalid:2375")[0] == 0
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(machine.folder / "docker.sock"))
        assert machine.run("vxlan", "--", "--lab", "clab")[0] == 0
    (machine.folder / "docker.sock").unlink()
    machine.fake("dockerd", "#!/bin/sh\n")
    assert machine.run("vxlan", "--", "--lab", "clab")[0] == 0
    assert machine.calls("apt-get") == []


def test_for_an_ordinary_user_no_engine_is_installed(machine: Machine) -> None:
    machine.user(1000)
    machine.sudo()
    code, said = machine.run("vxlan", "--", "--lab", "clab")
    assert code == 0, said
    assert machine.calls("apt-get") == []
    assert machine.calls()[-1] == "python -m testbed run vxlan -- --lab clab"


def test_prepare_installs_an_engine_where_it_is_asked_to(machine: Machine) -> None:
    assert machine.run("prepare", "--", "--lab", "clab")[0] == 0
    assert installed(machine) == ["docker.io"]


def test_elsewhere_than_on_debian_the_engine_s_package_is_named(machine: Machine) -> None:
    (machine.bin / "apt-get").unlink()
    for tool in "conntrack bridge etcd ethtool bgpd iperf3 ip iptables ping nft openssl sysctl tcpdump unshare".split():
        if not (machine.bin / tool).exists():
            machine.fake(tool, "#!/bin/sh\n")
    code, said = machine.run("vxlan", "--", "--lab", "clab")
    assert (code, "docker.io" in said, "your package manager" in said) == (2, True, True), said


def test_package_lists_are_fetched_where_they_lack_something(machine: Machine) -> None:
    machine.lacks = "frr"
    machine.run("vxlan", SIMULATION="100")
    assert [call.split()[-1] for call in machine.calls("apt-get")] == ["frr", "update", "frr"]


def test_services_are_held_while_packages_are_installed_and_no_longer(machine: Machine) -> None:
    machine.lacks = "frr"
    code, _ = machine.run("vxlan")
    assert code == 0
    assert "policy 101" in machine.calls("policy")
    assert not machine.policy.exists()


def test_services_are_released_where_the_installation_fails(machine: Machine) -> None:
    machine.lacks = "frr"
    code, said = machine.run("vxlan", APT_EXIT="100")
    assert code == 2
    assert "cannot install: frr" in said
    assert machine.calls("policy")
    assert not machine.policy.exists()
    assert machine.calls("python") == [], "nothing is started on half a machine"


def test_a_policy_of_the_administrator_is_left_alone(machine: Machine) -> None:
    machine.policy.write_text("#!/bin/sh\nexit 42\n")
    machine.policy.chmod(0o755)
    machine.lacks = "frr"
    machine.run("vxlan")
    assert machine.calls("policy")[-1] == "policy 42"
    assert machine.policy.read_text() == "#!/bin/sh\nexit 42\n"


def test_an_ordinary_user_installs_by_sudo(machine: Machine) -> None:
    machine.lacks = "tcpdump"
    machine.user(1000)
    machine.sudo()
    code, said = machine.run("vxlan")
    assert code == 0, said
    assert any("apt-get" in call and call.endswith(" tcpdump") for call in machine.calls("sudo"))
    assert all("python" not in call for call in machine.calls("sudo")), "only packages are installed as root"


@pytest.mark.parametrize("password", [None, True])
def test_without_rights_the_list_is_printed(machine: Machine, password: bool | None) -> None:
    machine.lacks = "tcpdump nftables"
    machine.user(1000)
    if password:
        machine.sudo(password=True)
    code, said = machine.run("vxlan")
    assert code == 2
    assert f"{'sudo' if password else 'as root:'} apt-get install --no-install-recommends nftables tcpdump" in said
    assert machine.calls("apt-get") == machine.calls("python") == []


def test_elsewhere_than_on_debian_the_list_is_printed(machine: Machine) -> None:
    (machine.bin / "dpkg-query").unlink()
    machine.fake("tcpdump", "#!/bin/sh\n")
    code, said = machine.run("vxlan")
    assert code == 2
    listed = said.splitlines()[0].partition(": ")[2].split()
    assert "etcd-server" in listed
    assert "tcpdump" not in listed
    assert machine.calls() == []


def test_the_environment_is_made_once(machine: Machine) -> None:
    assert machine.run("vxlan")[0] == 0
    assert [call for call in machine.calls("python -m pip") if "--require-hashes -r" in call]
    first = len(machine.calls())
    assert machine.run("vxlan")[0] == 0
    assert machine.calls()[first:] == ["python -m testbed run vxlan --"]


def test_another_lock_file_makes_another_environment(machine: Machine) -> None:
    machine.run("vxlan")
    (machine.checkout / "requirements.lock").write_text("click==8.2 --hash=sha256:11\n")
    machine.run("vxlan")
    assert len(machine.calls("python -m venv")) == 2


def test_an_interrupted_installation_is_begun_again(machine: Machine) -> None:
    code, said = machine.run("vxlan", PIP_EXIT="1")
    assert code == 2
    assert "cannot install the Python packages" in said
    assert not machine.calls("python -m testbed")
    assert machine.run("vxlan")[0] == 0
    assert len(machine.calls("python -m venv")) == 2


def test_two_at_once_make_one_environment(machine: Machine) -> None:
    both = [machine.start("vxlan", PIP_SECONDS="0.3") for _ in range(2)]
    said = [process.communicate(timeout=30)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(machine.calls("python -m venv")) == 1
    assert len(machine.calls("python -m testbed")) == 2


def test_without_a_python_that_is_new_enough_nothing_is_made(machine: Machine) -> None:
    machine.fake("python3", "#!/bin/sh\nexit 1\n")
    code, said = machine.run("vxlan")
    assert code == 2
    assert "no Python of version 3.11 or newer" in said
    assert not (machine.checkout / ".venv").exists()


def test_what_is_no_environment_is_not_removed(machine: Machine) -> None:
    precious = machine.folder / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("finished")
    code, said = machine.run("vxlan", TESTBED_VENV=str(precious))
    assert code == 3
    assert "is no Python environment" in said
    assert (precious / "thesis.txt").read_text() == "finished"


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which only root can")
@pytest.mark.parametrize("home", [True, False])
def test_a_checkout_that_cannot_be_written(machine: Machine, home: bool) -> None:
    machine.checkout.chmod(0o555)
    (machine.folder / "home").mkdir(mode=0o777)
    (machine.folder / "home").chmod(0o777)
    machine.calls_file.touch()
    machine.calls_file.chmod(0o666)
    if not home:
        del machine.environment["HOME"]
    code, said = machine.run("vxlan", uid=12345)
    if home:
        assert code == 0, said
        assert list((machine.folder / "home/.cache/testbed").glob("venv-*/testbed-stamp"))
    else:
        assert code == 2
        assert "TESTBED_VENV" in said


def test_developer_sessions_go_to_nox(machine: Machine) -> None:
    assert machine.run("lint", "tests", "--", "-k", "run")[0] == 0
    assert machine.calls()[-1] == "python -m nox -s lint tests -- -k run"


def test_an_environment_may_be_named_from_where_the_user_is(machine: Machine) -> None:
    code, said = machine.run("lint", TESTBED_VENV="mine")  # nox is started in the checkout
    assert code == 0, said
    assert (machine.folder / "mine/testbed-stamp").exists()
    assert machine.calls()[-1] == "python -m nox -s lint --"


@pytest.mark.parametrize(
    ("words", "expected"),
    [((), "usage:"), (("tests", "vxlan"), "cannot be one run"), (("../vxlan",), "no run called"), (("",), "no run")],
)
def test_wrong_use(machine: Machine, words: tuple[str, ...], expected: str) -> None:
    code, said = machine.run(*words)
    assert code == 3
    assert expected in said
    assert machine.calls() == []


def test_the_script_is_executable_and_plain_shell() -> None:
    assert RUN.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["sh", "-n", str(RUN)], check=False).returncode == 0
