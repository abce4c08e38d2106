"""The CNI plugin as a runtime sees it, with a delegate that tells what it was given."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel.cni.basics import decode, encode, masked, parse_subnet_env

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "flannel" / "cni" / "plugin.py"
ENV = """FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.1.1/24
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
"""
DUAL_ENV = """FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.1.1/24
FLANNEL_IPV6_NETWORK=fd00:10:244::/56
FLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=false
"""
#: What upstream sends for the stock configuration, to the byte.
GOLDEN = (
    b'{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],'
    b'"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,'
    b'"name":"cbr0","type":"bridge"}'
)
DELEGATE = """#!{python} -IS
import json, os, sys
data = sys.stdin.buffer.read()
folder = {folder!r}
command = os.environ["CNI_COMMAND"]
with open(folder + "/calls", "a") as calls:
    cni = {{key: value for key, value in os.environ.items() if key.startswith("CNI_")}}
    calls.write(json.dumps({{"env": cni, "stdin": data.decode()}}) + "\\n")
if command == "VERSION":
    print(json.dumps({{"cniVersion": "1.1.0", "supportedVersions": {versions}}}))
elif os.path.exists(folder + "/fail"):
    print(open(folder + "/fail").read(), end="")
    sys.exit(1)
else:
    print('{{"did": "%s"}}' % command)
"""


class Runtime:
    """Calls the plugin as a container runtime does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.subnet_file, self.data, self.bin = folder / "subnet.env", folder / "data", folder / "bin"
        self.bin.mkdir()
        self.subnet_file.write_text(ENV)
        self.make_delegate("bridge")

    def make_delegate(self, name: str, versions: Sequence[str] = ("0.3.1", "1.0.0", "1.1.0")) -> None:
        """Install a delegate."""
        path = self.bin / name
        python = os.path.realpath(sys.executable)
        path.write_text(DELEGATE.format(python=python, folder=str(self.folder), versions=list(versions)))
        path.chmod(0o755)

    def conf(self, **keys: Any) -> dict[str, Any]:
        """Return the stock configuration with keys added."""
        return {
            "name": "cbr0",
            "cniVersion": "0.3.1",
            "type": "flannel",
            "subnetFile": str(self.subnet_file),
            "dataDir": str(self.data),
            "delegate": {"hairpinMode": True, "isDefaultGateway": True},
            **keys,
        }

    def call(self, command: str, conf: Any = None, **env: str | None) -> subprocess.CompletedProcess[bytes]:
        """Run the plugin; an `env` value of None unsets."""
        whole = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c1",
            "CNI_NETNS": "/proc/1/ns/net",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": f"/none:{self.bin}",
            **env,
        }
        data = conf if isinstance(conf, bytes) else json.dumps(self.conf() if conf is None else conf).encode()
        argv = [os.path.realpath(sys.executable), "-I", "-S", str(PLUGIN)]
        kept = {key: value for key, value in whole.items() if value is not None}
        return subprocess.run(argv, input=data, env=kept, capture_output=True, timeout=60, check=False)

    def ok(self, command: str, conf: Any = None, **env: str | None) -> bytes:
        """Call, and hold that it worked."""
        result = self.call(command, conf, **env)
        assert result.returncode == 0, result
        assert result.stderr == b""
        return result.stdout

    def fails(self, command: str, conf: Any = None, **env: str | None) -> dict[str, Any]:
        """Call, hold that it failed as CNI has it, and return the error."""
        result = self.call(command, conf, **env)
        assert result.returncode == 1, result
        assert result.stderr == b"", "no traceback"
        error: dict[str, Any] = json.loads(result.stdout)
        return error

    def calls(self) -> list[dict[str, Any]]:
        """Return what delegates were called with."""
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def given(self) -> dict[str, Any]:
        """Return the configuration that the last delegate got."""
        conf: dict[str, Any] = json.loads(self.calls()[-1]["stdin"])
        return conf


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(tmp_path)


# -- ADD ---------------------------------------------------------------------------------------------------------------


def test_add_hands_over_what_upstream_does(runtime: Runtime) -> None:
    assert runtime.ok("ADD", CNI_ARGS="A=1") == b'{"did": "ADD"}\n'
    call = runtime.calls()[0]
    assert call["stdin"].encode() == GOLDEN
    assert call["env"] == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/proc/1/ns/net",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": f"/none:{runtime.bin}",
        "CNI_ARGS": "A=1",
    }


