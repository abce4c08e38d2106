"""A container runtime's part of CNI: call a conflist's plugins in order, hand each the result of the one before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.errors import Exit, LabError, TestbedError
from testbed.labs.base import Node, Result

CNI_BIN = "/opt/cni/bin"


class CniError(TestbedError):
    """A plugin refused, which is the product's failure; carries the protocol's code and message."""

    exit_code = Exit.FAILED

    def __init__(self, where: str, command: str, plugin: str, code: int, text: str) -> None:
        self.code = code
        self.plugin = plugin
        super().__init__(f"CNI {command} by {plugin} failed with code {code}: {text or 'it said nothing'}", where=where)


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a runtime tells plugins about one network interface of one container."""

    container_id: str
    netns: str
    ifname: str = "eth0"

    def env(self, command: str) -> dict[str, str]:
        """The CNI_* environment of a call."""
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": self.ifname,
            "CNI_PATH": CNI_BIN,
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={self.container_id}",
        }


def call(node: Node, command: str, conf: Mapping[str, Any], attachment: Attachment, *, timeout: float = 60.0) -> Result:
    """Call one plugin, and return how it ended; nothing is raised for a refusal."""
    argv = [f"{CNI_BIN}/{conf['type']}"]
    return node.run(argv, check=False, stdin=json.dumps(conf), env=attachment.env(command), timeout=timeout)


def _checked(node: Node, command: str, conf: Mapping[str, Any], attachment: Attachment) -> dict[str, Any]:
    done = call(node, command, conf, attachment)
    try:
        answer = json.loads(done.stdout) if done.stdout.strip() else {}
    except ValueError:
        answer = {"code": 0, "msg": f"its answer is no JSON: {done.stdout[:200]!r}"}
    if done.rc or "code" in answer:
        text = ": ".join(str(answer[key]) for key in ("msg", "details") if answer.get(key)) or done.stderr.strip()
        raise CniError(node.name, command, str(conf["type"]), int(answer.get("code", done.rc)), text[-1000:])
    return dict(answer)


def _plugin_conf(conflist: Mapping[str, Any], plugin: Mapping[str, Any], previous: Any, runtime: Any) -> dict[str, Any]:
    conf = dict(plugin, name=conflist["name"], cniVersion=conflist["cniVersion"])
    wanted = {key: runtime[key] for key, on in plugin.get("capabilities", {}).items() if on and key in runtime}
    if wanted:
        conf["runtimeConfig"] = wanted
    if previous is not None:
        conf["prevResult"] = previous
    return conf


def add(
    node: Node, conflist: Mapping[str, Any], attachment: Attachment, runtime: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Attach a container to the network; returns the last plugin's result. Raises CniError."""
    result: dict[str, Any] | None = None
    for plugin in conflist["plugins"]:
        result = _checked(node, "ADD", _plugin_conf(conflist, plugin, result, runtime or {}), attachment)
    if not result or not result.get("ips"):
        raise LabError("CNI ADD gave no address", where=node.name)
    return result


def delete(
    node: Node,
    conflist: Mapping[str, Any],
    attachment: Attachment,
    result: Mapping[str, Any] | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> None:
    """Detach a container, in reverse order. Raises CniError."""
    plugins: Sequence[Mapping[str, Any]] = conflist["plugins"]
    for plugin in reversed(plugins):
        _checked(node, "DEL", _plugin_conf(conflist, plugin, result, runtime or {}), attachment)
