"""DEP: what a flanneld takes from its command line and configuration, seen on one that has a network of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.nodes.alone import NETWORK, SECOND, Alone, flanneld_alone
from testbed.nodes.deploy import Cluster

BACKENDS = {
    "vxlan": {},
    "host-gw": {},
    "ipip": {},
    "udp": {},
    "wireguard": {},
    "ipsec": {"PSK": "00" * 48},
    "alloc": {},
    "extension": {},
}
"""Each type that flannel has, with the keys that it cannot do without."""


@pytest.fixture
def alone(cluster: Cluster) -> Iterator[Alone]:
    """A flanneld of the check's own."""
    with flanneld_alone(cluster) as found:
        if found is None:
            pytest.skip("a flanneld of a check's own keeps its leases in etcd")
        yield found


def chosen(alone: Alone, *args: str) -> str:
    """The address that a flanneld with these arguments publishes."""
    alone.configure({"Type": "alloc"})
    alone.start(*args)
    try:
        alone.wait_ready()
        (lease,) = alone.leases().values()
        return str(lease["PublicIP"])
    finally:
        alone.stop()
        alone.clear()


@check("DEP-17")
def test_first_interface_that_is_there_is_taken(alone: Alone) -> None:
    """Of several --iface the first that exists; by expression, and by what is reached through it. Source: S0, src."""
    first, second = str(alone.address), str(SECOND)
    wanted = {
        ("--iface=nope", "--iface=eth1", "--iface=eth0"): second,
        ("--iface=eth0", "--iface=eth1"): first,
        ("--iface-regex=^nothing$", f"--iface-regex=^{second.rpartition('.')[0]}"): second,
        ("--iface-regex=eth1",): second,
        (f"--iface-can-reach={SECOND + 1}",): second,
        ("--iface-can-reach=192.0.2.1",): first,
    }
    for args, address in wanted.items():
        found = chosen(alone, *args)
        assert found == address, f"{' '.join(args)}: {found} is published, not {address}"


@check("DEP-18")
def test_backends_are_known_by_name_and_no_other(alone: Alone) -> None:
    """A name that is none ends flanneld, and it says the name; those that are do not. Source: S4."""
    for name, keys in BACKENDS.items():
        alone.configure({"Type": name, **keys})
        alone.start()
        try:
            said = Deadline(15).poll(lambda: decided(alone))
            assert said, f"{name}: neither ready nor ended\n{alone.log()}"
            assert "unknown backend" not in alone.log(), f"{name} is unknown: {alone.log()}"
        finally:
            alone.stop()
    alone.configure({"Type": "vxlann"})
    ended = alone.run_to_end()
    assert ended.rc not in (0, 124), f"vxlann is taken for a backend (exit {ended.rc})\n{ended.stderr}"
    assert "vxlann" in ended.stderr + ended.stdout, f"the error names no vxlann: {ended.stderr}"


def decided(alone: Alone) -> bool:
    """Whether the flanneld has got ready, or has ended because this kernel cannot do it."""
    return alone.status("/readyz") == 200 or not alone.running


@check("DEP-27")
def test_ready_means_a_network_and_healthy_a_process(alone: Alone) -> None:
    """/healthz from the start on; /readyz only once subnet.env is written. Source: docs, v0.28.9."""
    alone.start("--ip-masq")
    assert Deadline(15).poll(lambda: alone.status("/healthz") == 200 or None), f"not healthy\n{alone.log()}"
    assert alone.subnet_env() is None
    status = alone.status("/readyz")
    assert status == 503, f"/readyz says {status} before there is a configuration"
    alone.configure({"Type": "vxlan"})
    alone.wait_ready()
    assert alone.subnet_env(), "/readyz says 200 before subnet.env is written"
    rules = alone.place.run(["iptables-save", "-t", "nat"]).stdout
    assert f"-s {NETWORK}" in rules, f"/readyz says 200 before there are rules for {NETWORK}:\n{rules}"
    assert alone.status("/healthz") == 200


@check("NEG-05")
def test_what_windows_needs_is_not_asked_of_linux(alone: Alone) -> None:
    """VNI 1 and port 8472 do; MacPrefix is nothing to a Linux node. Source: S0."""
    alone.configure({"Type": "vxlan", "VNI": 1, "Port": 8472, "MacPrefix": "0E-2A"})
    alone.start()
    alone.wait_ready()
    (lease,) = alone.leases().values()
    link = alone.place.run(["ip", "-d", "link", "show", "flannel.1"]).stdout
    assert "vxlan id 1 " in link, link
    assert "dstport 8472 " in link, link
    data = lease["BackendData"]
    assert data["VNI"] == 1, data
    assert not data["VtepMAC"].lower().startswith("0e:2a"), f"MacPrefix made the MAC {data['VtepMAC']}"
