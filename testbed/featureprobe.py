"""What this kernel lets a lab do: found out by doing it, in namespaces that end with this process.

This file is a program: `python -I -S featureprobe.py` prints one JSON object, name → {"ok": bool, "detail": str}.
It takes the steps that a lab takes, in the same order (a user namespace of one id, another one inside, then all the
other kinds), and then makes one of each device, rule and mount.  Nothing of it is seen by the host.

With `--all` it also sends packets through what it makes, to a second network namespace, which takes seconds; a name
that is missing then could not be tried, for want of a tool.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_REC_PRIVATE = 16384 | 1 << 18
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER, EFAULT = 22, 38, 2, 14
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
    "vrf": _commands("ip link add red0 type vrf table 111", "ip link set red0 up"),
}
"""What is made of each kind, in this order: `veth` and `proc` serve the later ones."""

PEER = "ip -n peer"
PING = "ping -n -c 1 -W 3 -I"
KEYS = {"gcm": 20, "cbc": 16, "chacha": 36, "hmac": 32}
ESP_KINDS = {
    "esp_gcm": f"aead rfc4106(gcm(aes)) 0x{'5a' * KEYS['gcm']} 128",
    "esp_cbc": f"enc cbc(aes) 0x{'5a' * KEYS['cbc']} auth-trunc hmac(sha256) 0x{'5b' * KEYS['hmac']} 128",
    "esp_chacha": f"aead rfc7539esp(chacha20,poly1305) 0x{'5a' * KEYS['chacha']} 128",
}


def _through(make: str, peer: str, device: str, net: int) -> Callable[[], None]:
    """Both ends of a tunnel between the two namespaces, and a packet that has to come back through it."""
    return _commands(
        f"ip link add {device} {make}",
        f"ip address add 10.{net}.0.1/24 dev {device}",
        f"ip link set {device} up",
        f"{PEER} link add {device} {peer}",
        f"{PEER} address add 10.{net}.0.2/24 dev {device}",
        f"{PEER} link set {device} up",
        f"{PING} {device} 10.{net}.0.2",
    )


def _tunnel(kind: str, device: str, net: int) -> Callable[[], None]:
    ends = ("local 10.20.0.1 remote 10.20.0.2", "local 10.20.0.2 remote 10.20.0.1")
    return _through(f"type {kind} {ends[0]}", f"type {kind} {ends[1]}", device, net)


def _sit() -> None:
    """IPv6 in IPv4; the ipip device of the same ends would take IPv4's."""
    for ip, near, far in (("ip", 1, 2), (PEER, 2, 1)):
        _commands(
            f"{ip} link add sitp type sit local 10.20.0.{near} remote 10.20.0.{far}",
            f"{ip} address add fd35::{near}/64 dev sitp nodad",
            f"{ip} link set sitp up",
        )()
    _commands("ping -6 -n -c 1 -W 3 -I sitp fd35::2")()


def _esp(algorithm: str) -> Callable[[], None]:
    """Transport mode between the two namespaces: what is not encrypted is dropped by either side's policy."""
    lines = ["ip xfrm state flush", "ip xfrm policy flush", f"{PEER} xfrm state flush", f"{PEER} xfrm policy flush"]
    here, there = "10.20.0.1", "10.20.0.2"
    for ip in ("ip", PEER):
        for source, target, spi in ((here, there, "0x101"), (there, here, "0x102")):
            lines.append(
                f"{ip} xfrm state add src {source} dst {target} proto esp spi {spi} mode transport {algorithm}"
            )
            way = "out" if (source == here) == (ip == "ip") else "in"
            lines.append(
                f"{ip} xfrm policy add src {source} dst {target} dir {way} tmpl src {source} dst {target} "
                "proto esp mode transport"
            )
    make = _commands(*lines, f"{PING} w0 {there}")

    def prove() -> None:
        make()
        state = _output("ip", "-s", "xfrm", "state")
        _commands(*lines[:4])()
        if len(re.findall(r"[1-9]\d*\(packets\)", state)) != 2:  # there and back
            raise OSError(0, "the packet went past ESP")

    return prove


