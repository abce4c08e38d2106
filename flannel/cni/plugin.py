"""The CNI plugin `flannel`: turns subnet.env and a short configuration into that of a delegate, and hands over to it.

It is started for every pod, by a runtime that waits, so it imports next to nothing, and lets the delegate take its
place (exec) wherever nothing is left to do after it. It runs as a script too, isolated (-I -S) or not.
"""

from __future__ import annotations

import sys

if not __package__:
    from posixpath import abspath, dirname

    sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))

from flannel import __version__
from flannel.cni import system as os
from flannel.cni.basics import (
    BAD_CONFIG,
    BAD_ENVIRONMENT,
    DECODING_FAILED,
    INCOMPATIBLE_VERSION,
    NOT_AVAILABLE,
    OTHER,
    CniError,
    decode,
    encode,
    read_all,
    read_subnet_env,
    write_all,
)
from flannel.cni.delegate import ask, become, containers, decode_saved, delegate_config, forget, load, save

TYPE_CHECKING = False  # importing typing would cost more than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CNI_VERSION = "1.1.0"
SUPPORTED = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
SUBNET_FILE = "/run/flannel/subnet.env"
DATA_DIR = "/var/lib/cni/flannel"
REQUIRED_ENV = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
    "VERSION": (),
}
#: What a configuration must at least be for the younger commands.
SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


# -- commands ----------------------------------------------------------------------------------------------------------


def cmd_add(conf: dict[str, Any]) -> None:
    """Save the delegate's configuration, which DEL will need, and become the delegate."""
    delegate = delegate_config(conf, read_subnet_env(conf.get("subnetFile", SUBNET_FILE)))
    data = encode(delegate)
    save(_data_dir(conf), os.environ["CNI_CONTAINERID"], data)
    become(delegate["type"], data, "add")


def cmd_del(conf: dict[str, Any]) -> None:
    """Have the delegate undo what it was told then, and forget that only when it is done: DEL may be tried again."""
    folder, container = _data_dir(conf), os.environ["CNI_CONTAINERID"]
    data = load(folder, container)
    if data is None:
        return  # never added, or deleted before
    saved = decode_saved(data)
    if saved is None:
        # As after a loss of power, for saving does not wait for the disk. What an ADD would save now does as well.
        sys.stderr.write(f"flannel: {os.join(folder, container)} is no configuration; deleting by that of today\n")
        try:
            saved = delegate_config(conf, read_subnet_env(conf.get("subnetFile", SUBNET_FILE)))
        except CniError as error:
            sys.stderr.write(f"flannel: nothing can be deleted by it: {error.msg}\n")
            return
        data = encode(saved)
    ask(saved.get("type"), data)
    forget(os.join(folder, container))


def cmd_check(conf: dict[str, Any]) -> None:
    """Check that this container was added here, and have the delegate check the rest."""
    if not isinstance(conf.get("prevResult"), dict):
        raise CniError(BAD_CONFIG, "required prevResult is missing")
    folder, container = _data_dir(conf), os.environ["CNI_CONTAINERID"]
    data = load(folder, container)
    saved = decode_saved(data) if data is not None else None
    if saved is None:
        state = "is missing" if data is None else "is broken"
        raise CniError(OTHER, f"{os.join(folder, container)}, what container {container} was added with, {state}")
    saved["prevResult"] = with_gateways(conf["prevResult"])
    become(saved.get("type"), encode(saved), "check")


