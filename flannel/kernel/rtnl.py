"""Links, addresses, neighbours, FDB entries and routes as rtnetlink messages."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Network, IPv6Network

from flannel.kernel.netlink import F_CREATE, F_EXCL, F_REPLACE, Message, Netlink, NetlinkError, attribute, attributes
from flannel.kernel.values import (
    BLACKHOLE,
    IFF_UP,
    PROTOCOL_BOOT,
    UNICAST,
    Address,
    Fdb,
    Ipip,
    Link,
    Neigh,
    Route,
    SeenEntry,
    SeenRoute,
    Vxlan,
)

NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30

SCOPE_LINK = 253
MAIN_TABLE = 254
PERMANENT, NOARP = 0x80, 0x40

_AF_BRIDGE = 7
_NTF_SELF = 2
_NODAD = 2
_ONLINK = 4
_SCOPE_NOWHERE = 255
# RTA_METRICS, RTA_FLOW and RTA_ENCAP: what nobody sees who looks at a route's destination and gateway alone
_MORE = {8, 11, 22}
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_NEIGH = struct.Struct("=BxxxiHBB")
_ROUTE = struct.Struct("=BBBBBBBBI")
_U32 = struct.Struct("=I")

# IFLA_*, and IFLA_VXLAN_* of the link's own data
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_TXQLEN, _IFLA_LINKINFO = 1, 3, 4, 10, 13, 18
_INFO_KIND, _INFO_DATA = 1, 2
_VXLAN_ID, _VXLAN_GROUP, _VXLAN_LINK, _VXLAN_LOCAL, _VXLAN_TTL, _VXLAN_TOS, _VXLAN_LEARNING = 1, 2, 3, 4, 5, 6, 7
_VXLAN_PROXY, _VXLAN_RSC, _VXLAN_L2MISS, _VXLAN_L3MISS, _VXLAN_PORT, _VXLAN_GBP = 11, 12, 13, 14, 15, 23
_VXLAN_GROUP6, _VXLAN_LOCAL6 = 16, 17
# IFLA_IPTUN_* of an ipip device
_IPTUN_LOCAL, _IPTUN_REMOTE, _IPTUN_TTL, _IPTUN_PROTO, _IPTUN_PMTUDISC = 2, 3, 4, 9, 10


def packed(ip: int, version: int = 4) -> bytes:
    """The bytes of an address."""
    return ip.to_bytes(4 if version == 4 else 16, "big")


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _version(family: int) -> int:
    return 6 if family == socket.AF_INET6 else 4


def _integer(data: bytes | None) -> int:
    return int.from_bytes(data, "big") if data else 0


def _u32(data: bytes | None) -> int:
    return int(_U32.unpack(data)[0]) if data and len(data) == 4 else 0


# -- links ---------------------------------------------------------------------------------------------------------


def parse_link(payload: bytes) -> Link:
    """Decode RTM_NEWLINK or RTM_DELLINK."""
    _, _, index, flags, _ = _LINK.unpack_from(payload)
    found = attributes(payload, _LINK.size)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    kind = info.get(_INFO_KIND, b"").rstrip(b"\0").decode("ascii", "replace")
    data = attributes(info.get(_INFO_DATA, b"")) if kind in ("vxlan", "ipip") else {}
    vxlan = _parse_vxlan(data) if kind == "vxlan" else None
    ipip = Ipip(_integer(data.get(_IPTUN_LOCAL)), _integer(data.get(_IPTUN_REMOTE))) if kind == "ipip" else None
    name = found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace")
    return Link(
        index,
        name,
        _u32(found.get(_IFLA_MTU)),
        found.get(_IFLA_ADDRESS, b""),
        flags,
        kind,
        vxlan,
        _u32(found.get(_IFLA_MASTER)),
        ipip,
    )


def _parse_vxlan(data: dict[int, bytes]) -> Vxlan:
    def flag(kind: int) -> bool:
        return bool(data.get(kind, b"\0")[:1] != b"\0")

    return Vxlan(
        _u32(data.get(_VXLAN_ID)),
        _u32(data.get(_VXLAN_LINK)),
        _integer(data.get(_VXLAN_LOCAL) or data.get(_VXLAN_LOCAL6)),
        _integer(data.get(_VXLAN_PORT)),
        flag(_VXLAN_LEARNING),
        _VXLAN_GBP in data,
        _integer(data.get(_VXLAN_GROUP) or data.get(_VXLAN_GROUP6)),
        flag(_VXLAN_L2MISS),
        6 if _VXLAN_LOCAL6 in data else 4,
    )


def get_link(netlink: Netlink, *, name: str = "", index: int = 0) -> Link | None:
    """Look one interface up by name or index; None where there is none."""
    body = _LINK.pack(0, 0, index, 0, 0) + (attribute(_IFLA_IFNAME, name.encode() + b"\0") if name else b"")
    try:
        answers = netlink.request(Message(GETLINK, 0, body))
    except NetlinkError:
        return None
    return parse_link(answers[0][1]) if answers else None


def dump_links(netlink: Netlink) -> list[Link]:
    """All interfaces, in the kernel's order."""
    return [parse_link(row) for row in netlink.dump(GETLINK, _LINK.pack(0, 0, 0, 0, 0))]


