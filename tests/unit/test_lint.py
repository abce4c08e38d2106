"""`testbed lint`: every fault of a manifest is found on its line, and none where there is none."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import yaml

from testbed.cli import invoke
from testbed.errors import Exit
from testbed.flannelbuild import default_flannel
from testbed.flannelspec import BACKENDS
from testbed.manifest import lint, read_manifest
from testbed.manifestcluster import read_pod_cidrs
from testbed.manifestobjects import Findings
from testbed.render import Images, render_flannel
from testbed.yamlmarks import MAX_BYTES

DATA = Path(__file__).resolve().parent.parent / "data"
SHAPES = DATA / "shapes"
VXLAN = (DATA / "s0-vxlan-direct.yml").read_text()
UDP = (DATA / "s0-udp.yml").read_text()


def found(*texts: str, pod_cidr: str = "") -> Findings:
    networks, faults = read_pod_cidrs(pod_cidr, "--pod-cidr")
    assert not faults
    named = [("m.yml" if position == 0 else f"m{position}.yml", text) for position, text in enumerate(texts)]
    return lint(named, [(network, "--pod-cidr") for network in networks])


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


@pytest.mark.parametrize("file", ["s0-ipip-direct", "s0-udp", "s0-vxlan-direct"])
def test_a_right_manifest_has_no_fault(file: str) -> None:
    assert found((DATA / f"{file}.yml").read_text()).faults == []


@pytest.mark.parametrize("file", ["s1-udp", "s3-ipip"])
def test_the_seeds_whose_account_is_bound_outside_their_namespace(file: str) -> None:
    text = (DATA / f"{file}.yml").read_text()
    [fault] = found(text).faults
    assert fault.line == line_of(text, "  namespace: kube-system")
    assert "bound in namespace kube-system" in fault.what
    assert "namespace: kube-flannel" in fault.hint


@pytest.mark.parametrize("run", BACKENDS)
def test_what_is_rendered_here_has_no_fault(run: str) -> None:
    assert found(render_flannel(default_flannel(run), Images(), interface="eth0")).faults == []


@pytest.mark.parametrize("path", sorted(SHAPES.glob("*")), ids=lambda path: str(path.name))
def test_shapes_that_are_in_use_raise_no_false_alarm(path: Path) -> None:
    assert found(path.read_text()).faults == []


ROLE = '- apiGroups:\n  - ""\n  resources:\n  - nodes/status\n  verbs:\n  - patch\n'
MEMORY = 'memory: "50Mi"\n        securityContext'
RUN = "        - name: run\n          mountPath: /run/flannel"
CHANGES = [
    (
        "  namespace: kube-flannel\n---\napiVersion: v1\nkind: ServiceAccount",
        "  namespace: other\n---\napiVersion: v1\nkind: ServiceAccount",
        "namespace: other",
        "of namespace other is bound, but DaemonSet kube-flannel-ds runs as the one of kube-flannel",
    ),
    ("serviceAccountName: flannel", "serviceAccountName: flanel", "serviceAccountName: f", "no role is bound to"),
    ("kind: ClusterRoleBinding", "kind: RoleBinding", "kind: RoleBinding", "gives no right to nodes"),
    (ROLE, "", "rules:", "lacks the right to patch nodes/status"),
    ("  - list\n  - watch\n", "  - list\n", "  verbs:\n  - list", "the right to watch nodes"),
    ("  - list\n  - watch\n", "  - watch\n", "  verbs:\n  - watch", "the right to list nodes"),
    ("  - pods\n  verbs:\n  - get", "  - pods\n  verbs:\n  - list", "  verbs:", "the right to get pods"),
    (
        ":v0.19.1\n        command:\n        - /opt",
        ":v0.28.9\n        command:\n        - /opt",
        "  verbs:\n  - list",
        "the right to get nodes",
    ),
    ('"VNI": 4000,', '"VNJ": 4000,', '"VNJ"', "vxlan has no such key"),
    ('"Backend": {', '"Netwerk": "x", "Backend": {', '"Netwerk"', "configuration has no such key"),
    ('"Type": "vxlan"', '"Type": "vxlna"', '"Type"', "'vxlna' is no backend"),
    ('"VNI": 4000,', '"VNI": 4000,,', '"VNI": 4000,,', "not JSON"),
    ('"Network": "10.244.0.0/16",', '"Network": "10.244.0.0/16", "SubnetLen": 12,', '"SubnetLen"', "subnets of /12"),
    ("hostNetwork: true", "hostNetwork: false", "hostNetwork: false", "a network of its own"),
    ("      hostNetwork: true\n", "", "    spec:\n", "a network of its own"),
    (RUN, RUN.replace("/flannel", "/flanel"), "        volumeMounts:\n        - name: run", "stays in the container"),
    ("          path: /run/flannel", "          path: /run/other", RUN, "is /run/other/subnet.env on the node"),
    (
        "      - name: flannel-cfg\n        configMap:\n          name: kube-flannel-cfg",
        "      - name: flannel-cfg\n        configMap:\n          name: kube-flannel-conf",
        "          name: kube-flannel-conf",
        "net-conf.json is in kube-flannel-cfg",
    ),
    (
        "          path: /etc/cni/net.d",
        "          path: /etc/cni",
        "        - name: cni\n          mountPath: /etc/cni/net.d",
        "is /etc/cni/10-flannel.conflist",
    ),
    (
        "          mountPath: /etc/cni/net.d",
        "          mountPath: /etc/cni/net.e",
        "        volumeMounts:\n        - name: cni\n",
        "no folder of the node's",
    ),
    ("        - name: xtables-lock", "        - name: xtables", "        - name: xtables", "no volume xtables"),
    ('add: ["NET_ADMIN", "NET_RAW"]', 'add: ["NET_RAW"]', "        securityContext:", "nor has it NET_ADMIN"),
    (MEMORY, MEMORY.replace("50Mi", "20Mi"), 'memory: "20Mi"', "20Mi is too little"),
    (MEMORY, MEMORY.replace("50Mi", "50Wi"), 'memory: "50Wi"', "is no quantity"),
    (
        "    matchLabels:\n      app: flannel",
        "    matchLabels:\n      app: flanel",
        "app: flanel",
        "the pods have flannel",
    ),
    ("        - name: POD_NAME\n", "        - name: POD_NAMES\n", "        env:", "POD_NAME missing"),
]


@pytest.mark.parametrize(("old", "new", "place", "what"), CHANGES, ids=[what[:30] for *_, what in CHANGES])
def test_one_fault(old: str, new: str, place: str, what: str) -> None:
    assert old in VXLAN, "the manifest that is changed has no such text"
    text = VXLAN.replace(old, new, 1)
    hits = [fault for fault in found(text).faults if what in fault.what]
    assert hits, found(text).faults
    # A list is named by the line of its key.
    assert abs(hits[0].line - line_of(text, place)) <= 1, (hits[0], line_of(text, place))
    assert hits[0].hint or "NET" in what or "JSON" in what or "subnets" in what


def test_every_fault_at_once() -> None:
    text = VXLAN.replace(ROLE, "").replace("hostNetwork: true", "hostNetwork: false").replace('"VNI"', '"VNJ"')
    text = text.replace("- --ip-masq", "- --ip-mask").replace('"name": "cbr0",', '"name": "cbr0";')
    whats = " | ".join(fault.what for fault in found(text).faults)
    for part in ("patch nodes/status", "a network of its own", "no such key", "no flag --ip-mask", "not JSON"):
        assert part in whats


def test_udp_needs_a_tun_device() -> None:
    bare = UDP.replace("privileged: true", 'capabilities: {add: ["NET_ADMIN"]}')
    [fault] = found(bare).faults
    assert (fault.line, "/dev/net/tun" in fault.what) == (
        line_of(bare, "        volumeMounts:\n        - name: run"),
        True,
    )
    mount = "        volumeMounts:\n        - name: tun\n          mountPath: /dev/net/tun\n        - name: run"
    mounted = bare.replace("        volumeMounts:\n        - name: run", mount)
    volume = "      volumes:\n      - name: tun\n        hostPath:\n          path: /dev/net/tun\n"
    assert found(mounted.replace("      volumes:\n", volume)).faults == []


def test_a_limit_of_udp_is_told_as_a_rate() -> None:
    [warning] = found(UDP).warnings
    assert "100m holds the udp backend to about 5348 packets" in warning.what


@pytest.mark.parametrize(
    ("suffix", "selector", "what"),
    [
        ("-arm64", "kubernetes.io/arch: arm64", ""),
        ("-arm64", "beta.kubernetes.io/arch: arm64", ""),
        ("-arm64", "kubernetes.io/arch: amd64", "is for arm64, but its nodes are amd64"),
        ("-amd64", "kubernetes.io/arch: arm64", "is for amd64, but its nodes are arm64"),
        ("-arm64", "kubernetes.io/os: linux", "nothing keeps it from nodes of another architecture"),
    ],
)
def test_images_of_one_architecture(suffix: str, selector: str, what: str) -> None:
    text = VXLAN.replace(":v0.19.1", f":v0.19.1{suffix}").replace(":v1.1.0", f":v1.1.0{suffix}")
    text = text.replace("      hostNetwork: true", f"      hostNetwork: true\n      nodeSelector:\n        {selector}")
    faults = found(text).faults
    assert bool(faults) == bool(what)
    assert all(what in fault.what for fault in faults)


@pytest.mark.parametrize(
    ("pod_cidr", "what"),
    [
        ("10.244.0.0/16", ""),
        ("10.244.3.0/24", ""),
        ("10.42.0.0/16", "10.244.0.0/16 does not hold the pods' network 10.42.0.0/16 of --pod-cidr"),
        ("10.244.0.0/16,fd00::/48", ""),
        ("10.0.0.0/8", "does not hold the pods' network 10.0.0.0/8"),
    ],
)
def test_network_and_the_clusters_pods(pod_cidr: str, what: str) -> None:
    faults = found(VXLAN, pod_cidr=pod_cidr).faults
    assert bool(faults) == bool(what)
    for fault in faults:
        assert what in fault.what
        assert fault.line == line_of(VXLAN, '"Network"')


@pytest.mark.parametrize(
    "cluster",
    [
        "kind: ClusterConfiguration\napiVersion: kubeadm.k8s.io/v1beta3\nnetworking:\n  podSubnet: 10.42.0.0/16\n",
        "kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nnetworking:\n  podSubnet: 10.42.0.0/16\n",
        "kind: Node\napiVersion: v1\nmetadata:\n  name: n1\nspec:\n  podCIDR: 10.42.1.0/24\n",
        "kind: ConfigMap\napiVersion: v1\nmetadata:\n  name: kubeadm-config\ndata:\n  ClusterConfiguration: |\n"
        "    kind: ClusterConfiguration\n    networking:\n      podSubnet: 10.42.0.0/16\n",
    ],
)
def test_the_clusters_own_files_say_the_pods_network(cluster: str) -> None:
    [fault] = found(VXLAN, cluster).faults
    assert "does not hold the pods' network 10.42." in fault.what
    assert "m1.yml:" in fault.what
    assert found(VXLAN, cluster.replace("10.42.", "10.244.")).faults == []


def test_several_files_are_one_manifest() -> None:
    parts = VXLAN.split("---\n")
    rights = [
        part for part in parts if "rbac.authorization" in part or "kind: ServiceAccount" in part.split("spec:")[0]
    ]
    rest = [part for part in parts if part not in rights]
    alone = found("---\n".join(rest))
    assert alone.faults == []
    assert any("rights are not checked" in warning.what for warning in alone.warnings)
    both = found("---\n".join(rest), "---\n".join(rights))
    assert (both.faults, both.warnings) == ([], [])
    broken = found("---\n".join(rest), "---\n".join(rights).replace("  - watch\n", ""))
    assert [fault.file for fault in broken.faults] == ["m1.yml"]


def test_a_net_conf_alone() -> None:
    good = '{\n  "Network": "10.42.0.0/16",\n  "EnableIPv4": true,\n  "Backend": {\n    "Type": "vxlan"\n  }\n}\n'
    assert found(good).faults == []
    [fault] = found(good.replace('"Type": "vxlan"', '"Type": "vxlan" // here')).faults
    assert (fault.line, fault.hint) == (5, "JSON has no comments")
    [fault] = found(good, pod_cidr="10.244.0.0/16").faults
    assert fault.line == 2


def test_a_template_is_told_to_be_one() -> None:
    faults = found("kind: ConfigMap\nmetadata:\n  namespace: {{ .Release.Namespace }}\n{{- if x }}\n").faults
    assert any("render it first" in fault.hint for fault in faults)


def test_what_only_a_lab_minds_is_a_warning() -> None:
    text = VXLAN.replace("- --ip-masq", "- --ip-masq\n        - --public-ip=$(POD_NAME)")
    result = found(text)
    assert result.faults == []
    assert any(warning.what.startswith("in a lab: $(POD_NAME)") for warning in result.warnings)


def test_a_run_deploys_what_only_a_cluster_minds_and_says_it() -> None:
    flannel = read_manifest(str(DATA / "s1-udp.yml"), "udp")
    assert any("bound in namespace kube-system" in warning for warning in flannel.warnings)
    assert read_manifest(str(DATA / "s0-vxlan-direct.yml"), "vxlan_direct").warnings == ()


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(["lint", str(DATA / "s0-vxlan-direct.yml")]) == Exit.HELD
    assert capsys.readouterr().out == "0 faults, 0 warnings\n"
    assert invoke(["lint", "--json", str(DATA / "s1-udp.yml"), str(tmp_path / "none.yml")]) == Exit.INPUT
    facts = json.loads(capsys.readouterr().out)
    assert facts["schema"] == 1
    assert [Path(fault["file"]).name for fault in facts["faults"]] == ["none.yml", "s1-udp.yml"]
    assert facts["faults"][1]["line"] == 45
    assert set(facts["warnings"][0]) == {"file", "line", "key", "what", "hint"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(VXLAN.replace('"VNI"', '"VNJ"').encode())))
    assert invoke(["lint", "-"]) == Exit.INPUT
    assert "fault: standard input:" in capsys.readouterr().out
    assert invoke(["lint", "--pod-cidr", "10.42/x", str(DATA / "s0-udp.yml")]) == Exit.INPUT
    assert invoke(["lint"]) == Exit.INPUT


@pytest.mark.parametrize("character", [b"a", b"\xc3\xa9", b"\xef\xbb\xbf"])
def test_standard_input_is_not_cut(
    character: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = b"#" + character * (MAX_BYTES // len(character) + 1)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(too_long)))
    assert invoke(["lint", "-"]) == Exit.INPUT
    assert "fault: standard input: larger than 512 KiB" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["DaemonSet", "ConfigMap", "ClusterRole", "ClusterRoleBinding", "Namespace"])
@pytest.mark.parametrize("junk", [None, 5, "x", [], [5], {}, [{}], {"a": 5}])
def test_nothing_of_a_wrong_type_is_an_error_of_ours(kind: str, junk: object) -> None:
    """Each value of an object in turn is something else than it should be."""
    documents = [document for document in yaml.safe_load_all(UDP) if document]
    for position, document in enumerate(documents):
        if document["kind"] != kind:
            continue
        for path in list(_paths(document))[:: 9 if kind == "DaemonSet" else 2]:
            changed = json.loads(json.dumps(documents))
            target = changed[position]
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = junk
            found("---\n".join(yaml.safe_dump(d) for d in changed))


def _paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in inside for p in [(*path, key), *_paths(inner, (*path, key))]]
