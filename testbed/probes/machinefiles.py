"""What a machine's files say of its network: settings, what flannel and CNI are told, and whether flanneld runs.

Part of the program `stateof`.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator

NET = "/proc/sys/net"
SYSCTLS = (
    "ipv4/fib_multipath_hash_policy",
    "ipv4/icmp_echo_ignore_all",
    "ipv4/ip_default_ttl",
    "ipv4/ip_local_port_range",
    "ipv4/ip_no_pmtu_disc",
    "ipv6/conf/all/forwarding",
    "bridge/bridge-nf-call-ip6tables",
    "bridge/bridge-nf-call-iptables",
)
NEIGHBOURS = ("ipv4/neigh", "ipv6/neigh")
"""Where the settings are that each device has for its neighbours."""
FILES = {"/etc/cni/net.d": "", "/run/flannel": ".env"}
"""The folders of small files, and how the names of those end that are told: flanneld has others for itself."""
PID_FILE = "/run/flanneld.pid"
STATES = {b"T": "is stopped", b"t": "is stopped", b"Z": "has ended", b"X": "has ended"}
"""By the letter in /proc/PID/stat; by any other it runs."""


def told_by_files() -> list[str]:
    """Line by line."""
    return [*settings(), *files(), *flanneld()]


def settings() -> Iterator[str]:
    """What is set, for the machine and for each device but pods', which come and go."""
    names = list(SYSCTLS)
    for folder in NEIGHBOURS:
        devices = [name for name in listed(f"{NET}/{folder}") if not name.startswith("veth")]
        names += [f"{folder}/{device}/proxy_delay" for device in devices]
    for name in names:
        with contextlib.suppress(OSError):
            yield f"sysctl {name} {' '.join(read(f'{NET}/{name}').decode().split())}"


def files() -> Iterator[str]:
    """Small files, by what is in them."""
    for path in [f"{folder}/{name}" for folder, end in FILES.items() for name in listed(folder) if name.endswith(end)]:
        with contextlib.suppress(OSError):
            yield f"file {path} {zlib.crc32(read(path)):08x}"


def flanneld() -> Iterator[str]:
    """Whether the flanneld that was started last runs; nothing where none ever was."""
    with contextlib.suppress(OSError):
        pid, state = read(PID_FILE).decode().strip(), b"X"
        with contextlib.suppress(OSError):
            state = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0]
        yield f"flanneld {STATES.get(state, 'runs')}"


def listed(folder: str) -> list[str]:
    """The names in a folder; none where there is none."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(folder))
    return []


def read(path: str) -> bytes:
    """A file, whole."""
    with open(path, "rb") as file:
        return file.read()
