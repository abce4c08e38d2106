"""Users' own manifests: what they decide, and that whatever is wrong with one is told with its line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import Exit, Fault, InputError
from testbed.flannelspec import FlannelSpec
from testbed.manifest import parse_manifest, read_manifest
from testbed.nodes.deploy import describe_lab
from testbed.options import RunOptions

DATA = Path(__file__).resolve().parent.parent / "data"
VXLAN = (DATA / "s0-vxlan-direct.yml").read_text()


def faults_of(text: str, run: str = "vxlan_direct", **options: Any) -> list[Fault]:
    with pytest.raises(InputError) as error:
        parse_manifest(text, "m.yml", run, **options)
    assert error.value.exit_code == Exit.INPUT
    return list(error.value.faults)


def changed(old: str, new: str) -> str:
    assert old in VXLAN
    return VXLAN.replace(old, new, 1)


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


@pytest.mark.parametrize(
    ("file", "run", "device", "port"),
    [
        ("s0-vxlan-direct", "vxlan_direct", "flannel.4000", 4789),
        ("s0-vxlan-direct", "vxlan-direct", "flannel.4000", 4789),
        ("s0-ipip-direct", "ipip_direct", "flannel.ipip", None),
        ("s0-udp", "udp", "flannel0", 8282),
        ("s1-udp", "udp", "flannel0", 8285),
        ("s3-ipip", "ipip", "flannel.ipip", None),
    ],
)
def test_the_seeds_manifests_as_they_stand(file: str, run: str, device: str, port: int | None) -> None:
    path = DATA / f"{file}.yml"
    flannel = read_manifest(str(path), run)
    assert (flannel.tunnel_device, flannel.port, str(flannel.network)) == (device, port, "10.244.0.0/16")
    assert (flannel.args, flannel.env) == (("--ip-masq",), {"EVENT_QUEUE_DEPTH": "5000"})
    assert flannel.ip_masq
    assert flannel.source == str(path)
    assert [plugin["type"] for plugin in flannel.cni_conf["plugins"]] == ["flannel", "portmap"]
    assert flannel.notes == ("--kube-subnet-mgr replaced: the lab has a store of its own, etcd",)


def test_the_first_seeds_vxlan_has_its_vni_port_and_direct_routes() -> None:
    flannel = read_manifest(str(DATA / "s0-vxlan-direct.yml"), "vxlan_direct")
    assert (flannel.vni, flannel.port, flannel.direct, flannel.mtu_of(9150)) == (4000, 4789, True, 9100)


@pytest.mark.parametrize(
    ("file", "run", "right"),
    [
        ("s0-vxlan-direct", "vxlan", "vxlan_direct"),
        ("s0-udp", "vxlan", "udp"),
        ("s3-ipip", "ipip_direct", "ipip"),
        ("s1-udp", "host_gw", "udp"),
    ],
)
def test_a_manifest_of_another_backend_is_refused_with_that_reason(file: str, run: str, right: str) -> None:
    path = DATA / f"{file}.yml"
    with pytest.raises(InputError) as error:
        read_manifest(str(path), run)
    [fault] = error.value.faults
    assert f"(run {right})" in fault.what
    assert fault.what.endswith(f"(run {run})")
    assert fault.hint == f"./run {right} -- --manifest {path}"
    assert fault.line == line_of(path.read_text(), '"Backend"')


def test_comments_in_json_are_found_on_their_line() -> None:
    text = (DATA / "s4-configmap.yml").read_text()
    faults = faults_of(text, "vxlan")
    assert (line_of(text, '"Type": "vxlan", #'), "JSON has no comments") in [(f.line, f.hint) for f in faults]
    assert any("no DaemonSet" in fault.what for fault in faults)


def test_a_fragment_is_no_manifest() -> None:
    [fault] = faults_of((DATA / "s2-net-conf.yml").read_text(), "host_gw")
    assert (fault.key, fault.what) == ("kind", "missing")


def test_a_comment_in_the_second_seeds_net_conf() -> None:
    text = changed('"Type": "vxlan",', '"Type": "vxlan" // <- here')
    [fault] = faults_of(text)
    assert (fault.line, fault.key) == (line_of(text, "// <- here"), "net-conf.json")
    assert fault.what.startswith("not JSON")
    assert fault.hint == "JSON has no comments"


def test_what_is_missing_is_on_the_line_of_what_should_hold_it() -> None:
    text = changed('"Type": "vxlan",', "")
    [fault] = faults_of(text)
    assert (fault.line, fault.key) == (line_of(text, '"Backend"'), "net-conf.json: Backend.Type")


def test_every_fault_at_once() -> None:
    text = changed('"VNI": 4000,', '"VNI": "4000",').replace('"name": "cbr0",', "")
    text = text.replace("- --ip-masq", "- --ip-mask").replace('value: "5000"', "value: 5000")
    found = {(f.line, f.what) for f in faults_of(text)}
    assert found == {
        (line_of(text, '"VNI"'), "'4000' is not a number from 1 to 16777215"),
        (line_of(text, "cni-conf.json: |") + 1, "missing"),
        (line_of(text, "- --ip-mask"), "flanneld has no flag --ip-mask"),
        (line_of(text, "value: 5000"), "EVENT_QUEUE_DEPTH has to be text, not 5000"),
    }


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"Network": "10.244.0.0/16",', "", "missing"),
        ('"Network": "10.244.0.0/16"', '"Network": "10.244.0.0/33"', "is not an IPv4 network"),
        ('"Network": "10.244.0.0/16"', '"Network": 5', "5 is not an IPv4 network"),
        ('"Type": "vxlan"', '"Type": "vxlna"', "'vxlna' is no backend that can run here"),
        ('"Type": "vxlan"', '"Type": ["vxlan"]', "is no backend"),
        ('"Type": "vxlan",', "", "missing"),
        ('"Port": 4789', '"Port": 99999', "99999 is not a number from 0 to 65535"),
        ('"Port": 4789', '"Port": true', "True is not a number"),
        ('"Port": 4789', '"Port": NaN', "NaN is no JSON value"),
        ('"Port": 4789', '"Port": ' + "9" * 5000, "not JSON"),
        ('"Port": 4789', '"Port": ' + "[" * 50 + "]" * 50, "nested deeper"),
        ('"Port": 4789', '"Port": ' + "[" * 9000, "not JSON"),
        ('"VNI": 4000,', '"VNI": 4000, "VNI": 4001,', "given twice"),
        ('"DirectRouting": true', '"DirectRouting": "yes"', "'yes' is not true or false"),
        ("  net-conf.json: |", "  net-conf.yaml: |", "missing"),
        ("  net-conf.json: |", "  net-conf.json: {}\n  other: |", "has to be text"),
        ('"isDefaultGateway": true', '"isDefaultGateway": true, "ipam": {}', "refuses it here"),
        ('"isDefaultGateway": true', '"bridge": "a-name-that-is-too-long"', "no name of a device"),
        ('"type": "flannel"', '"type": "bridge"', "has 0 plugins of type flannel"),
        ("kind: ConfigMap", "kind: Secret", "no ConfigMap with net-conf.json"),
        ("kind: DaemonSet", "kind: Deployment", "no DaemonSet"),
        ("kind: ConfigMap", "kind: ConfigMap\nkind: ConfigMap", "given twice"),
        ("- /opt/bin/flanneld", "- /bin/sleep", "no DaemonSet with a container that runs flanneld"),
        ("- /opt/bin/flanneld", "- sh\n        - -c\n        - flanneld --ip-masq", "a script starts flanneld"),
        ("- --ip-masq", "- --ip-masq=perhaps", "takes true or false, not 'perhaps'"),
        ("- --ip-masq", "- --healthz-port=no", "takes a number"),
        ("- --ip-masq", "- --version", "makes flanneld end at once"),
        ("- --ip-masq", "- --public-ip=10.0.0.11", "one address"),
        ("- --ip-masq", "- 5", "has to be text, not 5"),
        ("- --ip-masq\n", "- --ip-masq\n        - false\n", "has to be text, not false"),
        ("- --ip-masq\n", '- --ip-masq\n        - "false"\n', "flanneld reads nothing from 'false' on"),
        ("- --ip-masq", "- --healthz-ip=$(POD_NAME)", "$(POD_NAME) comes from a cluster"),
        ("      containers:\n      - name: kube-flannel", "      container:\n      - name: x", "a list of containers"),
        (
            "namespace: kube-flannel\n  labels:\n    tier: node\n    app: flannel\ndata",
            "namespace: x\ndata",
            "is in kube",
        ),
        ("---\nkind: ClusterRole\n", "---\n5\n---\nkind: ClusterRole\n", "no Kubernetes object"),
    ],
)
def test_one_fault(old: str, new: str, what: str) -> None:
    faults = faults_of(changed(old, new))
    assert any(what in fault.what for fault in faults), faults
    assert all(fault.file == "m.yml" for fault in faults)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the file is empty"),
        ("# nothing\n---\n", "the file is empty"),
        ("just text", "no Kubernetes object"),
        ("a: [", "not YAML"),
        ("a: &a [1]\nb: [*a", "not YAML"),
        ("[" * 5000, "nested deeper"),
        ("a: &a [*a]\n", "aliases"),
        ("a: !!python/name:os.system x\n", "tag"),
        ("x" * 600_000, "larger than 512 KiB"),
    ],
)
def test_what_is_no_manifest_at_all(text: str, what: str) -> None:
    assert any(what in fault.what for fault in faults_of(text)), faults_of(text)


def test_an_alias_bomb_ends_soon() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert any("aliases" in fault.what for fault in faults_of(bomb))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00\x01", None])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.yml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_manifest(str(path), "vxlan")
    assert str(path) in str(error.value)


def spec_of(text: str, run: str = "vxlan_direct", **options: Any) -> FlannelSpec:
    return parse_manifest(text, "m.yml", run, **options)


def test_arguments_and_environment_are_kept_but_for_the_store() -> None:
    text = changed(
        "- --ip-masq\n",
        "- --ip-masq=false\n        - --subnet-file\n        - /etc/x\n        - --etcd-prefix=/y\n"
        "        - --healthz-port=0x1f90\n        - --iptables-resync=$(RESYNC)\n",
    )
    text = text.replace(
        'value: "5000"', 'value: "5000"\n        - name: RESYNC\n          value: "7"\n'
        '        - name: FLANNELD_ETCD_ENDPOINTS\n          value: "http://10.0.0.1:2379"', 1
    )  # fmt: skip
    flannel = spec_of(text.replace("env:\n", "env:\n        - {name: RESYNC0}\n", 1))
    # $(RESYNC) stands before RESYNC's own entry is of no matter: the environment is read first.
    assert flannel.args == (
        "--ip-masq=false", "--subnet-file", "/etc/x", "--healthz-port=0x1f90", "--iptables-resync=7"
    )  # fmt: skip
    assert (flannel.ip_masq, flannel.subnet_file, flannel.healthz_port) == (False, "/etc/x", 8080)
    assert flannel.env == {"RESYNC0": "", "EVENT_QUEUE_DEPTH": "5000", "RESYNC": "7"}
    assert flannel.notes == (
        "--etcd-prefix, --kube-subnet-mgr, FLANNELD_ETCD_ENDPOINTS replaced: the lab has a store of its own, etcd",
    )


def test_the_command_may_hold_the_arguments() -> None:
    text = changed(
        "        - /opt/bin/flanneld\n        args:\n        - --ip-masq\n        - --kube-subnet-mgr\n",
        "        - /opt/bin/flanneld\n        - --ip-masq\n        - -v=2\n        - --kube-subnet-mgr\n",
    )
    assert spec_of(text).args == ("--ip-masq", "-v=2")


def test_an_interface_that_no_node_has_is_left_out_and_said() -> None:
    flannel = spec_of(changed("- --ip-masq\n", "- --ip-masq\n        - --iface=ens192\n"))
    assert flannel.args == ("--ip-masq",)
    assert "--iface=ens192 left out" in flannel.notes[0]
    kept = spec_of(changed("- --ip-masq\n", "- --iface=nope\n        - --iface=eth0\n"))
    assert kept.args == ("--iface=nope", "--iface=eth0")


def test_keys_in_any_case_and_nulls_as_go_reads_them() -> None:
    text = changed('"VNI": 4000,', '"vni": 4000, "GBP": null,').replace('"Type": "vxlan"', '"type": "VXLAN"')
    assert spec_of(text).net_conf["Backend"] == {
        "Type": "vxlan", "VNI": 4000, "Port": 4789, "DirectRouting": True
    }  # fmt: skip


def test_unknown_keys_of_net_conf_are_kept_as_flannel_ignores_them() -> None:
    assert spec_of(changed('"VNI": 4000,', '"VNI": 4000, "MacPrefix": "0E-2A",')).vni == 4000


def test_overrides_win_over_the_manifest() -> None:
    flannel = spec_of(VXLAN, net_conf_overrides={"Port": "4790"})
    assert (flannel.port, flannel.vni) == (4790, 4000)


def test_nftables_is_the_manifests_word() -> None:
    text = changed('"Backend": {', '"EnableNFTables": true, "Backend": {')
    assert spec_of(text).rules == "nftables"
    [fault] = faults_of(text, rules="iptables-nft")
    assert "contradicts --rules iptables-nft" in fault.what
    assert spec_of(text, net_conf_overrides={"EnableNFTables": "false"}).rules == "iptables-nft"
    assert spec_of(VXLAN, net_conf_overrides={"EnableNFTables": "true"}).rules == "nftables"


def test_a_run_takes_its_rules_from_the_manifest_unless_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "kube-flannel.yml"
    path.write_text(changed('"Backend": {', '"EnableNFTables": true, "Backend": {'))
    options = RunOptions(backend="vxlan_direct", name="unit", manifest=path)
    assert describe_lab(options)[1].rules == "nftables"
    assert describe_lab(replace(options, rules="nftables"))[1].rules == "nftables"
    with pytest.raises(InputError, match="contradicts --rules iptables-legacy"):
        describe_lab(replace(options, rules="iptables-legacy"))
    assert describe_lab(replace(options, manifest=None))[1].rules == "iptables-nft"


def test_a_list_of_objects_as_kubectl_prints_it() -> None:
    items = [document for document in yaml.safe_load_all(VXLAN) if document]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    assert spec_of(text).vni == 4000


def test_one_daemonset_for_each_architecture_is_one_flannel() -> None:
    daemon = VXLAN[VXLAN.index("---\napiVersion: apps/v1\nkind: DaemonSet") :]
    assert spec_of(VXLAN + daemon.replace("kube-flannel-ds", "kube-flannel-ds-arm64")).vni == 4000
    [fault] = faults_of(VXLAN + daemon.replace("--ip-masq", "--ip-masq=false"))
    assert "differently" in fault.what


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def paths_of(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in paths_of(item, (*path, key)))]


DOCUMENTS = [document for document in yaml.safe_load_all(VXLAN) if document]
PLACES = [(i, path) for i, document in enumerate(DOCUMENTS) for path in paths_of(document) if path]


@settings(max_examples=100, deadline=None)
@given(place=st.sampled_from(PLACES), value=values)
def test_no_value_anywhere_makes_a_traceback(place: tuple[int, tuple[str | int, ...]], value: object) -> None:
    documents = json.loads(json.dumps(DOCUMENTS))
    target: Any = documents[place[0]]
    for key in place[1][:-1]:
        target = target[key]
    target[place[1][-1]] = value
    survives_or_says_why(yaml.safe_dump_all(documents))


NET_CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "VNI": 4000, "DirectRouting": True}}
NET_KEYS = ["Network", "Backend", "SubnetLen", "SubnetMin", "SubnetMax", "EnableIPv6", "IPv6Network", "EnableNFTables"]


@settings(max_examples=60, deadline=None)
@given(
    extra=st.dictionaries(st.sampled_from(NET_KEYS), values | st.sampled_from(["10.244.0.0/16", "::/0", "10.0.0.0"]))
)
def test_no_net_conf_makes_a_traceback(extra: dict[str, object]) -> None:
    documents = json.loads(json.dumps(DOCUMENTS))
    documents[4]["data"]["net-conf.json"] = json.dumps(NET_CONF | extra)
    survives_or_says_why(yaml.safe_dump_all(documents))


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, len(VXLAN)), text=st.text(max_size=5), cut=st.integers(0, 40))
def test_no_edit_of_the_text_makes_a_traceback(at: int, text: str, cut: int) -> None:
    survives_or_says_why(VXLAN[:at] + text + VXLAN[at + cut :])


def survives_or_says_why(text: str) -> None:
    faults: tuple[Fault, ...] | None = None
    try:
        spec_of(text)
    except InputError as error:
        faults = error.faults
    assert faults is None or faults