def test_add_saves_before_it_hands_over(runtime: Runtime) -> None:
    (runtime.folder / "fail").write_text('{"code": 11, "msg": "no"}')
    assert runtime.fails("ADD") == {"code": 11, "msg": "no"}
    saved = runtime.data / "c1"
    assert saved.read_bytes() == GOLDEN
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert stat.S_IMODE(runtime.data.stat().st_mode) == 0o700
    assert [path.name for path in runtime.data.iterdir()] == ["c1"]


def test_dual_stack(runtime: Runtime) -> None:
    runtime.subnet_file.write_text(DUAL_ENV)
    runtime.ok("ADD")
    assert runtime.given()["ipam"] == {
        "type": "host-local",
        "ranges": [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:244:1::/64"}]],
        "routes": [{"dst": "10.244.0.0/16"}, {"dst": "fd00:10:244::/56"}],
    }
    assert runtime.given()["ipMasq"] is True


def test_what_the_user_says_wins(runtime: Runtime) -> None:
    runtime.make_delegate("macvlan")
    runtime.ok(
        "ADD",
        runtime.conf(
            delegate={"type": "macvlan", "mtu": 900, "ipMasq": True, "cniVersion": "0.1.0"},
            ipam={"type": "x", "dataDir": "/d", "ranges": [1], "routes": [{"dst": "10.0.0.0/8"}]},
            runtimeConfig={"mac": "x"},
            prevResult={},
            dns={},
        ),
    )
    assert runtime.given() == {
        "cniVersion": "0.3.1",
        "name": "cbr0",
        "type": "macvlan",
        "mtu": 900,
        "ipMasq": True,
        "runtimeConfig": {"mac": "x"},
        "ipam": {
            "type": "x",
            "dataDir": "/d",
            "ranges": [[{"subnet": "10.244.1.0/24"}]],
            "routes": [{"dst": "10.0.0.0/8"}, {"dst": "10.244.0.0/16"}],
        },
    }


def test_a_large_configuration_does_not_stick_in_a_pipe(runtime: Runtime) -> None:
    runtime.ok("ADD", runtime.conf(delegate={"x": "y" * 300000}))
    assert len(runtime.given()["x"]) == 300000


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({"delegate": {"type": 5}}, "'type' of 'delegate'"),
        ({"delegate": {"name": "x"}}, "'name'"),
        ({"delegate": {"ipam": {}}}, "'ipam'"),
        ({"delegate": []}, "'delegate' must be an object"),
        ({"ipam": []}, "'ipam' must be an object"),
        ({"ipam": {"routes": {}}}, "'routes'"),
        ({"delegate": {"type": "nothing"}}, "failed to delegate add"),
        ({"delegate": {"type": "../bin/bridge"}}, "failed to delegate add"),
        ({"subnetFile": ""}, "failed to load flannel 'subnet.env' file"),
        ({"dataDir": "/proc/none"}, "failed to save"),
    ],
)
def test_what_add_cannot_do(runtime: Runtime, keys: dict[str, Any], fragment: str) -> None:
    error = runtime.fails("ADD", runtime.conf(**keys))
    assert error["code"] == 999
    assert fragment in error["msg"]
    assert runtime.calls() == []


def test_add_without_subnet_env(runtime: Runtime) -> None:
    runtime.subnet_file.unlink()
    error = runtime.fails("ADD")
    assert error["code"] == 999
    assert error["cniVersion"] == "0.3.1"
    assert "failed to load flannel 'subnet.env' file" in error["msg"]
    assert "flannel pod" in error["msg"]
    assert not runtime.data.exists()


# -- subnet.env --------------------------------------------------------------------------------------------------------


def test_an_empty_subnet_env() -> None:
    every = "FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ"
    with pytest.raises(ValueError, match=f"missing {every}$"):
        parse_subnet_env("")


