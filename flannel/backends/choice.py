"""Which backend a network configuration asks for, and what becomes of an earlier one's devices."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module

from flannel import log
from flannel.backends.base import Backend, BackendError
from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink
from flannel.netconf import NetConf

#: Backends that can carry IPv6, beside IPv4 or alone.
_IPV6 = ("vxlan", "host-gw", "wireguard", "extension")
#: Backend types by module and class: only the one in use is loaded.
BACKENDS = {
    "vxlan": ("vxlan", "VxlanBackend"),
    "host-gw": ("hostgw", "HostGwBackend"),
    "ipip": ("ipip", "IpipBackend"),
    "wireguard": ("wireguard", "WireguardBackend"),
    "ipsec": ("ipsec", "IpsecBackend"),
    "udp": ("udp", "UdpBackend"),
    "extension": ("extension", "ExtensionBackend"),
    "alloc": ("alloc", "AllocBackend"),
}
_INSTEAD = "; use vxlan, or host-gw where the nodes share a link, or extension with commands of your own"
_REFUSED = {
    "tencent-vpc": "writes a cloud's route table, which this flanneld does not" + _INSTEAD,
    **dict.fromkeys(("aws-vpc", "gce", "ali-vpc"), "was taken out of flannel in v0.20.0" + _INSTEAD),
}


def make_backend(conf: NetConf, external: External) -> Backend:
    """The backend that the configuration names. Raises BackendError or NetConfError."""
    known = BACKENDS.get(conf.backend_type)
    if known is None:
        if conf.backend_type in _REFUSED:
            raise BackendError(f"backend type {conf.backend_type!r} {_REFUSED[conf.backend_type]}")
        raise BackendError(f"unknown backend type {conf.backend_type!r}; known are {', '.join(BACKENDS)}")
    if conf.enable_ipv6 and conf.backend_type not in _IPV6:
        raise BackendError(
            f"{conf.backend_type} carries IPv4 alone: enable nothing else, or use one of {', '.join(_IPV6)}"
        )
    module, name = known
    backend: Backend = getattr(import_module(f"flannel.backends.{module}"), name)(conf, external)
    return backend


def remove_devices(netlink: Netlink, left: Collection[str]) -> None:
    """Remove the tunnel devices that an earlier run recorded, where this run does not use them."""
    for name in left:
        if name == "xfrm-policies":
            from flannel.backends.ipsec import remove_policies

            remove_policies()
            continue
        link = rtnl.get_link(netlink, name=name)
        if link is not None and link.kind in ("vxlan", "ipip", "wireguard"):
            log.warning(f"removing {name}, which an earlier run made for another configuration")
            netlink.batch([rtnl.delete_link(link.ifindex)])
