"""CNI's files on a node, as one `grep` prints them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from testbed.errors import ProductError
from testbed.probes.cnifiles import DELEGATES, NETWORKS, parse_cni_files

FOUND = (
    f"{NETWORKS}/cbr0/10.244.1.3\0abc\r\n"
    f"{NETWORKS}/cbr0/10.244.1.3\0eth0\n"
    f"{NETWORKS}/cbr0/fd00::3\0abc\r\n"
    f"{NETWORKS}/cbr0/last_reserved_ip.0\00010.244.1.3\n"
    f'{DELEGATES}/abc\0{{"name": "cbr0",\n'
    f'{DELEGATES}/abc\0"mtu": 1450}}\n'
)


def test_reservations_and_configurations_are_told_apart() -> None:
    found = parse_cni_files(FOUND, "worker1")
    assert found.reserved == {ip_address("10.244.1.3"): "abc", ip_address("fd00::3"): "abc"}
    assert found.of("abc") == (ip_address("10.244.1.3"), ip_address("fd00::3"))
    assert found.of("another") == ()
    assert found.delegates == {"abc": {"name": "cbr0", "mtu": 1450}}


def test_nothing_is_kept_where_no_pod_was_made() -> None:
    found = parse_cni_files("", "worker1")
    assert (found.reserved, found.delegates) == ({}, {})


@pytest.mark.parametrize("line", [f"{NETWORKS}/cbr0/eth0\0abc", f"{DELEGATES}/abc\0no JSON"])
def test_a_broken_file_is_named(line: str) -> None:
    with pytest.raises(ProductError) as refused:
        parse_cni_files(line, "worker1")
    assert line.partition("\0")[0] in str(refused.value)
