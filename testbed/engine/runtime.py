"""The runtime of a private engine where root lacks a capability: takes it out of what runc is asked for.

A program, not a module.  `docker run --privileged` asks for every capability that the kernel knows; where this
machine's root was not given one of them, runc refuses the whole container ("unable to apply caps").
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

RUNC = "/usr/sbin/runc"
SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")


def bounding_set() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapBnd:"))


def names() -> list[str]:
    """The capabilities by number, as far as a container engine names them."""
    return (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
        "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
        "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL "
        "SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    ).split()


def strip(process: dict[str, Any], missing: set[str]) -> None:
    capabilities = process.get("capabilities") or {}
    for kind in SETS:
        if capabilities.get(kind):
            capabilities[kind] = [name for name in capabilities[kind] if name not in missing]


def rewrite(path: str, missing: set[str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        with open(path) as file:
            document = json.load(file)
        strip(document.get("process", document), missing)
        with open(path, "w") as file:
            json.dump(document, file)


def value_of(option: str, words: list[str]) -> str | None:
    for position, word in enumerate(words):
        if word == option:
            return words[position + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def main() -> None:
    words = sys.argv[1:]
    held = bounding_set()
    missing = {f"CAP_{name}" for number, name in enumerate(names()) if not held >> number & 1}
    if missing and "create" in words and (bundle := value_of("--bundle", words)):
        rewrite(f"{bundle}/config.json", missing)
    if missing and "exec" in words and (process := value_of("--process", words)):
        rewrite(process, missing)
    os.execv(RUNC, [RUNC, *words])


main()
