"""Which interface and address other nodes reach this node by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeVar

from flannel import log
from flannel.kernel import rtnl, values
from flannel.kernel.netlink import Netlink, NetlinkError
from flannel.kernel.values import UNICAST, Link
from flannel.lease import Address

_TEMPORARY, _DEPRECATED, _PERMANENT = 0x01, 0x20, 0x80


class InterfaceError(Exception):
    """No interface fits what was asked for; the text says what was looked for and what there is."""


class External(NamedTuple):
    """The chosen interface: its address, and the address that is published (equal unless --public-ip says else).

    With IPv6 alone both are IPv6's, and the last two are empty.
    """

    ifindex: int
    name: str
    mtu: int
    address: Address
    public: Address
    address6: IPv6Address | None = None  # both in dual stack only
    public6: IPv6Address | None = None


class Wanted(NamedTuple):
    """What the command line says about the interface."""

    names: Sequence[str] = ()
    expressions: Sequence[str] = ()
    can_reach: str = ""
    public_ip: str = ""
    public_ipv6: str = ""
    ipv6: bool = False
    ipv4: bool = True

    @property
    def family(self) -> type[IPv4Address] | type[IPv6Address]:
        """The addresses by which the interface is chosen: IPv6's with IPv6 alone."""
        return IPv4Address if self.ipv4 else IPv6Address


def choose(netlink: Netlink, wanted: Wanted) -> External:
    """Choose the interface. Raises InterfaceError."""
    family = wanted.family
    text, option = (wanted.public_ip, "--public-ip") if wanted.ipv4 else (wanted.public_ipv6, "--public-ipv6")
    public = _ip(text, option, family) if text else None
    link, address = _search(netlink, wanted, public)
    if address is None:
        address = _best_address(netlink, link, family)
    if not link.mtu:
        raise InterfaceError(f"interface {link.name} has no MTU")
    log.info(f"Using interface with name {link.name} and address {address}")
    if public is None:
        log.info(f"Defaulting external address to interface address ({address})")
    else:
        log.info(f"Using {public} as external address")
    external = External(link.ifindex, link.name, link.mtu, address, public or address)
    return _with_ipv6(netlink, external, wanted) if wanted.ipv6 and wanted.ipv4 else external


def _with_ipv6(netlink: Netlink, external: External, wanted: Wanted) -> External:
    """The same interface's address of IPv6, and the one that is published."""
    try:
        public = IPv6Address(wanted.public_ipv6) if wanted.public_ipv6 else None
    except ValueError:
        raise InterfaceError(f"--public-ipv6 is {wanted.public_ipv6!r}, not an IPv6 address") from None
    usable = _ordered(rtnl.dump_addresses(netlink, external.ifindex, 6), IPv6Address)
    if not usable:
        raise InterfaceError(f"interface {external.name} has no usable IPv6 address, which EnableIPv6 needs")
    address = usable[0]
    log.info(f"Using {address} of {external.name} for IPv6, and {public or address} as external address")
    return external._replace(address6=address, public6=public or address)


_Family = type[IPv4Address] | type[IPv6Address]
_Found = tuple[Link, Address | None]


def _search(netlink: Netlink, wanted: Wanted, public: Address | None) -> _Found:
    family = wanted.family
    attempts: list[tuple[str, Callable[[], _Found]]] = []
    for name in wanted.names:
        attempts.append((f"--iface={name}", lambda name=name: _by_name(netlink, name, family)))  # type: ignore[misc]
    for text in wanted.expressions:
        attempts.append((f"--iface-regex={text}", lambda text=text: _by_regex(netlink, text, family)))  # type: ignore[misc]
    if wanted.can_reach:
        attempts.append((f"--iface-can-reach={wanted.can_reach}", lambda: _by_reach(netlink, wanted.can_reach, family)))
    if not attempts:
        return _by_name(netlink, str(public), family) if public else _by_default_route(netlink, family)
    for option, attempt in attempts:
        try:
            return attempt()
        except InterfaceError as error:
            log.warning(f"Could not find valid interface matching {option}: {error}")
    raise InterfaceError("none of the interfaces asked for is there: " + ", ".join(option for option, _ in attempts))


