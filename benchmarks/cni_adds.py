"""Runs CNI plugins in turn in this network namespace, and prints how long each ADD took, as JSON.

Usage: python cni_adds.py ROUNDS PLUGIN_FOLDER BRIDGE PLUGIN…; a PLUGIN is flannel's, by its path. The floor is what it
delegates to, run by itself. Each pod has a network namespace of its own; its DEL follows outside of the time.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

CONF = {"cniVersion": "1.0.0", "name": "bench", "type": "flannel"}


def conf(bridge: str, plugin: str, delegate: Path) -> bytes:
    """The network configuration: flannel's, or the delegate's own."""
    inner = {"bridge": bridge, "isDefaultGateway": True, "hairpinMode": True}
    if plugin != str(delegate):
        return json.dumps({**CONF, "delegate": inner}).encode()
    env = dict(line.split("=") for line in Path("/run/flannel/subnet.env").read_text().splitlines())
    ipam = {"type": "host-local", "subnet": env["FLANNEL_SUBNET"].replace(".1/", ".0/")}
    ipam["routes"] = [{"dst": env["FLANNEL_NETWORK"]}]  # type: ignore[assignment]
    return json.dumps(
        {**CONF, "type": "bridge", **inner, "ipMasq": False, "mtu": int(env["FLANNEL_MTU"]), "ipam": ipam}
    ).encode()


def run(plugin: str, command: str, pod: str, given: bytes, folder: Path) -> tuple[float, float]:
    """Run a plugin; seconds, and those of the processor."""
    environment = {
        "CNI_COMMAND": command, "CNI_CONTAINERID": pod, "CNI_NETNS": f"/run/netns/{pod}", "CNI_IFNAME": "eth0",
        "CNI_PATH": str(folder), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([plugin], input=given, capture_output=True, env=environment, check=False)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(f"{plugin} {command}: {ended.stdout.decode()} {ended.stderr.decode()}")
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print {plugin: [[seconds, the processor's] of each ADD]}."""
    rounds, folder, bridge, plugins = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    delegate = folder / "bridge"
    took: dict[str, list[tuple[float, float]]] = {plugin: [] for plugin in [*plugins, str(delegate)]}
    for number in range(rounds):
        for plugin, seen in took.items():
            pod = f"pod{os.getpid()}-{number}"
            subprocess.run(["ip", "netns", "add", pod], check=True)
            given = conf(bridge, plugin, delegate)
            seen.append(run(plugin, "ADD", pod, given, folder))
            run(plugin, "DEL", pod, given, folder)
            subprocess.run(["ip", "netns", "delete", pod], check=True)
    print(json.dumps(took))


if __name__ == "__main__":
    main()
