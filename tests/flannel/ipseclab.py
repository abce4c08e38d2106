"""What the tests of ipsec share: its configuration, and a node's policies."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from tests.flannel.corelab import Node

PSK = "a pre-shared key of a test, which is no secret, but has to be long: " * 2
IPSEC = {"Type": "ipsec", "PSK": PSK}
OWN, HERE = IPv4Network("10.244.1.0/24"), IPv4Address("192.168.50.1")


def shown(node: Node) -> list[str]:
    lines = node.ip("xfrm policy list", check=False).splitlines()
    heads = [line for line in lines if line.startswith("src ") and "socket" not in line]
    return sorted(line.strip() for line in heads if " 10.244." in f" {line}" or "10.244." in line)


def pairs(*numbers: int) -> list[str]:
    out = [f"src 10.244.1.0/24 dst 10.244.{n}.0/24" for n in numbers]
    return sorted([*out, *[f"src 10.244.{n}.0/24 dst 10.244.1.0/24" for n in numbers] * 2])
