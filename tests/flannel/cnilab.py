"""A container runtime for tests of the CNI plugin, and a delegate that tells what it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "flannel" / "cni" / "plugin.py"
ENV = """FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.1.1/24
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
"""
DUAL_ENV = """FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.1.1/24
FLANNEL_IPV6_NETWORK=fd00:10:244::/56
FLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=false
"""
#: What upstream sends for the stock configuration, to the byte.
GOLDEN = (
    b'{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],'
    b'"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,'
    b'"name":"cbr0","type":"bridge"}'
)
DELEGATE = """#!{python} -IS
import json, os, sys
data = sys.stdin.buffer.read()
folder = {folder!r}
command = os.environ["CNI_COMMAND"]
with open(folder + "/calls", "a") as calls:
    cni = {{key: value for key, value in os.environ.items() if key.startswith("CNI_")}}
    calls.write(json.dumps({{"env": cni, "stdin": data.decode()}}) + "\\n")
if command == "VERSION":
    print(json.dumps({{"cniVersion": "1.1.0", "supportedVersions": {versions}}}))
elif os.path.exists(folder + "/fail"):
    print(open(folder + "/fail").read(), end="")
    sys.exit(1)
else:
    print('{{"did": "%s"}}' % command)
"""


class Runtime:
    """Calls the plugin as a container runtime does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.subnet_file, self.data, self.bin = folder / "subnet.env", folder / "data", folder / "bin"
        self.bin.mkdir()
        self.subnet_file.write_text(ENV)
        self.make_delegate("bridge")

    def make_delegate(self, name: str, versions: Sequence[str] = ("0.3.1", "1.0.0", "1.1.0")) -> None:
        """Install a delegate."""
        path = self.bin / name
        python = os.path.realpath(sys.executable)
        path.write_text(DELEGATE.format(python=python, folder=str(self.folder), versions=list(versions)))
        path.chmod(0o755)

    def conf(self, **keys: Any) -> dict[str, Any]:
        """Return the stock configuration with keys added."""
        return {
            "name": "cbr0",
            "cniVersion": "0.3.1",
            "type": "flannel",
            "subnetFile": str(self.subnet_file),
            "dataDir": str(self.data),
            "delegate": {"hairpinMode": True, "isDefaultGateway": True},
            **keys,
        }

    def call(self, command: str, conf: Any = None, **env: str | None) -> subprocess.CompletedProcess[bytes]:
        """Run the plugin; an `env` value of None unsets."""
        whole = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c1",
            "CNI_NETNS": "/proc/1/ns/net",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": f"/none:{self.bin}",
            **env,
        }
        data = conf if isinstance(conf, bytes) else json.dumps(self.conf() if conf is None else conf).encode()
        argv = [os.path.realpath(sys.executable), "-I", "-S", str(PLUGIN)]
        kept = {key: value for key, value in whole.items() if value is not None}
        return subprocess.run(argv, input=data, env=kept, capture_output=True, timeout=60, check=False)

    def ok(self, command: str, conf: Any = None, **env: str | None) -> bytes:
        """Call, and hold that it worked."""
        result = self.call(command, conf, **env)
        assert result.returncode == 0, result
        assert result.stderr == b""
        return result.stdout

    def fails(self, command: str, conf: Any = None, **env: str | None) -> dict[str, Any]:
        """Call, hold that it failed as CNI has it, and return the error."""
        result = self.call(command, conf, **env)
        assert result.returncode == 1, result
        assert result.stderr == b"", "no traceback"
        error: dict[str, Any] = json.loads(result.stdout)
        return error

    def calls(self) -> list[dict[str, Any]]:
        """Return what delegates were called with."""
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def given(self) -> dict[str, Any]:
        """Return the configuration that the last delegate got."""
        conf: dict[str, Any] = json.loads(self.calls()[-1]["stdin"])
        return conf
