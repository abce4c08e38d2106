"""What is written for other tools: golden files, invariants over all backends and topologies, quoting, writing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from testbed import rendered, templates
from testbed.commands.render import render as render_command
from testbed.commands.render import write_files
from testbed.errors import InputError, LabError
from testbed.flannelbuild import default_flannel
from testbed.flannelspec import BACKENDS, FlannelSpec
from testbed.manifest import parse_manifest, read_manifest
from testbed.model import LabSpec, Role
from testbed.render import CLAB, CLAB_KIND, FLANNEL, KIND, WORKLOADS, cluster_name, kind_nodes, render_all, render_frr
from testbed.targets import render_target
from testbed.topology import load_topology

TESTS = Path(__file__).resolve().parent.parent
GOLDEN = TESTS / "golden" / "render"
TOPOLOGIES = ("racks", "flat", "clos")


def seeds_vxlan() -> FlannelSpec:
    return read_manifest(str(TESTS / "data" / "s0-vxlan-direct.yml"), "vxlan_direct")


GOLDENS = {
    "racks-s0-vxlan-direct": ("racks", seeds_vxlan, {}),
    "faulty-vrf-vxlan": (str(TESTS / "data" / "faulty-vrf.yml"), lambda: default_flannel("vxlan"), {}),
    "flat-host-gw": ("flat", lambda: default_flannel("host_gw"), {}),
    "clos-udp": ("clos", lambda: default_flannel("udp", net_conf_overrides={"Port": "8282"}), {"racks": "3"}),
    "racks-dual-stack-nftables": ("racks", lambda: default_flannel("dual_stack", rules="nftables"), {}),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str) -> None:
    """TESTBED_UPDATE_GOLDEN=1 writes the files anew; read the difference before it is committed."""
    topology, flannel, options = GOLDENS[name]
    files = render_target(load_topology(topology, "golden1", overrides=options), flannel())
    folder = GOLDEN / name
    if os.environ.get("TESTBED_UPDATE_GOLDEN"):
        write_files(folder, files)
    kept = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert sorted(kept) == sorted(files)
    for path, text in files.items():
        assert text == kept[path], f"{name}/{path} has changed"


@pytest.fixture(scope="module", params=[(b, t) for b in BACKENDS for t in TOPOLOGIES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> tuple[LabSpec, FlannelSpec, Mapping[str, str]]:
    run, topology = request.param
    lab, flannel = load_topology(topology, f"{run.replace('_', '-')}-1a2b"), default_flannel(run)
    return lab, flannel, render_all(lab, flannel)


Case = tuple[LabSpec, FlannelSpec, Mapping[str, str]]


def documents(text: str) -> list[Any]:
    return [document for document in yaml.safe_load_all(text) if document is not None]


def test_every_file_is_yaml_and_nothing_is_left_of_a_template(case: Case) -> None:
    for path, text in case[2].items():
        assert "{{" not in text, path
        assert "{%" not in text, path
        assert text.endswith("\n"), path
        if path.endswith(".yml"):
            assert documents(text), path


def test_containerlab_has_every_machine_and_every_cable(case: Case) -> None:
    lab, _, files = case
    topology = documents(files[CLAB])[0]["topology"]
    assert sorted(topology["nodes"]) == sorted(node.name for node in lab.nodes)
    ends = {
        (e["node"], e["interface"]): (e["mac"], link["mtu"]) for link in topology["links"] for e in link["endpoints"]
    }
    wanted = {(n.name, i.name): (i.mac, i.mtu) for n in lab.nodes for i in n.ifaces}
    assert ends == wanted
    assert all((node.name, "eth0") in ends for node in lab.cluster_nodes)


def test_containerlab_makes_no_network_of_its_own_and_restarts_nothing(case: Case) -> None:
    for file in (CLAB, CLAB_KIND):
        content = documents(case[2][file])[0]
        assert sorted(content) == ["mgmt", "name", "topology"]
        assert content["mgmt"]["skip-when-unused"] is True
        assert content["topology"]["defaults"] == {"network-mode": "none"}
        for group in content["topology"]["groups"].values():
            assert group["restart-policy"] == "no"
            assert "network-mode" not in group
        for node in content["topology"]["nodes"].values():
            assert set(node) <= {"group", "kind"}


def test_containerlab_routers_balance_by_port_and_mount_what_is_rendered(case: Case) -> None:
    lab, _, files = case
    router = documents(files[CLAB])[0]["topology"]["groups"]["router"]
    assert router["sysctls"]["net.ipv4.fib_multipath_hash_policy"] == 1
    assert router["sysctls"]["net.ipv4.ip_forward"] == 1
    for bind in router["binds"]:
        for node in (n for n in lab.nodes if n.routes):
            assert bind.split(":")[0].replace("__clabNodeName__", node.name) in files


def test_kind_nodes_hang_on_the_fabric_by_their_second_interface(case: Case) -> None:
    lab, _, files = case
    topology = documents(files[CLAB_KIND])[0]["topology"]
    called = kind_nodes(lab)
    outer = {name for name, node in topology["nodes"].items() if node.get("kind") == "ext-container"}
    assert outer == set(called.values())
    found = {(e["node"], e["interface"]) for link in topology["links"] for e in link["endpoints"] if e["node"] in outer}
    assert found == {(name, "eth1") for name in called.values()}


def test_kind_has_no_cni_and_flannels_network(case: Case) -> None:
    lab, flannel, files = case
    config = documents(files[KIND])[0]
    networking = config["networking"]
    assert networking["disableDefaultCNI"] is True
    networks = networking["podSubnet"].split(",")
    assert networks[0] == flannel.net_conf["Network"]
    assert (networking["ipFamily"], len(networks)) == (("dual", 2) if flannel.network6 else ("ipv4", 1))
    assert config["name"] == cluster_name(lab)
    assert [node["role"] for node in config["nodes"]] == ["control-plane"] + ["worker"] * (len(lab.cluster_nodes) - 1)


def test_kind_patches_give_addresses_as_a_map_without_a_version(case: Case) -> None:
    lab, _, files = case
    for position, (name, node) in enumerate(zip(kind_nodes(lab), documents(files[KIND])[0]["nodes"], strict=True)):
        [patch] = [yaml.safe_load(text) for text in node["kubeadmConfigPatches"]]
        assert patch["kind"] == ("JoinConfiguration" if position else "InitConfiguration")
        assert "apiVersion" not in patch
        assert patch["nodeRegistration"]["kubeletExtraArgs"]["node-ip"] == str(lab.node(name).ip)
        assert {mount["containerPath"] for mount in node["extraMounts"]} >= {"/opt/cni/bin"}


def container_of(files: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    [daemon] = [d for d in documents(files[FLANNEL]) if d["kind"] == "DaemonSet"]
    pod = daemon["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def test_flannels_manifest_is_one_a_cluster_takes(case: Case) -> None:
    _, flannel, files = case
    objects = {d["kind"]: d for d in documents(files[FLANNEL])}
    assert objects["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    namespace = objects["Namespace"]["metadata"]["name"]
    assert {objects[k]["metadata"]["namespace"] for k in ("ServiceAccount", "ConfigMap", "DaemonSet")} == {namespace}
    assert objects["ClusterRoleBinding"]["subjects"][0]["namespace"] == namespace
    rules = {(rule["resources"][0], verb) for rule in objects["ClusterRole"]["rules"] for verb in rule["verbs"]}
    assert rules == {
        ("pods", "get"), ("nodes", "get"), ("nodes", "list"), ("nodes", "watch"), ("nodes/status", "patch")
    }  # fmt: skip
    pod, container = container_of(files)
    assert (pod["hostNetwork"], pod["priorityClassName"]) == (True, "system-node-critical")
    assert pod["tolerations"] == [{"operator": "Exists", "effect": "NoSchedule"}]
    assert container["args"] == ["--ip-masq", "--healthz-port=8081", "--kube-subnet-mgr", "--iface=eth1"]
    assert json.loads(objects["ConfigMap"]["data"]["net-conf.json"]) == flannel.net_conf
    mounts = {mount["name"] for c in [container, *pod["initContainers"]] for mount in c["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_only_udp_is_privileged_and_has_the_tun_device(case: Case) -> None:
    _, flannel, files = case
    _, container = container_of(files)
    security, udp = container["securityContext"], flannel.backend.type == "udp"
    assert security["privileged"] is udp
    assert ("capabilities" in security) is not udp
    mounted = "/dev/net/tun" in {mount["mountPath"] for mount in container["volumeMounts"]}
    in_kind = "/dev/net/tun" in {m["containerPath"] for m in documents(files[KIND])[0]["nodes"][0]["extraMounts"]}
    assert (mounted, in_kind) == (udp, udp)


def test_the_rendered_manifest_reads_as_a_users_own(case: Case) -> None:
    _, flannel, files = case
    again = parse_manifest(files[FLANNEL], "m.yml", flannel.backend.run)
    same = ("backend", "network", "net_conf", "cni_conf", "args", "env", "rules")
    assert [getattr(again, name) for name in same] == [getattr(flannel, name) for name in same]


def test_workloads_are_the_seeds(case: Case) -> None:
    lab, _, files = case
    daemon, service, client = documents(files[WORKLOADS])
    assert (daemon["metadata"]["name"], client["metadata"]["name"]) == ("testappds", "client")
    assert service["spec"]["ports"] == [{"port": 8080, "nodePort": 30080, "protocol": "TCP", "targetPort": 80}]
    assert service["spec"]["selector"] == daemon["spec"]["template"]["metadata"]["labels"]
    assert client["spec"]["nodeSelector"]["kubernetes.io/hostname"] == kind_nodes(lab)["worker1"]


def test_routers_speak_unnumbered_and_one_end_waits(case: Case) -> None:
    lab = case[0]
    for node in (n for n in lab.nodes if n.routes):
        text = render_frr(node, lab)["frr.conf"]
        lines = [line.strip() for line in text.splitlines()]
        ports = [i.name for i in node.ifaces if i.bridge is None]
        assert [line.split()[1] for line in lines if line.endswith("interface peer-group FABRIC")] == ports
        waiting = {line.split()[1] for line in lines if line.endswith(" passive")}
        wanted = {p for p in ports if node.role is Role.SPINE or (node.role is Role.LEAF and p.startswith("out"))}
        assert waiting == wanted
        assert f"network {node.loopback}" in lines
        rack = node.bridge_address
        assert (rack is None) or f"network {rack.network}" in lines
        assert f"router bgp {node.asn}" in lines


def test_no_link_has_both_ends_waiting_and_none_both_eager() -> None:
    """A session that both ends open collides; one that neither opens never comes up."""
    for topology in TOPOLOGIES:
        lab = load_topology(topology, "t1")
        passive = {
            (node.name, line.split()[1])
            for node in lab.nodes
            if node.routes
            for line in render_frr(node, lab)["frr.conf"].splitlines()
            if line.endswith(" passive")
        }
        for link in lab.links:
            if lab.node(link.a.node).routes and lab.node(link.b.node).routes:
                assert len(passive & {(e.node, e.iface) for e in (link.a, link.b)}) == 1, link.name


def test_a_node_that_does_not_route_has_no_frr() -> None:
    lab = load_topology("racks", "t1")
    with pytest.raises(ValueError, match="worker1 does not route"):
        render_frr(lab.node("worker1"), lab)


def test_names_of_two_labs_never_meet() -> None:
    names = {cluster_name(load_topology("flat", lab_id)) for lab_id in ("a-b", "ab", "a_b", "a.b")}
    assert len(names) == 4
    long = load_topology("flat", "x" * 48)
    assert max(map(len, kind_nodes(long).values())) <= 50


def test_what_a_template_says_wrongly_is_found() -> None:
    lab, flannel = load_topology("racks", "t1"), default_flannel("vxlan")
    files = render_all(lab, flannel)
    clab, kind, manifest = files[CLAB], files[KIND], files[FLANNEL]
    broken: list[tuple[str, Any]] = [
        ("mtu", lambda: rendered.check_clab(clab.replace("mtu: 9150", "mtu: 1500", 1), lab, {}, "eth0")),
        ("mac", lambda: rendered.check_clab(clab.replace('mac: "02', 'mac: "06', 1), lab, {}, "eth0")),
        ("node", lambda: rendered.check_clab(clab.replace('"worker3": {', '"worker4": {', 1), lab, {}, "eth0")),
        ("restart", lambda: rendered.check_clab(clab.replace('restart-policy: "no"', "memory: 1mib"), lab, {}, "eth0")),
        ("unquoted no", lambda: rendered.check_clab(clab.replace('y: "no"', "y: no"), lab, {}, "eth0")),
        ("podSubnet", lambda: rendered.check_kind(kind.replace("10.244", "10.245"), lab, flannel, [*kind_nodes(lab)])),
        ("node-ip", lambda: rendered.check_kind(kind.replace(".0.12", ".0.13"), lab, flannel, [*kind_nodes(lab)])),
        ("cni", lambda: rendered.check_kind(kind.replace("CNI: true", "CNI: false"), lab, flannel, [*kind_nodes(lab)])),
        ("net-conf", lambda: rendered.check_flannel(manifest.replace("10.244", "10.245"), flannel, "kube-flannel")),
        ("args", lambda: rendered.check_flannel(manifest.replace('"--ip-masq"', "-v=1"), flannel, "kube-flannel")),
        ("env", lambda: rendered.check_flannel(manifest.replace('"5000"', '"1"'), flannel, "kube-flannel")),
        ("namespace", lambda: rendered.check_flannel(manifest, flannel, "kube-system")),
        ("yaml", lambda: rendered.check_yaml("a: [")),
    ]
    unnoticed = []
    for what, check in broken:
        with contextlib.suppress(LabError):
            check()
            unnoticed.append(what)
    assert unnoticed == []


def test_a_name_that_yaml_would_take_for_something_else_stays_a_name(tmp_path: Path) -> None:
    path = tmp_path / "odd.yml"
    path.write_text(
        "mtu: 1500\nspines: 1\noutside: 203.0.113.8\nracks:\n"
        "  - {leaf: y, subnet: 10.1.0.0/24, nodes: [no, null, true, on, e1]}\n"
    )
    with pytest.raises(InputError):  # null and true are not text; said, not guessed
        load_topology(str(path), "t1")
    path.write_text(path.read_text().replace("null, true", "n, off"))
    lab = load_topology(str(path), "t1")
    files = render_all(lab, default_flannel("vxlan"))
    assert set(documents(files[CLAB])[0]["topology"]["nodes"]) == {node.name for node in lab.nodes}


@given(st.text() | st.integers() | st.booleans() | st.none() | st.lists(st.text()))
def test_quoting_survives_yaml(value: object) -> None:
    def without_surrogates(item: object) -> bool:
        return not isinstance(item, str) or item.isprintable() or all(not 0xD800 <= ord(c) <= 0xDFFF for c in item)

    if all(map(without_surrogates, value if isinstance(value, list) else [value])):
        assert yaml.safe_load(f"key: {templates.quoted(value)}\n") == {"key": value}
        assert yaml.safe_load(f"{{key: [{templates.quoted(value)}]}}") == {"key": [value]}


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=10) | st.integers(), max_size=4))
def test_json_in_a_block_survives_yaml(value: dict[str, object]) -> None:
    text = f"data:\n  x.json: |\n    {templates.json_block(value, 4)}\n  y: 1\n"
    document = yaml.safe_load(text)
    assert json.loads(document["data"]["x.json"]) == value
    assert document["data"]["y"] == 1


@pytest.mark.parametrize("value", ["a b", "a\nb", "", "-x", "a;b", "a#b", '"a"', "ä"])
def test_a_word_is_one_word(value: str) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        templates.word(value)


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        templates.render("manifests", "workloads.yml.j2")


def test_flannel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"overlaps the addresses"):
        render_all(load_topology("racks", "t1"), default_flannel("vxlan", net_conf_overrides={"Network": "10.0.0.0/8"}))


def test_the_command_writes_and_tells(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ["--backend", "vxlan-direct", "-o", str(folder), "--net-conf", "VNI=7", "--json"]
    result = CliRunner().invoke(render_command, arguments, catch_exceptions=False)
    told = json.loads(result.stdout)
    assert told["schema"] == 1
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == told["files"]
    assert '"VNI": 7' in (folder / FLANNEL).read_text()


def test_the_command_takes_a_manifest(tmp_path: Path) -> None:
    manifest = TESTS / "data" / "s0-udp.yml"
    arguments = ["--backend", "udp", "--manifest", str(manifest), "-o", str(tmp_path)]
    CliRunner().invoke(render_command, arguments, catch_exceptions=False)
    assert read_manifest(str(tmp_path / FLANNEL), "udp").port == 8282


@pytest.mark.parametrize(
    "arguments", [["--net-conf", "VNI"], ["--topology", "nope"], ["--backend", "nope"], ["--rules", "ipfw"]]
)
def test_the_command_refuses(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(InputError):
        CliRunner().invoke(render_command, ["-o", str(tmp_path / "o"), *arguments], catch_exceptions=False)
    assert not (tmp_path / "o").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_files(tmp_path / "file", {"a": ""})
    with pytest.raises(InputError, match="no path"):
        write_files(tmp_path / "a\0b", {"a": ""})
    with pytest.raises(InputError, match="cannot write: No space left"):
        write_full(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def write_full(folder: Path) -> None:
    """A full disk: the text cannot be written where the file could be made."""

    real = os.fdopen

    def full(number: int, *args: Any, **kwargs: Any) -> Any:
        os.close(number)
        return real(os.open("/dev/full", os.O_WRONLY), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        write_files(folder, {"x": "text"})