@pytest.mark.parametrize("line", ["FLANNEL_MTU", "FLANNEL_MT", "junk"])
def test_a_line_without_equals_sign_is_named(runtime: Runtime, line: str) -> None:
    runtime.subnet_file.write_text(ENV.replace("FLANNEL_MTU=1450", line))
    assert f"line 3, '{line}', has no '='" in runtime.fails("ADD")["msg"]


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("FLANNEL_NETWORK=10.1.2.3/16,10.2.0.0/16,10.1.0.0/16", "networks4", ["10.1.0.0/16", "10.2.0.0/16"]),
        ("FLANNEL_SUBNET=10.244.1.129/25", "subnet4", "10.244.1.128/25"),
        ("FLANNEL_MTU=4294967295", "mtu", 4294967295),
        ("FLANNEL_IPMASQ=True", "ip_masq", False),
        ("FLANNEL_IPMASQ= true", "ip_masq", False),
        ("OTHER=1\n\n# a comment\r", "mtu", 1450),
    ],
)
def test_values(line: str, key: str, value: Any) -> None:
    assert parse_subnet_env(f"{ENV}{line}\n")[key] == value


@pytest.mark.parametrize(
    "line",
    [
        *("FLANNEL_MTU=-1", "FLANNEL_MTU=4294967296", "FLANNEL_MTU= 1450", 'FLANNEL_MTU="1450"', "FLANNEL_MTU="),
        *("FLANNEL_SUBNET=10.244.1.1", "FLANNEL_SUBNET=10.244.1.1/33", "FLANNEL_SUBNET=", "FLANNEL_SUBNET=10.244.1/24"),
        *("FLANNEL_NETWORK=10.244.0.0/16, 10.2.0.0/16", "FLANNEL_IPV6_SUBNET=fd00::/129"),
    ],
)
def test_bad_values(line: str) -> None:
    with pytest.raises(ValueError, match=f"line 5, {line.partition('=')[0]}: "):
        parse_subnet_env(ENV + line)


@settings(max_examples=100, deadline=None)
@given(st.ip_addresses(), st.integers(0, 128))
def test_masked(address: Any, length: int) -> None:
    length = min(length, address.max_prefixlen)
    import ipaddress

    network = ipaddress.ip_network((address, length), strict=False)
    assert ipaddress.ip_network(masked(f"{address}/{length}")) == network


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_json_is_what_the_json_package_makes_of_it(value: Any) -> None:
    text = encode(value)
    assert text == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    assert decode(b" \n" + text + b"\t ") == value


@pytest.mark.parametrize("text", [b"", b" ", b"{", b"{}x", b"{} {}", b"NaN", b"\xff", b"[" * 100000, b'{"a":}', b"'a'"])
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which words is the json package's affair
        decode(text)


# -- DEL ---------------------------------------------------------------------------------------------------------------


def test_del_undoes_what_was_added_and_does_not_need_subnet_env(runtime: Runtime) -> None:
    runtime.ok("ADD")
    runtime.subnet_file.unlink()
    assert runtime.ok("DEL", runtime.conf(runtimeConfig={"x": 1}), CNI_NETNS=None) == b""
    call = runtime.calls()[-1]
    assert call["stdin"].encode() == GOLDEN
    assert call["env"]["CNI_COMMAND"] == "DEL"
    assert list(runtime.data.iterdir()) == []
    assert runtime.ok("DEL") == b""
    assert len(runtime.calls()) == 2, "a second DEL asks nobody"


def test_a_del_that_failed_can_be_repeated(runtime: Runtime) -> None:
    """Upstream forgets at once, and the address is leaked (F9)."""
    runtime.ok("ADD")
    (runtime.folder / "fail").write_text('{"code": 11, "msg": "busy", "details": "try later"}')
    assert runtime.fails("DEL") == {"cniVersion": "0.3.1", "code": 11, "msg": "busy", "details": "try later"}
    assert (runtime.data / "c1").read_bytes() == GOLDEN
    (runtime.folder / "fail").unlink()
    runtime.ok("DEL")
    assert [call["env"]["CNI_COMMAND"] for call in runtime.calls()] == ["ADD", "DEL", "DEL"]
    assert list(runtime.data.iterdir()) == []


def test_a_delegate_that_dies_without_a_word(runtime: Runtime) -> None:
    runtime.ok("ADD")
    (runtime.bin / "bridge").write_text("#!/bin/sh\necho oops\nkill -9 $$\n")
    error = runtime.fails("DEL")
    assert error["code"] == 999
    assert "failed to delegate del: bridge was killed by signal 9" in error["msg"]
    assert error["details"] == "oops\n"
    assert (runtime.data / "c1").exists()


