"""Mutations as data, the judgement on them, and the hash under which a proof is noted."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from testbed.errors import InputError, LabError
from testbed.guest import runs
from testbed.mutants import __main__ as main
from testbed.mutants import proven
from testbed.mutants.driver import Proof, Seen, judge
from testbed.mutants.mutations import Mutation, load_mutations

PLAIN = {"id": "one", "row": "VXD-04", "do": ["ip link set dev {tunnel} mtu 1450"], "heals": True, "assertion": "MTU"}


def mutation(**changes: object) -> Mutation:
    return Mutation.model_validate(PLAIN | changes)


def test_the_mutations_of_the_suites_are_in_order() -> None:
    assert len(load_mutations()) > 50


def test_every_fault_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mutations.yaml"
    path.write_text(
        dedent("""\
        - id: Not An Id
          row: VXD-04
          do:
          - rm -rf /
          undo:
          - ip link show
          assertion: x
        - id: nowhere
          row: VXD-04
          do:
          - ip link delete {nothing}
          heals: true
          assertion: "("
        - id: not-there
          row: VXD-04
          replace:
            module: flannel.backends.vxlan
            function: VxlanBackend.nothing
            text: "def mutant(original): pass"
          assertion: x
        - id: for-ever
          row: VXD-04
          do:
          - ip link show
          assertion: x
        """)
    )
    with pytest.raises(InputError) as raised:
        load_mutations(path)
    found = {(fault.line, fault.key) for fault in raised.value.faults}
    told = str(raised.value)
    assert (1, "[0].id") in found
    for word in ("'rm -rf /' calls none of", "which stands for nothing", "has no function VxlanBackend.nothing",
                 "says how it is put right"):  # fmt: skip
        assert word in told


def test_what_is_not_in_the_catalogue_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mutations.yaml"
    one = '{id: a, row: %s, backends: [%s], do: ["ip link show"], heals: true, assertion: x, also: [%s]}'
    rows = [one % ("VXD-99", "vxlan", "VXD-01"), one % ("VXD-04", "host_gw", "NO-1")]
    path.write_text("".join(f"- {row}\n" for row in rows))
    with pytest.raises(InputError) as raised:
        load_mutations(path)
    assert [fault.line for fault in raised.value.faults] == [1, 2, 2, 2]
    for word in ("VXD-99: the catalogue has no such row", "no row NO-1", "is not about host_gw", "a is there twice"):
        assert word in str(raised.value)


def seen(row: str, verdict: str, said: str = "has MTU 1450") -> Seen:
    return Seen(row, row, verdict, said)


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        ([seen("VXD-04", "failed")], "killed"),
        ([seen("VXD-04", "held"), seen("VXD-04", "failed")], "killed"),
        ([seen("VXD-04", "held")], "survived"),
        ([seen("VXD-04", "skipped")], "survived"),
        ([seen("VXD-04", "failed", "no such device")], "other"),
        ([seen("VXD-04", "inconclusive")], "other"),
        ([seen("VXD-04", "lab_error")], "other"),
        ([seen("VXD-04", "failed"), seen("POD-09", "failed")], "bystanders"),
        ([seen("VXD-04", "failed"), seen("MTU-01", "failed")], "killed"),
    ],
)
def test_the_row_has_to_fail_by_its_assertion_and_alone(ended: list[Seen], outcome: str) -> None:
    proof = Proof("one", "VXD-04", "vxlan")
    judge(mutation(also=["MTU-01"]), ended, proof)
    assert proof.outcome == outcome
    assert proof.stands == (outcome == "killed") != proof.refutes


def test_a_changed_check_or_mutation_is_unproven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = load_mutations()["vxd-04-constant"]
    path = tmp_path / "proven"
    proven.write_proven([one], [], path)
    monkeypatch.setattr(proven, "proven_path", lambda: path)
    assert proven.proven_rows() == {"VXD-04"}
    sources = proven._check_source("VXD-04")
    monkeypatch.setattr(proven, "_check_source", lambda row: [*sources, "one more line"])
    assert proven.proven_rows() == frozenset()
    monkeypatch.undo()
    assert proven.hash_of(one) != proven.hash_of(one.model_copy(update={"assertion": "x"}))
    assert proven.hash_of(one) == proven.hash_of(one.model_copy(update={"also": ["MTU-01"], "note": "for people"}))


def test_the_hash_is_of_all_that_the_check_uses_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget() -> None:
        proven._check_source.cache_clear()
        proven._definitions.cache_clear()

    def hashed(helper: str, stranger: str) -> list[str]:
        (tmp_path / "test_x.py").write_text(
            f"WANTED = {helper}\ndef other():\n    return {stranger}\ndef look(x):\n    assert x == WANTED\n"
            "@check('VXD-04')\ndef test_it():  # as it is\n    look(1)\n"
        )
        forget()
        return proven._check_source("VXD-04")

    monkeypatch.setattr(proven, "folder", lambda name: tmp_path)
    monkeypatch.setattr(proven, "_checks", lambda: {"VXD-04": "test_x.py::test_it"})
    first = hashed("1", "1")
    assert hashed("1", "2") == first
    assert hashed("2", "1") != first
    forget()


def test_a_refuted_proof_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "proven"
    both = [load_mutations()[name] for name in ("vxd-04-constant", "vxd-01-learning")]
    proven.write_proven(both, [], path)
    proven.write_proven([], ["VXD-04"], path)
    assert list(proven.read_proven(path)) == ["VXD-01"]
    (path / "VXD.yaml").write_text("VXD-01: yes\n")
    with pytest.raises(LabError, match="broken"):
        proven.read_proven(path)


@pytest.mark.parametrize(
    ("outcome", "kept"),
    [
        ("killed", True), ("survived", False), ("other", False), ("bystanders", False), ("not whole", False),
        ("broken", True), ("not run", True),
    ],
)  # fmt: skip
def test_a_proof_goes_where_the_mutation_does_anything_else(
    outcome: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "proven"
    one = load_mutations()["vxd-04-constant"]
    proven.write_proven([one, load_mutations()["vxd-01-learning"]], [], path)
    monkeypatch.setattr(proven, "proven_path", lambda: path)
    monkeypatch.setattr(main, "prove", lambda *_, **__: [Proof(one.id, one.row, "vxlan", outcome)])
    monkeypatch.setattr(main, "require_tools", lambda *_: None)
    words = ["--only", one.id, "--backend", "vxlan", "--reports", str(tmp_path / "reports")]
    assert main.main.main(words, standalone_mode=False) == (0 if outcome == "killed" else 1)
    assert list(proven.read_proven(path)) == (["VXD-01", "VXD-04"] if kept else ["VXD-01"])


def test_options_that_are_given_several_times_stand_one_by_one() -> None:
    one = mutation(run={"net-conf": ["EnableIPv6=true", "IPv6Network=fd00::/48"], "store": "etcd"})
    assert one.options == (("net-conf", "EnableIPv6=true"), ("net-conf", "IPv6Network=fd00::/48"), ("store", "etcd"))


def test_a_lab_that_this_kernel_cannot_have_is_brought_up_in_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str], list[str]]] = []

    def in_guest(backend: str, ids: list[str], options: list[str], **_: object) -> list[Proof]:
        asked.append((backend, ids, options))
        return [Proof(ids[0], "VXD-04", backend)]

    monkeypatch.setattr(runs, "lacking", lambda run, features=(): ("ipip",) if run == "ipip" else ())
    monkeypatch.setattr(main, "prove_in_guest", in_guest)
    one = mutation(run={"rules": "nftables"})
    found = main.prove(("ipip", one.options, ""), [one], name="x", full=False, kernel="auto", file=None)
    assert [proof.mutation for proof in found] == ["one"]
    assert asked == [("ipip", ["one"], ["--rules", "nftables"])]


def test_each_mutation_has_a_lab_with_what_its_row_needs() -> None:
    plain = mutation(row="V6-12", do=["ip link show"], backends=[])
    given = mutation(row="V6-12", do=["ip link show"], run={"net-conf": "EnableIPv6=true"})
    slow = mutation(id="slow", row="ECMP-05", do=["ip link show"])
    assert main.runs_of([plain], ["vxlan_direct", "host_gw"], every=True) == {}
    (both,) = main.runs_of([given], ["vxlan_direct"], every=True)
    assert both == ("vxlan_direct", (("net-conf", "EnableIPv6=true"),), "")
    assert list(main.runs_of([mutation(), slow], [], every=False)) == [("vxlan", (), ""), ("vxlan", (), "netem")]


def test_a_row_that_takes_what_this_kernel_lacks_goes_to_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "lacking", lambda run, features=(): tuple(set(features) & {"netem"}))
    monkeypatch.setattr(main, "prove_in_guest", lambda backend, ids, *_, **__: [Proof(ids[0], "ECMP-05", backend)])
    one = mutation(row="ECMP-05", do=["ip link show"])
    (found,) = main.prove(("vxlan", (), "netem"), [one], name="x", full=False, kernel="auto", file=None)
    assert (found.backend, found.stands) == ("vxlan", True)
