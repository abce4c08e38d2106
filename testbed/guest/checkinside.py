"""Tries inside the guest what backends and checks need: a program, `python -I -S -c SOURCE PROBE-SOURCE`.

It runs the feature probe as root and as an ordinary user, starts the services that labs consist of, and prints one
JSON object: {"release", "root": features, "user": features, "services": features}.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial

ORDINARY = 54321
PROBE_SECONDS = 120.0
SERVICE_SECONDS = 30.0
FRR = ("/usr/lib/frr", "/usr/libexec/frr")

Found = dict[str, dict[str, object]]


def probe_as(user: int, source: str) -> Found:
    """What the feature probe finds as that user."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    argv = [sys.executable, "-I", "-S", "-c", source, "--all"]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            argv, stdout=pipe, stderr=pipe, env=environment, cwd="/", user=user, group=user, extra_groups=[]
        )
        out, err = process.communicate(timeout=PROBE_SECONDS)
        found: Found = json.loads(out)
    except (subprocess.TimeoutExpired, ValueError) as error:
        process.kill()
        return {"namespaces": {"ok": False, "detail": f"the probe gave no answer: {error} {err[-300:]!r}"}}
    return found


@contextlib.contextmanager
def running(argv: list[str], folder: str) -> Iterator[subprocess.Popen[bytes]]:
    with open(f"{folder}/log", "ab") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[bytes], ready: Callable[[], bool], folder: str) -> None:
    """Wait until a service answers. Raises OSError with the end of its output."""
    deadline = time.monotonic() + SERVICE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if ready():
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    with open(f"{folder}/log", errors="replace") as log:
        said = log.read().strip().splitlines()
    raise OSError(0, said[-1][-200:] if said else "it does not answer")


def etcd(folder: str) -> None:
    client = "http://127.0.0.1:23790"
    argv = ["etcd", "--data-dir", f"{folder}/data", "--listen-client-urls", client, "--advertise-client-urls", client]
    argv += ["--listen-peer-urls", "http://127.0.0.1:23800", "--unsafe-no-fsync"]

    def answers() -> bool:
        with urllib.request.urlopen(f"{client}/health", timeout=2) as answer:  # noqa: S310 (its address is above)
            return b"true" in answer.read()

    with running(argv, folder) as process:
        wait_for(process, answers, folder)


def frr(folder: str) -> None:
    programs = next(place for place in FRR if os.access(f"{place}/zebra", os.X_OK))
    socket = f"{folder}/zserv.api"
    os.chmod(folder, 0o777)  # the daemons are users of their own
    for name in ("zebra", "bgpd"):
        config = f"{folder}/{name}.conf"
        with open(config, "w"):
            pass
        argv = [f"{programs}/{name}", "-f", config, "-i", f"{folder}/{name}.pid", "-P", "0", "-z", socket]
        argv += ["--vty_socket", folder, *(["-p", "0"] if name == "bgpd" else [])]
        answered = f"{folder}/{name}.vty"
        with running(argv, folder) as process:
            wait_for(process, partial(os.path.exists, answered), folder)


ENDS = (("ikeleft", "10.41.0.1", "10.41.0.2"), ("ikeright", "10.41.0.2", "10.41.0.1"))
CHARON = ("/usr/lib/ipsec/charon", "/usr/sbin/charon-systemd")


def command(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SERVICE_SECONDS, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(0, f"`{' '.join(argv[:6])}`: {said[-1] if said else done.returncode}")
    return done.stdout


def ike_settings(folder: str, here: str, there: str) -> tuple[str, str]:
    """strongSwan's own settings, and a connection between two addresses by a shared secret."""
    # Not all that is installed: one of them does ESP without the kernel, another lets local networks past it.
    load = "random nonce openssl aes sha1 sha2 hmac kdf gmp kernel-netlink socket-default vici"
    vici = f"plugins {{ vici {{ socket = unix://{folder}/vici }} }}"
    daemon = f"load = {load}\n {vici} filelog {{ stderr {{ default = 1 }} }}"
    ends = f"local {{ auth = psk\n id = {here} }} remote {{ auth = psk\n id = {there} }}"
    child = "children { probe { mode = transport\n esp_proposals = aes128gcm16 } }"
    addresses = f"local_addrs = {here}\n remote_addrs = {there}"
    connection = f"version = 2\n proposals = aes128-sha256-modp2048\n {addresses}\n {ends}\n {child}"
    secret = f"secrets {{ ike-probe {{ id = {there}\n secret = probe }} }}"
    settings = f"charon {{ {daemon} }}\ncharon-systemd {{ {daemon} }}\n"
    return settings, f"connections {{ probe {{ {connection} }} }}\n{secret}\n"


def strongswan(folder: str) -> None:
    """Two of strongSwan's daemons agree on keys, and a packet crosses between them in ESP."""
    program = next(path for path in CHARON if os.access(path, os.X_OK))
    for end, _, _ in ENDS:
        command("ip", "netns", "add", end)
    command("ip", "-n", "ikeleft", "link", "add", "w", "type", "veth", "peer", "name", "w", "netns", "ikeright")
    with contextlib.ExitStack() as stack:
        for end, here, there in ENDS:
            command("ip", "-n", end, "address", "add", f"{here}/24", "dev", "w")
            command("ip", "-n", end, "link", "set", "w", "up")
            place = f"{folder}/{end}"
            os.mkdir(place)
            for name, text in zip(("strongswan.conf", "swanctl.conf"), ike_settings(place, here, there), strict=True):
                with open(f"{place}/{name}", "w") as file:
                    file.write(text)
            alone = f"mount -t tmpfs none /run && STRONGSWAN_CONF={place}/strongswan.conf exec {program}"
            argv = ["ip", "netns", "exec", end, "unshare", "-m", "sh", "-c", alone]
            process = stack.enter_context(running(argv, place))
            wait_for(process, partial(os.path.exists, f"{place}/vici"), place)
            swanctl = ["swanctl", "--uri", f"unix://{place}/vici"]
            command(*swanctl[:1], "--load-all", "--noprompt", "--file", f"{place}/swanctl.conf", *swanctl[1:])
        left = f"unix://{folder}/ikeleft/vici"
        command("swanctl", "--initiate", "--child", "probe", "--timeout", "20", "--uri", left)
        command("ip", "netns", "exec", "ikeleft", "ping", "-n", "-c", "1", "-W", "3", ENDS[0][2])
        state = command("ip", "-n", "ikeleft", "-s", "xfrm", "state")
        if len(re.findall(r"[1-9]\d*\(packets\)", state)) != 2:
            raise OSError(0, "the packet went past ESP")


SERVICES: dict[str, tuple[tuple[str, ...], Callable[[str], None]]] = {
    "etcd": (("etcd",), etcd),
    "frr": (tuple(f"{place}/zebra" for place in FRR), frr),
    "strongswan": (CHARON, strongswan),
}
"""Each service with the programs of which one is it; it is left out where none is installed."""

ALSO = {"strongswan": "swanctl"}


def services() -> Found:
    found: Found = {}
    for name, (programs, start) in SERVICES.items():
        if not any(shutil.which(program) for program in programs) or not shutil.which(ALSO.get(name, "sh")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                start(folder)
                found[name] = {"ok": True, "detail": ""}
            except OSError as error:
                found[name] = {"ok": False, "detail": error.strerror or str(error)}
    return found


def main() -> None:
    source = sys.argv[1]
    found = {"release": os.uname().release, "root": probe_as(0, source), "user": probe_as(ORDINARY, source)}
    print(json.dumps({**found, "services": services()}))


main()
