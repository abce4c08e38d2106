"""Reasons of a packet that is too large: for its sender, a device, a wire or a tunnel."""

from __future__ import annotations

from testbed.flannelspec import BACKENDS, OVERHEAD6
from testbed.trace.loss import Loss
from testbed.trace.model import Cause


def refused_as_too_large(loss: Loss) -> Cause | None:
    """The sender's own kernel refused it."""
    if loss.error != "Message too long":
        return None
    what = f"it may not be fragmented, and {loss.trace.source} sends no more than {loss.mtu or '?'} bytes"
    return Cause("mtu", what, (f"{loss.trace.packet['size']} bytes of payload", loss.error))


def too_large_by_error(loss: Loss) -> Cause | None:
    """Somebody said so by an ICMP error."""
    errors = [hop for hop in loss.trace.errors if hop.error.startswith("fragmentation needed")]
    if not errors:
        return None
    first = errors[0]
    mtu = first.error.rpartition(" ")[2]
    return Cause("mtu", f"{first.place} can pass on no more than {mtu} bytes", (f"{first.where}: {first.error}",))


def larger_than_egress(loss: Loss) -> Cause | None:
    """It is larger than the device's MTU."""
    site = loss.site
    mtu = site.mtu(loss.interface) if site else 0
    if site is None or not mtu or loss.bytes <= mtu:
        return None
    whole = loss.packet is not None and loss.packet.dont_fragment
    if not whole and not site.master_bridge(loss.interface):
        return None  # it is taken to pieces there
    line = f"{loss.interface} mtu {mtu}, packet of {loss.bytes} bytes"
    return Cause("mtu", f"it is larger than the MTU of {site.place}'s {loss.interface}", (line,))


def larger_than_wire(loss: Loss) -> Cause | None:
    """It is larger than the MTU of the interface at the other end."""
    far = loss.sites.get(loss.place)
    mtu = far.mtu(loss.interface) if far else 0
    if not mtu or loss.bytes <= mtu:
        return None
    line = f"{loss.place}:{loss.interface} mtu {mtu}, packet of {loss.bytes} bytes"
    return Cause("mtu", f"it is larger than the MTU of {loss.place}'s {loss.interface}", (line,))


def larger_than_tunnel(loss: Loss) -> Cause | None:
    """With what the tunnel adds it is larger than the underlay's MTU, and may not be fragmented."""
    site, last = loss.site, loss.last
    if (
        site is None
        or last is None
        or site.link(last.interface).get("linkinfo", {}).get("info_data", {}).get("df") not in ("set", "inherit")
    ):
        return None
    mtu, inner = site.mtu(loss.interface), site.mtu(last.interface)
    added = OVERHEAD6["vxlan"] if loss.layout.six else BACKENDS["vxlan"].overhead
    if not mtu or loss.bytes + added <= mtu:
        return None
    lines = (f"{last.interface} mtu {inner}", f"{loss.interface} mtu {mtu}")
    return Cause(
        "mtu", f"with the tunnel's headers it is larger than the MTU of {site.place}'s {loss.interface}", lines
    )