def test_del_without_its_delegate(runtime: Runtime) -> None:
    runtime.ok("ADD")
    (runtime.bin / "bridge").unlink()
    assert "failed to find plugin 'bridge'" in runtime.fails("DEL")["msg"]
    assert (runtime.data / "c1").exists()


def test_del_of_a_broken_file(runtime: Runtime) -> None:
    runtime.data.mkdir()
    (runtime.data / "c1").write_text("{")
    result = runtime.call("DEL")
    assert result.returncode == 0
    assert b"is no configuration" in result.stderr
    assert (runtime.data / "c1").exists()


# -- CHECK, STATUS, GC -------------------------------------------------------------------------------------------------


def test_check(runtime: Runtime) -> None:
    conf = runtime.conf(cniVersion="1.0.0")
    missing = runtime.fails("CHECK", {**conf, "prevResult": {}})
    assert (missing["code"], "is missing" in missing["msg"]) == (999, True)
    runtime.ok("ADD", conf)
    assert runtime.fails("CHECK", conf)["code"] == 7
    previous = {"ips": [{"address": "10.244.1.2/24"}]}
    assert runtime.ok("CHECK", {**conf, "prevResult": previous}) == b'{"did": "CHECK"}\n'
    assert runtime.given() == {**json.loads(GOLDEN), "cniVersion": "1.0.0", "prevResult": previous}
    (runtime.folder / "fail").write_text('{"code": 100, "msg": "route is gone"}')
    assert runtime.fails("CHECK", {**conf, "prevResult": previous})["msg"] == "route is gone"


