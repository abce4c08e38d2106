"""A node whose address has changed keeps its subnet (upstream: takes another one, and leaves the old lease behind)."""

from __future__ import annotations

import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from flannel.lease import LeaseAttrs
from flannel.netconf import NetConf, parse
from flannel.stores.base import Event, LeaseLost, Snapshot
from flannel.stores.etcd import EtcdStore
from flannel.stores.etcd_own import Proof
from flannel.stores.leasecodec import lease_value
from tests.flannel.conftest import Etcd, Recorder, eventually

MakeStore = Callable[..., tuple[EtcdStore, Recorder]]
Attrs = Callable[[int], LeaseAttrs]
SEVEN = IPv4Network("10.244.7.0/24")
MOVED = IPv4Address("192.0.2.77")


def host_gw(ip: str) -> LeaseAttrs:
    """A node without anything that tells it from others but its address."""
    return LeaseAttrs(IPv4Address(ip), "host-gw")


def published(etcd: Etcd, subnet: IPv4Network = SEVEN) -> str:
    """The address that a subnet's key says."""
    key = etcd.get(f"subnets/{subnet.network_address}-{subnet.prefixlen}")
    assert key is not None
    return str(json.loads(key["value"])["PublicIP"])


def test_a_changed_address_keeps_the_subnet(etcd: Etcd, make_store: MakeStore, conf: NetConf, tmp_path: Path) -> None:
    proof = str(tmp_path / "run/subnet.env.lease")
    first = make_store(etcd, proof_file=proof)[0].acquire(conf, host_gw("192.0.2.1"), SEVEN)
    assert first.subnet == SEVEN
    again = make_store(etcd, proof_file=proof)[0].acquire(conf, host_gw(str(MOVED)), SEVEN)
    assert again.subnet == SEVEN
    assert etcd.keys() == ["10.244.7.0-24"]
    assert published(etcd) == str(MOVED)


def test_a_renewal_is_remembered_too(etcd: Etcd, make_store: MakeStore, conf: NetConf, tmp_path: Path) -> None:
    proof = str(tmp_path / "subnet.env.lease")
    store, seen = make_store(etcd, proof_file=proof, ttl=4, renew_margin=3.0)
    store.acquire(conf, host_gw("192.0.2.1"), SEVEN)
    before = Proof(proof).read()
    store.watch(seen.post)
    eventually(lambda: Proof(proof).read() != before, "the renewed lease is kept")
    store.close()
    assert make_store(etcd, proof_file=proof)[0].acquire(conf, host_gw(str(MOVED)), SEVEN).subnet == SEVEN


@pytest.mark.parametrize(
    "data", [{"VNI": 1, "VtepMAC": "0a:00:00:00:00:01"}, {"PublicKey": "c29tZW9uZSBlbHNlJ3Mga2V5", "Port": 51820}]
)
def test_a_tunnels_own_name_proves_it_where_nothing_was_kept(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, data: dict[str, Any]
) -> None:
    """A lease of upstream's making, or one from before this file was kept."""
    attrs = LeaseAttrs(IPv4Address("192.0.2.1"), "vxlan", data)
    make_store(etcd)[0].acquire(conf, attrs, SEVEN)
    assert make_store(etcd)[0].acquire(conf, attrs._replace(public_ip=MOVED), SEVEN).subnet == SEVEN
    assert published(etcd) == str(MOVED)


def test_a_subnet_that_another_node_has_taken_over_is_not_taken_back(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, tmp_path: Path
) -> None:
    proofs = [str(tmp_path / name) for name in ("one", "two")]
    make_store(etcd, proof_file=proofs[0])[0].acquire(conf, host_gw("192.0.2.1"), SEVEN)
    # Another node was given the address that this one had, and found the lease by it.
    make_store(etcd, proof_file=proofs[1])[0].acquire(conf, host_gw("192.0.2.1"), None)
    lease = make_store(etcd, proof_file=proofs[0])[0].acquire(conf, host_gw(str(MOVED)), SEVEN)
    assert lease.subnet != SEVEN
    assert published(etcd) == "192.0.2.1"


def test_a_strangers_lease_is_not_ours_because_subnet_env_says_so(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs, tmp_path: Path
) -> None:
    make_store(etcd)[0].acquire(conf, attrs_of(1), SEVEN)
    other = attrs_of(2)
    lease = make_store(etcd, proof_file=str(tmp_path / "none"))[0].acquire(conf, other, SEVEN)
    assert lease.subnet != SEVEN
    assert published(etcd) == "192.0.2.1"


def test_the_subnet_of_subnet_env_counts_before_one_that_is_found_by_the_new_address(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, tmp_path: Path
) -> None:
    proof = str(tmp_path / "lease")
    make_store(etcd, proof_file=proof)[0].acquire(conf, host_gw("192.0.2.1"), SEVEN)
    etcd.put("subnets/10.244.9.0-24", lease_value(host_gw(str(MOVED))).decode())
    store, seen = make_store(etcd, proof_file=proof)
    assert store.acquire(conf, host_gw(str(MOVED)), SEVEN).subnet == SEVEN
    assert seen.warned("several leases")


def test_an_old_lease_that_does_not_fit_any_more_is_given_up_whatever_its_address(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, tmp_path: Path
) -> None:
    proof = str(tmp_path / "lease")
    make_store(etcd, proof_file=proof)[0].acquire(conf, host_gw("192.0.2.1"), SEVEN)
    narrow = parse('{"Network": "10.244.0.0/16", "SubnetLen": 26, "Backend": {"Type": "host-gw"}}')
    lease = make_store(etcd, proof_file=proof)[0].acquire(narrow, host_gw(str(MOVED)), SEVEN)
    assert lease.subnet.prefixlen == 26
    assert etcd.keys() == [f"{lease.subnet.network_address}-26"]


def test_peers_learn_of_the_new_address(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs, tmp_path: Path
) -> None:
    proof = str(tmp_path / "lease")
    make_store(etcd, proof_file=proof)[0].acquire(conf, attrs_of(1), SEVEN)
    peer, seen = make_store(etcd)
    peer.acquire(conf, attrs_of(2), None)
    peer.watch(seen.post)
    seen.wait(Snapshot)
    store, own = make_store(etcd, proof_file=proof)
    store.acquire(conf, attrs_of(1)._replace(public_ip=MOVED), SEVEN)
    store.watch(own.post)
    [event] = seen.wait(Event)
    assert (event.kind, event.lease.subnet, event.lease.attrs.public_ip) == ("added", SEVEN, MOVED)
    own.wait(Snapshot)
    assert not own.of(LeaseLost)


@pytest.mark.parametrize("text", ["", "junk", "0x", "é", "1" * 100000])
def test_a_damaged_file_proves_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "lease"
    path.write_text(text)
    assert isinstance(Proof(str(path)).read(), int)
    assert Proof(str(tmp_path / "missing")).read() == 0


def test_a_file_that_cannot_be_written_is_told_of(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    store, seen = make_store(etcd, proof_file=str(tmp_path / "file/lease"))
    assert store.acquire(conf, host_gw("192.0.2.1"), SEVEN).subnet == SEVEN
    assert seen.warned("may not know its lease again")


def test_only_root_can_read_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    assert Proof(str(path)).keep(0xABC) == ""
    assert (path.stat().st_mode & 0o777, Proof(str(path)).read()) == (0o600, 0xABC)
