"""Tries inside the guest what backends and checks need: a program, `python -I -S -c SOURCE PROBE-SOURCE`.

It runs the feature probe as root and as an ordinary user, starts the services that labs consist of, and prints one
JSON object: {"release", "root": features, "user": features, "services": features}.
"""

from __future__ import annotations

import contextlib
import json
import os
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


def charon(folder: str) -> None:
    """strongSwan's daemon takes the kernel's IPsec interface and answers on its own socket."""
    program = next(path for path in ("/usr/lib/ipsec/charon", "/usr/sbin/charon-systemd") if os.access(path, os.X_OK))
    os.environ["STRONGSWAN_CONF"] = f"{folder}/strongswan.conf"
    socket = f"{folder}/vici"
    plugins = "random nonce openssl aes sha1 sha2 hmac kernel-netlink socket-default vici"
    settings = f"load = {plugins}\n plugins {{ vici {{ socket = unix://{socket} }} }}"
    log = "filelog { stderr { default = 1 } }"
    with open(f"{folder}/strongswan.conf", "w") as file:
        file.write(f"charon {{ {settings}\n {log} }}\ncharon-systemd {{ {settings}\n {log} }}\n")
    with running([program], folder) as process:
        wait_for(process, lambda: os.path.exists(socket), folder)


SERVICES: dict[str, tuple[tuple[str, ...], Callable[[str], None]]] = {
    "etcd": (("etcd",), etcd),
    "frr": (tuple(f"{place}/zebra" for place in FRR), frr),
    "strongswan": (("/usr/lib/ipsec/charon", "/usr/sbin/charon-systemd"), charon),
}
"""Each service with the programs of which one is it; it is left out where none is installed."""


def services() -> Found:
    found: Found = {}
    for name, (programs, start) in SERVICES.items():
        if not any(shutil.which(program) for program in programs):
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