def _output(*argv: str, given: str | None = None) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False, input=given)
    if done.returncode:
        raise OSError(0, f"`{' '.join(argv[:5])}`: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _wireguard() -> None:
    keys = [_output("wg", "genkey").strip() for _ in range(2)]
    for end, inside in enumerate(([], ["ip", "netns", "exec", "peer"])):
        other = _output("wg", "pubkey", given=keys[1 - end]).strip()
        _output(*inside, "ip", "link", "add", "wgp", "type", "wireguard")
        argv = [*inside, "wg", "set", "wgp", "listen-port", str(51820 + end), "private-key", "/dev/stdin"]
        argv += ["peer", other, "endpoint", f"10.20.0.{2 - end}:{51821 - end}", "allowed-ips", "10.37.0.0/24"]
        _output(*argv, given=keys[end])
        _output(*inside, "ip", "address", "add", f"10.37.0.{end + 1}/24", "dev", "wgp")
        _output(*inside, "ip", "link", "set", "wgp", "up")
    _commands(f"{PING} wgp 10.37.0.2")()


def _netem() -> None:
    _commands("tc qdisc add dev w0 root netem delay 50ms")()
    said = _output("ping", "-n", "-c", "1", "-W", "3", "10.20.0.2")
    _commands("tc qdisc del dev w0 root")()
    if "time=" not in said or float(said.partition("time=")[2].split()[0]) < 50:
        raise OSError(0, "a packet that was to be delayed by 50 ms was not")


def _answer_setgroups() -> None:
    """Let setgroups() do nothing, which a user namespace of one id refuses and tcpdump insists on."""
    machine, number = {"x86_64": (0xC000003E, 116), "aarch64": (0xC00000B7, 159)}[os.uname().machine]
    steps = [(0x20, 0, 0, 4), (0x15, 0, 3, machine), (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000)]
    code = b"".join(struct.pack("HBBI", *step) for step in [*steps, (0x06, 0, 0, 0x7FFF0000)])
    program = ctypes.create_string_buffer(code, len(code))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program))
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


def _tcpdump() -> None:
    argv = ["tcpdump", "-i", "w0", "-n", "-U", "--immediate-mode", "-Z", "root", "-c", "1", "icmp"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, preexec_fn=_answer_setgroups) as capture:
        assert capture.stderr
        for line in capture.stderr:
            if line.startswith("listening"):
                break
        else:
            raise OSError(0, "tcpdump does not start")
        _commands("ping -n -c 3 -i 0.2 -W 3 10.20.0.2")()
        try:
            out, _ = capture.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            capture.kill()
            raise
    if "ICMP echo" not in out:
        raise OSError(0, "tcpdump saw no packet")


def _conntrack() -> None:
    _commands("nft add table ip track", "nft add chain ip track c { type filter hook output priority 0 ; }")()
    _commands("nft add rule ip track c ct state new counter", "ping -n -c 1 -W 3 10.20.0.2")()
    if "dst=10.20.0.2" not in _output("conntrack", "-L", "-p", "icmp"):
        raise OSError(0, "a flow is not in the table")


def _masquerade(flavour: str) -> Callable[[], None]:
    """The peer sees an address of ours that is not the sender's, by counting what arrives from it."""

    def prove() -> None:
        rule = "-t nat {} POSTROUTING -s 10.21.0.1 -o w0 -m comment --comment probe -j MASQUERADE --random-fully"
        _commands(f"{flavour} {rule.format('-A')}")()
        try:
            # The peer has no way back to 10.21.0.1.
            _commands("ping -n -c 1 -W 3 -I 10.21.0.1 10.20.0.2")()
        finally:
            _commands(f"{flavour} {rule.format('-D')}")()

    return prove


