"""subnet.env: what the node's other programs read about its subnet."""

from __future__ import annotations

import contextlib
import os
import stat
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple, TypeVar

from flannel.lease import Network


class Previous(NamedTuple):
    """What an earlier run wrote; None where it is missing or unusable."""

    network: IPv4Network | None = None
    subnet: IPv4Network | None = None
    network6: IPv6Network | None = None
    subnet6: IPv6Network | None = None

    def of(self, version: int) -> tuple[IPv4Network | IPv6Network | None, IPv4Network | IPv6Network | None]:
        """Network and subnet of IP version 4 or 6."""
        return (self.network, self.subnet) if version == 4 else (self.network6, self.subnet6)


def render(
    network: Network, subnet: Network, mtu: int, masquerade: bool,
    network6: IPv6Network | None = None, subnet6: IPv6Network | None = None,
) -> str:  # fmt: skip
    """The file's text, of IPv6 alone where the first network is. A subnet is written as its first host address."""
    lines = []
    for whole, own in ((network, subnet), (network6, subnet6)):
        if whole is not None and own is not None:
            prefix = "FLANNEL" if whole.version == 4 else "FLANNEL_IPV6"
            lines += [f"{prefix}_NETWORK={whole}", f"{prefix}_SUBNET={own.network_address + 1}/{own.prefixlen}"]
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={'true' if masquerade else 'false'}"]
    return "\n".join(lines) + "\n"


def write(path: str, text: str) -> None:
    """Replace the file in one step: mode 0644, or the mode of a file that is there. Raises OSError."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, mode=0o755, exist_ok=True)
    mode = 0o644
    try:
        there = os.stat(path)
        if stat.S_ISREG(there.st_mode):
            mode = stat.S_IMODE(there.st_mode)
    except FileNotFoundError:
        pass
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.urandom(6).hex()}")
    try:
        with open(temporary, "x", encoding="utf-8", errors="surrogateescape") as output:
            os.fchmod(output.fileno(), mode)
            output.write(text)
            output.flush()
            os.fsync(output.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: str) -> Previous:
    """What an earlier run left; a missing or unusable file or value is None, never an error."""
    values: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, equals, value = line.strip().partition("=")
                if equals:
                    values[key.strip()] = value.strip().strip("\"'")
    except OSError:
        return Previous()
    return Previous(
        _network(IPv4Network, values.get("FLANNEL_NETWORK")),
        _network(IPv4Network, values.get("FLANNEL_SUBNET")),
        _network(IPv6Network, values.get("FLANNEL_IPV6_NETWORK")),
        _network(IPv6Network, values.get("FLANNEL_IPV6_SUBNET")),
    )


_Family = TypeVar("_Family", IPv4Network, IPv6Network)


def _network(family: type[_Family], text: str | None) -> _Family | None:
    try:
        return family(text or "", strict=False)
    except ValueError:
        return None