def with_gateways(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result whose routes all name their gateway.

    CNI lets a route without one go through the address's; the bridge's ADD does so too, but its CHECK then looks for a
    route without gateway, and calls every pod of flannel broken.
    """
    ips, routes = result.get("ips"), result.get("routes")
    if not isinstance(ips, list) or not isinstance(routes, list):
        return result
    said = [ip.get("gateway") for ip in ips if isinstance(ip, dict)]
    gateways = {":" in gateway: gateway for gateway in said if gateway and isinstance(gateway, str)}
    completed = []
    for route in routes:
        gateway = (
            gateways.get(":" in str(route.get("dst"))) if isinstance(route, dict) and not route.get("gw") else None
        )
        completed.append({**route, "gw": gateway} if gateway else route)
    return {**result, "routes": completed}


def cmd_status(conf: dict[str, Any]) -> None:
    """Say whether an ADD would find what it needs."""
    try:
        delegate = delegate_config(conf, read_subnet_env(conf.get("subnetFile", SUBNET_FILE)))
        knows = _delegate_knows(delegate)
    except CniError as error:
        raise CniError(NOT_AVAILABLE, error.msg, error.details) from None
    if knows:
        become(delegate["type"], encode(delegate), "status")


def cmd_gc(conf: dict[str, Any]) -> None:
    """Undo what was added to this network for containers that the runtime does not know any more."""
    valid = conf.get("cni.dev/valid-attachments")
    if not isinstance(valid, list) or not all(isinstance(one, dict) for one in valid):
        raise CniError(BAD_CONFIG, "required cni.dev/valid-attachments is missing")
    keep = {one.get("containerID") for one in valid}
    folder = _data_dir(conf)
    faults = []
    for container in containers(folder):
        if container not in keep:
            try:
                _collect(conf["name"], folder, container)
            except CniError as error:
                faults.append(f"{container}: {error.msg}")
    delegate = delegate_config(conf, read_subnet_env(conf.get("subnetFile", SUBNET_FILE)))
    if _delegate_knows(delegate):
        ask(delegate["type"], encode({**delegate, "cni.dev/valid-attachments": valid}))
    if faults:
        raise CniError(OTHER, f"failed to collect {len(faults)} containers", "; ".join(faults))


def _collect(network: str, folder: str, container: str) -> None:
    saved = decode_saved(load(folder, container) or b"")
    if saved is not None:
        if saved.get("name") != network:
            return  # another flannel network's, which has a GC of its own
        # The interface's name is not saved; eth0 is what Kubernetes gives to a pod's only one.
        gone = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": container, "CNI_IFNAME": "eth0", "CNI_NETNS": ""}
        ask(saved.get("type"), encode(saved), **gone)
    forget(os.join(folder, container))


def _delegate_knows(delegate: dict[str, Any]) -> bool:
    """Return whether the delegate speaks the configuration's version, and so knows GC and STATUS."""
    version = delegate.get("cniVersion", "")
    answer = decode_saved(ask(delegate["type"], encode({"cniVersion": version}), CNI_COMMAND="VERSION"))
    return answer is not None and version in (answer.get("supportedVersions") or ())


def _data_dir(conf: dict[str, Any]) -> str:
    return str(conf.get("dataDir", DATA_DIR))


# -- what is asked -----------------------------------------------------------------------------------------------------


def check_environment(command: str) -> None:
    """Raise CniError for what CNI_* variables lack."""
    if command not in REQUIRED_ENV:
        raise CniError(BAD_ENVIRONMENT, f"unknown CNI_COMMAND: {command}")
    missing = [name for name in REQUIRED_ENV[command] if not os.environ.get(name)]
    if missing:
        raise CniError(BAD_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
    if "CNI_CONTAINERID" in REQUIRED_ENV[command] and not _is_name(os.environ["CNI_CONTAINERID"]):
        raise CniError(BAD_ENVIRONMENT, "invalid characters in containerID", os.environ["CNI_CONTAINERID"])
    if "CNI_IFNAME" in REQUIRED_ENV[command]:
        interface = os.environ["CNI_IFNAME"]
        bad = any(char in "/:" or char.isspace() for char in interface)
        if bad or interface in (".", "..") or len(interface.encode("utf-8", "surrogateescape")) > 15:
            raise CniError(BAD_ENVIRONMENT, "invalid interface name", interface)


def read_config(command: str, data: bytes) -> dict[str, Any]:
    """Return the network configuration. Raises CniError."""
    try:
        conf = decode(data)
    except ValueError as error:
        raise CniError(DECODING_FAILED, f"error unmarshall network config: {error}") from None
    if not isinstance(conf, dict):
        raise CniError(DECODING_FAILED, "error unmarshall network config: it is no object")
    name = conf.get("name")
    if not name:
        raise CniError(BAD_CONFIG, "missing network name")
    if not isinstance(name, str) or not _is_name(name):
        raise CniError(BAD_CONFIG, "invalid characters found in network name", str(name))
    for key in ("subnetFile", "dataDir"):
        if not isinstance(conf.get(key, ""), str):
            raise CniError(DECODING_FAILED, f"error unmarshall network config: '{key}' must be a string")
    version = SUPPORTED[0] if conf.get("cniVersion") in (None, "") else conf["cniVersion"]
    if version not in SUPPORTED:
        raise CniError(
            INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f"config is {version!r}, plugin supports {list(SUPPORTED)}",
        )
    since = SINCE.get(command, SUPPORTED[0])
    if SUPPORTED.index(version) < SUPPORTED.index(since):
        raise CniError(INCOMPATIBLE_VERSION, f"config version does not allow {command}")
    return conf


def _is_name(text: str) -> bool:
    return text[0] in _LETTERS and all(char in _LETTERS or char in "_.-" for char in text)


COMMANDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "ADD": cmd_add,
    "DEL": cmd_del,
    "CHECK": cmd_check,
    "STATUS": cmd_status,
    "GC": cmd_gc,
}


def _say(answer: dict[str, Any]) -> None:
    write_all(1, encode(answer) + b"\n")


def main() -> int:
    """Do what CNI_COMMAND says; return the exit status."""
    command = os.environ.get("CNI_COMMAND", "")
    if not command:
        about = f"CNI Plugin flannel version {__version__} (linux, in Python)"
        sys.stderr.write(f"{about}\nCNI protocol versions supported: {', '.join(SUPPORTED)}\n")
        return 0
    version = CNI_VERSION
    try:
        check_environment(command)
        if command == "VERSION":
            _say({"cniVersion": CNI_VERSION, "supportedVersions": list(SUPPORTED)})
            return 0
        conf = read_config(command, read_all(0))
        version = conf.get("cniVersion") or "0.1.0"
        COMMANDS[command](conf)
    except CniError as error:
        details = {"details": error.details} if error.details else {}
        _say({"cniVersion": version, "code": error.code, "msg": error.msg, **details})
        return 1
    except Exception as error:  # noqa: BLE001 - the runtime understands no traceback
        _say({"cniVersion": version, "code": OTHER, "msg": f"{command} failed: unexpected {_place_of(error)}"})
        return 1
    return 0


def _place_of(error: Exception) -> str:
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f" at {at.tb_frame.f_code.co_filename.rpartition('/')[2]}:{at.tb_lineno}" if at else ""
    return type(error).__name__ + where


if __name__ == "__main__":
    sys.exit(main())
