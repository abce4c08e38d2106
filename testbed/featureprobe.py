"""What this kernel lets a lab do: found out by doing it, in namespaces that end with this process.

This file is a program: `python -I -S featureprobe.py` prints one JSON object, name → {"ok": bool, "detail": str}.
It takes the steps that a lab takes, in the same order (a user namespace of one id, another one inside, then all the
other kinds), and then makes one of each device, rule and mount.  Nothing of it is seen by the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_REC_PRIVATE = 16384 | 1 << 18
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, EFAULT = 22, 2, 14
COMMAND_SECONDS = 10.0

Found = dict[str, dict[str, object]]

libc = ctypes.CDLL(None, use_errno=True)


def _call(done: int, what: str) -> None:
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(kind: str, target: str, options: str = "") -> None:
    os.makedirs(target, exist_ok=True)
    _call(libc.mount(kind.encode(), target.encode(), kind.encode(), 0, options.encode() or None), f"mount {kind}")


def _new_user_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    _call(libc.unshare(NEWUSER), "unshare(CLONE_NEWUSER)")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _tun() -> None:
    device = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"probetun", IFF_TUN | IFF_NO_PI))
    finally:
        os.close(device)


def _packet() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


def _seccomp() -> None:
    # A filter at address 0 is refused with EFAULT where filters are known at all.
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
    if ctypes.get_errno() != EFAULT:
        raise OSError(ctypes.get_errno(), "the kernel has no seccomp filters")


def _overlay() -> None:
    for name in ("lower", "upper", "work", "merged"):
        os.makedirs(f"/run/{name}")
    _mount("overlay", "/run/merged", "lowerdir=/run/lower,upperdir=/run/upper,workdir=/run/work")


def _commands(*lines: str) -> Callable[[], None]:
    def make() -> None:
        for line in lines:
            done = subprocess.run(
                line.split(), capture_output=True, text=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL
            )
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()
                short = line if len(line) < 60 else f"{line[:56]} …"
                raise OSError(0, f"`{short}`: {said[0] if said else f'exited {done.returncode}'}")

    return make


MASQUERADE = "-t nat -A POSTROUTING -s 10.9.0.0/16 -m comment --comment probe -j MASQUERADE --random-fully"
ESP = "proto esp spi 0x100 mode tunnel aead rfc4106(gcm(aes))"

MOUNTS: dict[str, Callable[[], None]] = {
    "tmpfs": lambda: _mount("tmpfs", "/run", "mode=0755,size=16m"),
    "proc": lambda: _mount("proc", "/proc"),
    "sysfs": lambda: _mount("sysfs", "/sys"),
    "overlay": _overlay,
}

FEATURES: dict[str, Callable[[], None]] = {
    "veth": _commands("ip link add v0 type veth peer name v1", "ip link set v0 up", "ip link set v1 up"),
    "bridge": _commands("ip link add br0 type bridge"),
    "multipath": _commands("ip route add 10.8.0.0/24 nexthop dev v0 nexthop dev v1"),
    "hash_policy": lambda: _write("/proc/sys/net/ipv4/fib_multipath_hash_policy", "1"),
    "ipv6": _commands("ip -6 address add fd00::1/64 dev v0"),
    "packet": _packet,
    "seccomp": _seccomp,
    "conntrack": _commands("conntrack -L"),
    "iptables_nft": _commands(f"iptables-nft {MASQUERADE}"),
    "iptables_legacy": _commands(f"iptables-legacy {MASQUERADE}"),
    "nftables": _commands(
        "nft add table ip probe",
        "nft add chain ip probe c { type nat hook postrouting priority 100 ; }",
        "nft add rule ip probe c masquerade fully-random",
    ),
    "br_netfilter": lambda: os.close(os.open("/proc/sys/net/bridge/bridge-nf-call-iptables", os.O_RDONLY)),
    "vxlan": _commands("ip link add vx0 type vxlan id 1 dstport 8472 nolearning"),
    "tun": _tun,
    "ipip": _commands("ip link add ipip1 type ipip local 10.9.9.9 remote 10.9.9.8"),
    "wireguard": _commands("ip link add wg0 type wireguard"),
    "xfrm": _commands("ip xfrm policy add src 10.9.9.1/32 dst 10.9.9.2/32 dir out"),
    "esp4": _commands(f"ip xfrm state add src 10.9.9.1 dst 10.9.9.2 {ESP} 0x{'5a' * 20} 128"),
    "netem": _commands("tc qdisc add dev v0 root netem delay 1ms"),
}
"""What is made of each kind, in this order: `veth` and `proc` serve the later ones."""


def _try(found: Found, name: str, make: Callable[[], None]) -> bool:
    try:
        make()
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        found[name] = {"ok": False, "detail": detail}
        return False
    found[name] = {"ok": True, "detail": ""}
    return True


def _inside(found: Found) -> None:
    """Runs as the first process of the new PID namespace."""
    _call(libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None), "making mounts private")
    for name, make in MOUNTS.items():
        _try(found, name, make)
    for name, make in FEATURES.items():
        _try(found, name, make)


def probe() -> Found:
    """Make everything once; say of each whether it could be made."""
    found: Found = {}
    if not _try(found, "user_namespace", _new_user_namespace):
        return found
    if not _try(found, "nested_user_namespace", _new_user_namespace):
        return found
    others = NEWNS | NEWNET | NEWPID | NEWUTS | NEWIPC
    if not _try(found, "namespaces", lambda: _call(libc.unshare(others), "unshare(net, mnt, pid, uts, ipc)")):
        return found
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            _inside(found)
        with open(writer, "w") as answer:
            json.dump(found, answer)
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else found


if __name__ == "__main__":
    json.dump(probe(), sys.stdout)