@pytest.mark.parametrize(("command", "version"), [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")])
def test_commands_younger_than_the_configuration(runtime: Runtime, command: str, version: str) -> None:
    error = runtime.fails(command, runtime.conf(cniVersion=version))
    assert (error["code"], error["msg"]) == (1, f"config version does not allow {command}")


def test_status(runtime: Runtime) -> None:
    conf = runtime.conf(cniVersion="1.1.0")
    assert runtime.ok("STATUS", conf, CNI_CONTAINERID=None, CNI_IFNAME=None, CNI_NETNS=None) == b'{"did": "STATUS"}\n'
    runtime.make_delegate("bridge", ["1.0.0"])
    assert runtime.ok("STATUS", conf) == b""
    assert runtime.calls()[-1]["env"]["CNI_COMMAND"] == "VERSION", "a delegate that does not know STATUS is not asked"
    (runtime.bin / "bridge").unlink()
    assert runtime.fails("STATUS", conf)["code"] == 50
    runtime.make_delegate("bridge")
    runtime.subnet_file.unlink()
    error = runtime.fails("STATUS", conf)
    assert (error["code"], "subnet.env" in error["msg"]) == (50, True)


def valid(*containers: str) -> dict[str, Any]:
    return {"cni.dev/valid-attachments": [{"containerID": one, "ifname": "eth0"} for one in containers]}


@pytest.mark.parametrize("knows", [True, False])
def test_gc(runtime: Runtime, knows: bool) -> None:
    if not knows:
        runtime.make_delegate("bridge", ["1.0.0"])
    conf = runtime.conf(cniVersion="1.1.0")
    for container in ("c1", "c2", "c3"):
        runtime.ok("ADD", conf, CNI_CONTAINERID=container)
    runtime.ok("ADD", {**conf, "name": "other"}, CNI_CONTAINERID="c4")
    (runtime.data / "c5").write_text("{")
    runtime.ok("GC", {**conf, **valid("c2")}, CNI_CONTAINERID=None, CNI_IFNAME=None, CNI_NETNS=None)
    assert sorted(path.name for path in runtime.data.iterdir()) == ["c2", "c4"]
    asked = [(call["env"]["CNI_COMMAND"], call["env"].get("CNI_CONTAINERID")) for call in runtime.calls()[4:]]
    assert asked == [("DEL", "c1"), ("DEL", "c3"), ("VERSION", None), *([("GC", None)] if knows else [])]
    if knows:
        assert runtime.given()["cni.dev/valid-attachments"] == valid("c2")["cni.dev/valid-attachments"]


def test_gc_keeps_what_it_could_not_delete(runtime: Runtime) -> None:
    conf = runtime.conf(cniVersion="1.1.0")
    runtime.ok("ADD", conf)
    runtime.make_delegate("bridge", ["1.0.0"])
    (runtime.folder / "fail").write_text('{"code": 11, "msg": "busy"}')
    assert "c1: busy" in runtime.fails("GC", {**conf, **valid()})["details"]
    assert (runtime.data / "c1").exists()
    assert runtime.fails("GC", conf)["code"] == 7, "without the list everything would seem stale"


# -- what any plugin is held to ----------------------------------------------------------------------------------------


def test_version(runtime: Runtime) -> None:
    answer = json.loads(runtime.ok("VERSION", b"", CNI_PATH=None, CNI_CONTAINERID=None, CNI_IFNAME=None))
    versions = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert answer == {"cniVersion": "1.1.0", "supportedVersions": versions}


def test_no_command(runtime: Runtime) -> None:
    result = runtime.call("x", CNI_COMMAND=None)
    assert (result.returncode, result.stdout) == (0, b"")
    assert result.stderr.startswith(b"CNI Plugin flannel version ")


@pytest.mark.parametrize(
    ("env", "code", "fragment"),
    [
        ({"CNI_NETNS": None, "CNI_IFNAME": ""}, 4, "[CNI_NETNS,CNI_IFNAME] missing"),
        ({"CNI_PATH": None}, 4, "[CNI_PATH] missing"),
        ({"CNI_COMMAND": "FLY"}, 4, "unknown CNI_COMMAND: FLY"),
        ({"CNI_CONTAINERID": "../x"}, 4, "containerID"),
        ({"CNI_CONTAINERID": ".x"}, 4, "containerID"),
        ({"CNI_CONTAINERID": "a/b"}, 4, "containerID"),
        ({"CNI_IFNAME": "a" * 16}, 4, "interface name"),
        ({"CNI_IFNAME": "a/b"}, 4, "interface name"),
        ({"CNI_IFNAME": "a:b"}, 4, "interface name"),
        ({"CNI_IFNAME": "a b"}, 4, "interface name"),
        ({"CNI_IFNAME": ".."}, 4, "interface name"),
    ],
)
def test_bad_environment(runtime: Runtime, env: dict[str, str | None], code: int, fragment: str) -> None:
    error = runtime.fails("ADD", **env)
    assert (error["code"], fragment in error["msg"]) == (code, True), error
    assert runtime.calls() == []


@pytest.mark.parametrize(
    ("data", "code", "fragment"),
    [
        (b"", 6, "unmarshall"),
        (b"{", 6, "unmarshall"),
        (b"[]", 6, "no object"),
        (b"{}", 7, "missing network name"),
        (b'{"name": "a/b"}', 7, "network name"),
        (b'{"name": "a", "cniVersion": "9.9.9"}', 1, "incompatible CNI versions"),
        (b'{"name": "a", "cniVersion": []}', 1, "incompatible CNI versions"),
        (b'{"name": "a", "dataDir": 7}', 6, "dataDir"),
    ],
)
def test_bad_configurations(runtime: Runtime, data: bytes, code: int, fragment: str) -> None:
    error = runtime.fails("ADD", data)
    assert (error["code"], fragment in error["msg"]) == (code, True), error


def test_it_imports_next_to_nothing(runtime: Runtime) -> None:
    (runtime.bin / "bridge").unlink()  # so that the plugin stays to the end
    env = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/x", "CNI_IFNAME": "e", "CNI_PATH": "/none"}
    python = [os.path.realpath(sys.executable), "-I", "-S", "-X", "importtime"]

    def imported(*argv: str) -> set[str]:
        conf = json.dumps(runtime.conf())
        result = subprocess.run(
            [*python, *argv], input=conf, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert "failed to find plugin" in result.stdout or "-c" in argv
        return {line.split("|")[2].strip() for line in result.stderr.splitlines()}

    ours = {"flannel", "flannel.cni", "flannel.cni.basics", "flannel.cni.delegate", "__future__", "_json", "_socket"}
    assert imported(str(PLUGIN)) - imported("-c", "import os") <= ours