def new_vxlan(name: str, vxlan: Vxlan, mtu: int, mac: bytes) -> Message:
    """Create a vxlan device. The address is given at creation, so that no policy of the host takes it for random."""
    data = attribute(_VXLAN_ID, _U32.pack(vxlan.vni)) + attribute(_VXLAN_LINK, _U32.pack(vxlan.link))
    local = _VXLAN_LOCAL if vxlan.version == 4 else _VXLAN_LOCAL6
    data += attribute(local, packed(vxlan.local, vxlan.version))
    data += attribute(_VXLAN_TTL, b"\0") + attribute(_VXLAN_TOS, b"\0")
    data += attribute(_VXLAN_LEARNING, bytes([vxlan.learning]))
    for kind in (_VXLAN_PROXY, _VXLAN_RSC, _VXLAN_L2MISS, _VXLAN_L3MISS):
        data += attribute(kind, b"\0")
    if vxlan.gbp:
        data += attribute(_VXLAN_GBP, b"")
    if vxlan.port:
        data += attribute(_VXLAN_PORT, vxlan.port.to_bytes(2, "big"))
    info = attribute(_INFO_KIND, b"vxlan") + attribute(_INFO_DATA, data)
    body = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
    body += attribute(_IFLA_MTU, _U32.pack(mtu)) + attribute(_IFLA_ADDRESS, mac) + attribute(_IFLA_TXQLEN, _U32.pack(0))
    return Message(NEWLINK, F_CREATE | F_EXCL, body + attribute(_IFLA_LINKINFO, info))


def new_ipip(name: str, local: int, mtu: int) -> Message:
    """Create an ipip device to any remote: TTL and fragmentation are the inner packet's, as upstream has it."""
    data = attribute(_IPTUN_LOCAL, packed(local)) + attribute(_IPTUN_TTL, b"\0")
    data += attribute(_IPTUN_PROTO, b"\0") + attribute(_IPTUN_PMTUDISC, b"\0")
    info = attribute(_INFO_KIND, b"ipip") + attribute(_INFO_DATA, data)
    body = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
    body += attribute(_IFLA_MTU, _U32.pack(mtu)) + attribute(_IFLA_LINKINFO, info)
    return Message(NEWLINK, F_CREATE | F_EXCL, body)


def new_plain(name: str, kind: str, mtu: int) -> Message:
    """Create a device of a kind that takes its settings elsewhere."""
    body = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
    body += attribute(_IFLA_MTU, _U32.pack(mtu)) + attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, kind.encode()))
    return Message(NEWLINK, F_CREATE | F_EXCL, body)


