"""DEL, CHECK, STATUS, GC, and what any plugin is held to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from flannel.cni import plugin
from tests.flannel.cnilab import GOLDEN, PLUGIN, Runtime


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


@pytest.mark.parametrize("left", ["", "{", "[]"])
def test_del_of_a_broken_file(runtime: Runtime, left: str) -> None:
    """Such as a loss of power leaves: the address is given back by the configuration of today."""
    runtime.data.mkdir()
    (runtime.data / "c1").write_text(left)
    (runtime.folder / "fail").write_text('{"code": 11, "msg": "busy"}')
    assert runtime.call("DEL").returncode == 1
    assert (runtime.data / "c1").exists(), "it can be tried again"
    (runtime.folder / "fail").unlink()
    result = runtime.call("DEL")
    assert result.returncode == 0
    assert b"is no configuration" in result.stderr
    call = runtime.calls()[-1]
    assert (call["env"]["CNI_COMMAND"], call["stdin"].encode()) == ("DEL", GOLDEN)
    assert list(runtime.data.iterdir()) == []


def test_del_of_a_broken_file_without_subnet_env(runtime: Runtime) -> None:
    runtime.data.mkdir()
    (runtime.data / "c1").write_text("{")
    runtime.subnet_file.unlink()
    result = runtime.call("DEL")
    assert result.returncode == 0
    assert b"nothing can be deleted by it" in result.stderr
    assert not (runtime.folder / "calls").exists()
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
        assert "failed to find plugin" in result.stdout or argv[-1] == "pass"
        return {line.split("|")[2].strip() for line in result.stderr.splitlines()}

    lib = str(PLUGIN.parent.parent.parent)
    installed = f"import sys; sys.path.insert(0, {lib!r}); from flannel.cni.plugin import main; sys.exit(main())"
    own = {"flannel", *(f"flannel.cni{one}" for one in ("", ".basics", ".delegate", ".plugin", ".system"))}
    assert imported("-c", installed) - imported("-c", "pass") <= {*own, "__future__", "_json", "_socket"}


def test_what_nobody_foresaw_is_an_error_of_cni_s_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(conf: dict[str, Any]) -> None:
        raise ZeroDivisionError("geheim")

    monkeypatch.setitem(plugin.COMMANDS, "STATUS", broken)
    monkeypatch.setattr(plugin, "read_all", lambda fd: b'{"cniVersion":"1.1.0","name":"x","type":"flannel"}')
    monkeypatch.setenv("CNI_COMMAND", "STATUS")
    monkeypatch.setenv("CNI_PATH", "/none")
    assert plugin.main() == 1
    out, err = capfd.readouterr()
    error = json.loads(out)
    assert (error["code"], err) == (999, "")
    assert "STATUS failed: unexpected ZeroDivisionError at test_commands.py:" in error["msg"]
    assert "geheim" not in out