def _version(family: _Family) -> int:
    return 4 if family is IPv4Address else 6


def _ip(text: str, option: str, family: _Family) -> Address:
    try:
        return family(text)
    except ValueError:
        raise InterfaceError(f"{option} is {text!r}, not an IPv{_version(family)} address") from None


def _link(netlink: Netlink, *, index: int = 0, name: str = "") -> Link:
    link = rtnl.get_link(netlink, index=index, name=name)
    if link is None:
        raise InterfaceError(f"there is no interface {name or index}; there are {_inventory(netlink, IPv4Address)}")
    return link


def _inventory(netlink: Netlink, family: _Family) -> str:
    version = _version(family)
    addresses = rtnl.dump_addresses(netlink, version=version)
    shown = []
    for link in rtnl.dump_links(netlink):
        own = [str(family(address.ip)) for address in addresses if address.ifindex == link.ifindex]
        shown.append(f"{link.name} ({', '.join(own) or f'no IPv{version} address'})")
    return ", ".join(shown)


def _by_name(netlink: Netlink, name: str, family: _Family) -> _Found:
    try:
        address = family(name)
    except ValueError:
        if ":" in name:
            raise InterfaceError(f"{name!r} is not an IPv{_version(family)} address") from None
        return _link(netlink, name=name), None
    for one in rtnl.dump_addresses(netlink, version=_version(family)):
        if one.ip == int(address):
            return _link(netlink, index=one.ifindex), address
    raise InterfaceError(f"no interface has the address {address}; there are {_inventory(netlink, family)}")


def _by_regex(netlink: Netlink, text: str, family: _Family) -> _Found:
    import re  # only here: it costs start-up time and memory

    try:
        expression = re.compile(text)
    except re.error as error:
        raise InterfaceError(f"not a regular expression: {error}") from None
    links = rtnl.dump_links(netlink)
    addresses = rtnl.dump_addresses(netlink, version=_version(family))
    for link in links:
        for address in _ordered([one for one in addresses if one.ifindex == link.ifindex], family):
            if expression.search(str(address)):
                return link, address
    for link in links:
        if expression.search(link.name):
            return link, None
    raise InterfaceError(f"no address and no name matches; there are {_inventory(netlink, family)}")


def _by_reach(netlink: Netlink, text: str, family: _Family) -> _Found:
    target = _ip(text, "--iface-can-reach", family)
    try:
        route = rtnl.lookup_route(netlink, int(target), target.version)
    except NetlinkError as error:
        raise InterfaceError(f"no route to {target}: {error.strerror or error}") from None
    return _link(netlink, index=route.route.oif), family(route.preferred) if route.preferred else None


def _by_default_route(netlink: Netlink, family: _Family) -> _Found:
    for seen in rtnl.dump_routes(netlink, _version(family)):
        if seen.route.length == 0 and seen.route.kind == UNICAST:
            if seen.multipath or not seen.route.oif:
                raise InterfaceError(
                    "the default route has several paths, so it does not say which interface to use; give --iface"
                )
            return _link(netlink, index=seen.route.oif), None
    raise InterfaceError(f"there is no default route; give --iface. There are {_inventory(netlink, family)}")


_Ip = TypeVar("_Ip", bound=Address)


def _ordered(addresses: list[values.Address], family: Callable[[int], _Ip]) -> list[_Ip]:
    """Usable addresses, best first: global before link-local, permanent before dynamic, then not temporary."""
    usable: list[tuple[tuple[bool, bool, bool], int, _Ip]] = []
    for address in addresses:
        ip = family(address.ip)
        if address.flags & _DEPRECATED or ip.is_loopback or ip.is_multicast or ip.is_unspecified:
            continue
        rank = (ip.is_link_local, not address.flags & _PERMANENT, bool(address.flags & _TEMPORARY))
        usable.append((rank, len(usable), ip))
    return [ip for _, _, ip in sorted(usable)]


def _best_address(netlink: Netlink, link: Link, family: _Family) -> Address:
    version = _version(family)
    usable = _ordered(rtnl.dump_addresses(netlink, link.ifindex, version), family)
    if not usable:
        raise InterfaceError(f"interface {link.name} has no usable IPv{version} address")
    return usable[0]