def _vlan_filtering() -> None:
    _commands(
        "ip link add brv type bridge vlan_filtering 1 vlan_default_pvid 0",
        "ip link add bv0 type veth peer name bv1",
        "ip link set bv0 master brv",
        "bridge vlan add dev bv0 vid 10 pvid untagged",
    )()
    if "10" not in _output("bridge", "vlan", "show", "dev", "bv0"):
        raise OSError(0, "the port's VLAN was not kept")


def _vrf() -> None:
    _commands(
        "ip link add red type vrf table 110",
        "ip link set red up",
        "ip link add vr0 type veth peer name vr1",
        "ip link set vr0 master red",
        "ip address add 10.38.0.1/24 dev vr0",
        "ip link set vr0 up",
        "ip link set vr1 netns peer",
        f"{PEER} address add 10.38.0.2/24 dev vr1",
        f"{PEER} link set vr1 up",
        "ping -n -c 1 -W 3 -I red 10.38.0.2",
    )()


def _user_namespace() -> None:
    _commands("unshare -U -r true")()


PROOFS: dict[str, tuple[str, Callable[[], None]]] = {
    "peer": (
        "ip",
        _commands(
            "ip netns add peer",
            "ip link set lo up",
            f"{PEER} link set lo up",
            "ip link add w0 type veth peer name w1 netns peer",
            "ip address add 10.20.0.1/24 dev w0",
            "ip address add 10.21.0.1/32 dev lo",
            "ip link set w0 up",
            f"{PEER} address add 10.20.0.2/24 dev w1",
            f"{PEER} link set w1 up",
            "ping -n -c 1 -W 3 10.20.0.2",
        ),
    ),
    "vxlan_through": (
        "ip",
        _through(
            "type vxlan id 9 dstport 8472 local 10.20.0.1 remote 10.20.0.2",
            "type vxlan id 9 dstport 8472 local 10.20.0.2 remote 10.20.0.1",
            "vxp",
            33,
        ),
    ),
    "ipip_through": ("ip", _tunnel("ipip", "ipp", 34)),
    "sit_through": ("ip", _sit),
    "gre_through": ("ip", _tunnel("gre", "grp", 36)),
    "wireguard_through": ("wg", _wireguard),
    **{name: ("ip", _esp(algorithm)) for name, algorithm in ESP_KINDS.items()},
    "netem_delay": ("tc", _netem),
    "dummy": ("ip", _commands("ip link add dum0 type dummy", "ip link set dum0 up")),
    "vrf": ("ip", _vrf),
    "bridge_vlan": ("bridge", _vlan_filtering),
    "ipset": (
        "ipset",
        _commands("ipset create probe hash:net", "ipset add probe 10.0.0.0/8", "ipset test probe 10.0.0.0/8"),
    ),
    "conntrack_entry": ("conntrack", _conntrack),
    "masquerade_nft": ("iptables-nft", _masquerade("iptables-nft")),
    "masquerade_legacy": ("iptables-legacy", _masquerade("iptables-legacy")),
    "tcpdump": ("tcpdump", _tcpdump),
    "more_user_namespaces": ("unshare", _user_namespace),
}
"""What is proven by use, with the tool that it takes; all but the first send their packets to the first's peer."""


def _try(found: Found, name: str, make: Callable[[], None]) -> bool:
    try:
        make()
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        found[name] = {"ok": False, "detail": detail}
        return False
    found[name] = {"ok": True, "detail": ""}
    return True


def _inside(found: Found, everything: bool) -> None:
    """Runs as the first process of the new PID namespace."""
    _call(libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None), "making mounts private")
    for name, make in MOUNTS.items():
        _try(found, name, make)
    for name, make in FEATURES.items():
        _try(found, name, make)
    if everything:
        for name, (needs, make) in PROOFS.items():
            if shutil.which(needs):
                _try(found, name, make)


def probe(everything: bool = False) -> Found:
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
            _inside(found, everything)
        with open(writer, "w") as answer:
            json.dump(found, answer)
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else found


if __name__ == "__main__":
    json.dump(probe("--all" in sys.argv), sys.stdout)
