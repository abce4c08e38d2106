"""doctor: what it finds, what it says of it, and whether it leaves anything behind."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from testbed import cli, containers, doctor
from testbed.checks import implemented, load_catalogue
from testbed.errors import Exit, LabError
from testbed.flannelspec import BACKENDS
from testbed.guest import table
from testbed.guest.build import Kernel

ALL = tuple(BACKENDS)


def works(**but: str) -> dict[str, dict[str, object]]:
    """A probe's answer where everything works, but what is named, with that complaint."""
    names = doctor._FEATURES
    return {name: {"ok": name not in but, "detail": but.get(name, "")} for name in names}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """A machine that has everything; a test takes away what it is about."""
    answer = works()
    monkeypatch.setattr(doctor, "probe_features", lambda: answer)
    monkeypatch.setattr(doctor, "find_tool", lambda tool: f"/bin/{tool.program}")
    monkeypatch.setattr(doctor, "limits", list)
    monkeypatch.setattr(doctor, "policies", lambda _: [])
    monkeypatch.setattr(containers, "findings", lambda: ())
    return answer


def test_where_nothing_is_missing_every_backend_that_is_there_works(machine: dict[str, dict[str, object]]) -> None:
    found = doctor.diagnose()
    assert found.exit_code == Exit.HELD
    for run, backend in BACKENDS.items():
        assert (not found.reasons[run]) == backend.implemented
    assert all(finding.ok for finding in found.findings)


@pytest.mark.parametrize(
    ("feature", "stopped"),
    [
        ("user_namespace", ALL),
        ("veth", ALL),
        ("iptables_nft", ALL),
        ("vxlan", tuple(run for run, backend in BACKENDS.items() if backend.type == "vxlan")),
        ("tun", ("udp",)),
        ("ipip", ("ipip", "ipip_direct")),
        ("wireguard", ("wireguard",)),
        ("esp4", ("ipsec",)),
        ("netem", ()),
        ("br_netfilter", ()),
    ],
)
def test_a_feature_stops_the_runs_that_need_it(
    machine: dict[str, dict[str, object]], feature: str, stopped: tuple[str, ...]
) -> None:
    machine[feature] = {"ok": False, "detail": "Unknown device type."}
    found = doctor.diagnose()
    assert tuple(run for run, why in found.reasons.items() if any(feature in reason for reason in why)) == stopped
    assert (found.exit_code == Exit.LAB) == bool(set(stopped) & set(doctor.LAB_RUNS))
    finding = next(finding for finding in found.findings if finding.name == feature)
    assert finding.detail == "Unknown device type."
    assert finding.cure


def test_what_could_not_be_tried_is_not_taken_for_working(machine: dict[str, dict[str, object]]) -> None:
    machine.clear()
    machine["user_namespace"] = {"ok": False, "detail": "Operation not permitted"}
    found = doctor.diagnose()
    assert not any(finding.ok for finding in found.findings if finding.kind == "kernel")


def test_every_feature_that_a_backend_names_is_probed_for_it() -> None:
    from testbed import featureprobe

    for backend in BACKENDS.values():
        assert set(backend.kernel_features) <= set(featureprobe.FEATURES)
    tried = {*featureprobe.MOUNTS, *featureprobe.FEATURES, "user_namespace", "nested_user_namespace", "namespaces"}
    assert tried == set(doctor._FEATURES)


def tool(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    path.chmod(0o755)


def test_every_missing_tool_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"etcd", "conntrack", "bgpd"}
    monkeypatch.setattr(doctor, "find_tool", lambda tool: None if tool.program in gone else "/bin/x")
    with pytest.raises(LabError) as raised:
        doctor.require_tools()
    text = str(raised.value)
    assert all(name in text for name in gone)
    assert "apt-get install --no-install-recommends conntrack etcd-server frr" in text


def test_what_one_run_needs_is_missed_by_that_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_tool", lambda tool: None if tool.runs else "/bin/x")
    doctor.require_tools()
    doctor.require_tools("vxlan", "host_gw")
    with pytest.raises(LabError, match=r"lacks wg\n.* wireguard-tools$"):
        doctor.require_tools("vxlan", "wireguard")
    with pytest.raises(LabError, match=r"lacks charon\n.* charon-systemd$"):
        doctor.require_tools("ipsec")