def change_link(index: int, *, mtu: int | None = None, up: bool | None = None, mac: bytes | None = None) -> Message:
    """Change an interface in place."""
    flags = IFF_UP if up else 0
    body = _LINK.pack(0, 0, index, flags, IFF_UP if up is not None else 0)
    if mtu is not None:
        body += attribute(_IFLA_MTU, _U32.pack(mtu))
    if mac is not None:
        body += attribute(_IFLA_ADDRESS, mac)
    return Message(NEWLINK, 0, body)


def change_learning(index: int, vni: int, learning: bool) -> Message:
    """Switch a vxlan device's learning without touching anything else of it."""
    data = attribute(_VXLAN_ID, _U32.pack(vni)) + attribute(_VXLAN_LEARNING, bytes([learning]))
    info = attribute(_INFO_KIND, b"vxlan") + attribute(_INFO_DATA, data)
    return Message(NEWLINK, 0, _LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_LINKINFO, info))


def delete_link(index: int) -> Message:
    """Delete an interface."""
    return Message(DELLINK, 0, _LINK.pack(0, 0, index, 0, 0))


# -- addresses -----------------------------------------------------------------------------------------------------


def parse_address(payload: bytes) -> Address:
    """Decode RTM_NEWADDR or RTM_DELADDR."""
    family, length, flags, scope, index = _ADDRESS.unpack_from(payload)
    found = attributes(payload, _ADDRESS.size)
    ip = _integer(found.get(2) or found.get(1))
    return Address(index, ip, length, scope, _u32(found.get(8)) or flags, _version(family))


def dump_addresses(netlink: Netlink, index: int = 0, version: int = 4) -> list[Address]:
    """Addresses of one IP version, of one interface or of all."""
    family = _family(version)
    rows = netlink.dump(GETADDR, _ADDRESS.pack(family, 0, 0, 0, index))
    seen = [parse_address(row) for row in rows if row[0] == family]
    return [address for address in seen if index in (0, address.ifindex)]


def new_address(index: int, ip: int, length: int, version: int = 4) -> Message:
    """Give an interface an address of global scope."""
    return Message(NEWADDR, F_CREATE | F_REPLACE, _address(index, ip, length, version))


def delete_address(index: int, ip: int, length: int, version: int = 4) -> Message:
    """Take an address off an interface."""
    return Message(DELADDR, 0, _address(index, ip, length, version))


def _address(index: int, ip: int, length: int, version: int) -> bytes:
    # Nobody else can have an address of ours: asking around for a second would only delay the start.
    flags = 0 if version == 4 else _NODAD
    body = _ADDRESS.pack(_family(version), length, flags, 0, index)
    return body + attribute(2, packed(ip, version)) + attribute(1, packed(ip, version))


# -- neighbours and FDB entries ------------------------------------------------------------------------------------


def parse_entry(payload: bytes) -> SeenEntry:
    """Decode RTM_NEWNEIGH or RTM_DELNEIGH: a neighbour, or an FDB entry of the device itself."""
    family, index, state, flags, _ = _NEIGH.unpack_from(payload)
    found = attributes(payload, _NEIGH.size)
    address = found.get(1, b"")
    ip, mac = _integer(address), found.get(2, b"")
    if family in (socket.AF_INET, socket.AF_INET6):
        return SeenEntry(Neigh(index, ip, mac, _version(family)), index, state)
    if family == _AF_BRIDGE and flags & _NTF_SELF:
        return SeenEntry(Fdb(index, mac, ip, 6 if len(address) == 16 else 4), index, state)
    return SeenEntry(None, index, state)


def dump_neighbours(netlink: Netlink, index: int, version: int = 4) -> list[SeenEntry]:
    """Neighbours of one interface, of whatever state."""
    body = _NEIGH.pack(_family(version), 0, 0, 0, 0) + attribute(8, _U32.pack(index))
    seen = (parse_entry(row) for row in netlink.dump(GETNEIGH, body))
    return [one for one in seen if one.ifindex == index]


def dump_fdb(netlink: Netlink, index: int) -> list[SeenEntry]:
    """FDB entries of one vxlan device, of whatever state."""
    seen = (parse_entry(row) for row in netlink.dump(GETNEIGH, _NEIGH.pack(_AF_BRIDGE, index, 0, 0, 0)))
    return [one for one in seen if one.ifindex == index and isinstance(one.entry, Fdb)]


def set_entry(entry: Neigh | Fdb) -> Message:
    """Create or replace a permanent entry."""
    return Message(NEWNEIGH, F_CREATE | F_REPLACE, _entry(entry, PERMANENT))


def delete_entry(entry: Neigh | Fdb) -> Message:
    """Delete an entry."""
    return Message(DELNEIGH, 0, _entry(entry, 0))


def _entry(entry: Neigh | Fdb, state: int) -> bytes:
    if isinstance(entry, Neigh):
        body = _NEIGH.pack(_family(entry.version), entry.ifindex, state, 0, 0)
        body += attribute(1, packed(entry.ip, entry.version))
        return body + (attribute(2, entry.mac) if state else b"")
    body = _NEIGH.pack(_AF_BRIDGE, entry.ifindex, state, _NTF_SELF, 0)
    return body + attribute(2, entry.mac) + attribute(1, packed(entry.dst, entry.version))


# -- routes --------------------------------------------------------------------------------------------------------


def parse_route(payload: bytes) -> SeenRoute:
    """Decode RTM_NEWROUTE or RTM_DELROUTE."""
    family, length, _, tos, table, protocol, scope, kind, flags = _ROUTE.unpack_from(payload)
    found = attributes(payload, _ROUTE.size)
    route = Route(
        _integer(found.get(1)), length, _integer(found.get(5)),
        # A blackhole of IPv6 is shown with the loopback device, which nobody gave it.
        _u32(found.get(4)) if kind != BLACKHOLE else 0, bool(flags & _ONLINK), kind,
        _u32(found.get(6)), _version(family), scope,
    )  # fmt: skip
    table = _u32(found.get(15)) or table
    return SeenRoute(route, protocol, tos, 9 in found, table, _integer(found.get(7)), bool(found.keys() & _MORE))


def dump_routes(netlink: Netlink, version: int = 4) -> list[SeenRoute]:
    """Routes of the main table."""
    family = _family(version)
    body = _ROUTE.pack(family, 0, 0, 0, MAIN_TABLE, 0, 0, 0, 0)
    seen = (parse_route(row) for row in netlink.dump(GETROUTE, body) if row[0] == family)
    return [one for one in seen if one.table == MAIN_TABLE]


def lookup_route(netlink: Netlink, ip: int, version: int = 4) -> SeenRoute:
    """Ask the kernel how it would reach an address. Raises NetlinkError where it cannot."""
    bits = 32 if version == 4 else 128
    body = _ROUTE.pack(_family(version), bits, 0, 0, 0, 0, 0, 0, 0) + attribute(1, packed(ip, version))
    return parse_route(netlink.request(Message(GETROUTE, 0, body))[0][1])


def set_route(route: Route) -> Message:
    """Create or replace a route, by its destination and metric, in the main table."""
    return Message(NEWROUTE, F_CREATE | F_REPLACE, _route(route, PROTOCOL_BOOT, route.scope))


def delete_route(route: Route) -> Message:
    """Delete exactly this route."""
    return Message(DELROUTE, 0, _route(route, 0, _SCOPE_NOWHERE))


def _route(route: Route, protocol: int, scope: int) -> bytes:
    flags = _ONLINK if route.onlink else 0
    body = _ROUTE.pack(
        _family(route.version), route.length, 0, 0, MAIN_TABLE, protocol, scope, route.kind, flags
    )  # fmt: skip
    body += attribute(1, packed(route.dst, route.version))
    if route.gateway:
        body += attribute(5, packed(route.gateway, route.version))
    if route.oif and route.kind == UNICAST:
        body += attribute(4, _U32.pack(route.oif))
    if route.metric:
        body += attribute(6, _U32.pack(route.metric))
    return body


def network_of(route: Route) -> IPv4Network | IPv6Network:
    """The destination of a route."""
    if route.version == 4:
        return IPv4Network((route.dst, route.length), strict=False)
    return IPv6Network((route.dst, route.length), strict=False)