def test_any_of_a_program_s_names_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "search_path", lambda: str(tmp_path))
    charon = doctor.Tool("charon", "charon-systemd", others=("charon-systemd",))
    assert doctor.find_tool(charon) is None
    tool(tmp_path, "charon-systemd")
    assert doctor.find_tool(charon) == str(tmp_path / "charon-systemd")
    tool(tmp_path, "charon")
    assert doctor.find_tool(charon) == str(tmp_path / "charon")


def test_a_missing_optional_tool_stops_nothing(
    machine: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_tool", lambda tool: None if tool.program == "docker" else "/bin/x")
    doctor.require_tools()
    found = doctor.diagnose()
    assert found.exit_code == Exit.HELD
    assert [finding.name for finding in found.findings if not finding.ok] == ["docker"]


def test_tools_of_the_system_are_found_without_its_folders_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(doctor, "SYSTEM_FOLDERS", (str(tmp_path / "sbin"),))
    tool(tmp_path / "sbin", "nft")
    assert doctor.find_tool(doctor.Tool("nft", "nftables")) == str(tmp_path / "sbin/nft")


def test_the_bridge_plugin_is_not_the_bridge_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    tool(tmp_path / "bin", "bridge")
    plugin = doctor.Tool("bridge", "containernetworking-plugins", (str(tmp_path / "cni"),))
    assert doctor.find_tool(plugin) is None
    tool(tmp_path / "cni", "bridge")
    assert doctor.find_tool(plugin) == str(tmp_path / "cni/bridge")


def sysctl(root: Path, name: str, value: int) -> None:
    path = root / "proc/sys" / name.replace(".", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


@pytest.mark.parametrize(("value", "ok"), [(0, False), (7, False), (8, True), (96365, True)])
def test_a_limit_that_is_too_low_is_told_with_its_cure(tmp_path: Path, value: int, ok: bool) -> None:
    sysctl(tmp_path, "user.max_user_namespaces", value)
    [finding] = doctor.limits(tmp_path)
    assert finding.ok == ok
    assert ("sysctl -w user.max_user_namespaces=" in finding.cure) == (not ok)
    assert finding.needed_by == ALL


@pytest.mark.parametrize(
    ("name", "refused"),
    [("kernel.apparmor_restrict_unprivileged_userns", 1), ("kernel.unprivileged_userns_clone", 0)],
)
def test_a_policy_binds_ordinary_users_only(tmp_path: Path, name: str, refused: int) -> None:
    sysctl(tmp_path, name, refused)
    [ordinary] = doctor.policies(1000, tmp_path)
    assert not ordinary.ok
    assert f"sysctl -w {name}={1 - refused}" in ordinary.cure
    assert "or run as root" in ordinary.cost
    assert doctor.policies(0, tmp_path)[0].ok
    sysctl(tmp_path, name, 1 - refused)
    assert doctor.policies(1000, tmp_path)[0].ok


def test_json_has_the_promised_shape(machine: dict[str, dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    machine["vxlan"] = {"ok": False, "detail": "Unknown device type."}
    assert cli.invoke(["doctor", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == 1
    assert answer["exit"] == 2
    runs = {run["name"]: run for run in answer["runs"]}
    assert set(runs) == set(BACKENDS)
    assert runs["vxlan"].pop("rows")["host"] == []
    assert runs["vxlan"] == {"name": "vxlan", "works": False, "reasons": ["kernel lacks vxlan"]}
    assert runs["udp"]["works"]


def test_the_table_tells_what_is_missing_and_nothing_else(
    machine: dict[str, dict[str, object]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    machine["tun"] = {"ok": False, "detail": "Permission denied"}
    cli.invoke(["doctor"])
    text, _, features = capsys.readouterr().out.partition("kernel feature")
    assert "hash_policy" in features, "the feature table has them all"
    assert "Permission denied" in text
    assert "chmod 0666 /dev/net/tun" in text
    assert "hash_policy" not in text


def test_the_probe_leaves_nothing_in_the_host_s_network() -> None:
    def links() -> set[Path]:
        return set(Path("/sys/class/net").iterdir())

    before = links()
    found = doctor.probe_features()
    assert links() == before
    if not found["user_namespace"]["ok"]:
        pytest.skip(f"no user namespaces here: {found['user_namespace']['detail']}")
    assert set(found) == set(doctor._FEATURES)
    assert found["veth"]["ok"], found["veth"]["detail"]


def test_the_probe_tells_what_cannot_be_made() -> None:
    """With no namespace to be had, as where a container forbids it, the probe says so and gives up."""
    program = Path(doctor.__file__).with_name("featureprobe.py")
    code = (
        f"import runpy, json; m = runpy.run_path({str(program)!r})\n"
        "def refuse(): raise PermissionError(1, 'Operation not permitted')\n"
        "m['probe'].__globals__['_new_user_namespace'] = refuse\n"
        "print(json.dumps(m['probe']()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"user_namespace": {"ok": False, "detail": "Operation not permitted"}}


def outlook(monkeypatch: pytest.MonkeyPatch, kernel: Kernel | None) -> table.Guest:
    monkeypatch.setattr(table, "ready_kernel", lambda: kernel)
    return table.guest()


def checked(found: doctor.Diagnosis, there: table.Guest) -> dict[str, table.RunRows]:
    return {entry.run: entry for entry in table.rows(found, there)}


def test_what_the_host_lacks_the_guest_has_and_its_rows_with_it(
    machine: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["wireguard"] = {"ok": False, "detail": "Unknown device type."}
    there = outlook(monkeypatch, Kernel(Path("/k"), "7.3", "built"))
    found = doctor.diagnose()
    features = {feature.name: feature for feature in table.features(found, there)}
    assert (features["wireguard"].host, features["wireguard"].guest) == (False, True)
    assert features["wireguard"].needed_by == ("wireguard",)
    runs = checked(found, there)
    assert runs["wireguard"].host == ()
    assert "WG-01" in runs["wireguard"].guest
    assert runs["vxlan"].host == runs["vxlan"].guest
    assert "WG-01" not in runs["vxlan"].guest


def test_a_row_that_needs_a_feature_itself_is_counted_where_that_is(
    machine: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    needing = {row.id for row in load_catalogue().values() if row.needs == "netem" and row.id in implemented()}
    assert needing, "there is such a row"
    machine["netem"] = {"ok": False, "detail": "Specified qdisc kind is unknown."}
    there = outlook(monkeypatch, Kernel(Path("/k"), "7.3", "built"))
    vxlan = checked(doctor.diagnose(), there)["vxlan"]
    assert set(vxlan.guest) - set(vxlan.host) == needing
    machine["netem"] = {"ok": True, "detail": ""}
    vxlan = checked(doctor.diagnose(), there)["vxlan"]
    assert vxlan.guest == vxlan.host


def test_a_guest_that_lacks_something_is_told_so(
    machine: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = outlook(monkeypatch, Kernel(Path("/k"), "6.1", "packaged", lacks=("wireguard", "nftables")))
    runs = checked(doctor.diagnose(), there)
    assert runs["wireguard"].guest == ()
    assert runs["wireguard"].host
    assert runs["ipip"].guest


def test_a_guest_that_is_not_there_is_told_as_what_it_will_have_and_nothing_is_built(
    machine: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from testbed.guest import kernels

    for way in kernels.WAYS:
        monkeypatch.setitem(kernels.WAYS, way, lambda _: pytest.fail("it built something"))
    there = outlook(monkeypatch, None)
    assert not there.ready
    assert there.features >= set(doctor._FEATURES)
    assert cli.invoke(["doctor"]) == 0
    assert "when built" in capsys.readouterr().out
    assert cli.invoke(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["guest"] is None
    assert not told["guest_ready"]
    wireguard = next(run for run in told["runs"] if run["name"] == "wireguard")
    assert "WG-01" in wireguard["rows"]["guest"]


def test_a_missing_tool_stops_the_guest_s_runs_too(
    machine: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_tool", lambda tool: None if tool.program == "etcd" else "/bin/x")
    there = outlook(monkeypatch, Kernel(Path("/k"), "7.3", "built"))
    assert all(entry.host == entry.guest == () for entry in table.rows(doctor.diagnose(), there))


def test_on_arm64_the_one_guest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    there = outlook(monkeypatch, None)
    assert "QEMU" in there.words
    assert "kernel build" not in there.words, "which cannot be there"
    there = outlook(monkeypatch, Kernel(Path("/k"), "6.1", "qemu"))
    assert "slow" in there.words
