"""The plugin that flannel's CNI plugin hands over to: its configuration, calling it, and what is remembered for DEL."""

from __future__ import annotations

from flannel.cni import system as os
from flannel.cni.basics import OTHER, CniError, decode, read_all, write_all

TYPE_CHECKING = False  # importing typing would cost more than all the rest
if TYPE_CHECKING:
    from typing import Any, NoReturn


def delegate_config(conf: dict[str, Any], env: dict[str, Any]) -> dict[str, Any]:
    """Return the delegate's configuration. Raises CniError."""
    delegate = dict(_object(conf, "delegate"))
    if not isinstance(delegate.get("type", ""), str):
        raise CniError(OTHER, "the 'type' of 'delegate' must be a string")
    for key in ("name", "ipam"):
        if key in delegate:
            raise CniError(OTHER, f"'delegate' must not have '{key}': flannel sets it")
    delegate["name"] = conf["name"]
    delegate.setdefault("type", "bridge")
    delegate.setdefault("ipMasq", not env["ip_masq"])
    delegate.setdefault("mtu", env["mtu"])
    if delegate["type"] == "bridge":
        delegate.setdefault("isGateway", True)
    if conf.get("cniVersion"):
        delegate["cniVersion"] = conf["cniVersion"]
    if conf.get("runtimeConfig") is not None:
        delegate["runtimeConfig"] = conf["runtimeConfig"]
    ipam = dict(_object(conf, "ipam"))
    ipam.setdefault("type", "host-local")
    ipam["ranges"] = [[{"subnet": env[family]}] for family in ("subnet4", "subnet6") if family in env]
    routes = [] if ipam.get("routes") is None else ipam["routes"]
    if not isinstance(routes, list):
        raise CniError(OTHER, "the 'routes' of 'ipam' must be a list")
    networks = [*env.get("networks4", ()), *env.get("networks6", ())]
    ipam["routes"] = [*routes, *({"dst": network} for network in networks)]
    delegate["ipam"] = ipam
    return delegate


def _object(conf: dict[str, Any], key: str) -> dict[str, Any]:
    value = conf.get(key)
    if value is not None and not isinstance(value, dict):
        raise CniError(OTHER, f"failed to load netconf: '{key}' must be an object")
    return value or {}


def find_delegate(kind: Any) -> str:
    """Return the path of a plugin in CNI_PATH. Raises CniError."""
    if not isinstance(kind, str) or not kind or "/" in kind:
        raise CniError(OTHER, f"invalid plugin name {kind!r}")
    folders = [folder for folder in os.environ["CNI_PATH"].split(":") if folder]
    for folder in folders:
        path = os.join(folder, kind)
        if os.isfile(path):
            return path
    raise CniError(OTHER, f"failed to find plugin {kind!r} in path {folders}")


def _stdin_of(data: bytes) -> int:
    """Return a file descriptor that reads `data`: a pipe would hold 64 KiB only."""
    fd = os.memfd_create("netconf")
    write_all(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def become(kind: Any, data: bytes, command: str) -> NoReturn:
    """Let the delegate take our place: its answer, its errors and its exit code go to the runtime as they are."""
    try:
        path = find_delegate(kind)
        os.dup2(_stdin_of(data), 0)
        os.execve(path, [path], os.environ)  # no shell: that is the last thing wanted here
    except (CniError, OSError) as error:
        raise CniError(OTHER, f"failed to delegate {command}: {error}") from None


def ask(kind: Any, data: bytes, **env: str) -> bytes:
    """Run the delegate, wait for it, and return its answer. Raises CniError with the delegate's own words."""
    command = env.get("CNI_COMMAND", os.environ["CNI_COMMAND"]).lower()
    try:
        path = find_delegate(kind)
        read_end, write_end = os.pipe()
        stdin = _stdin_of(data)
        files = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, write_end, 1)]
        pid = os.posix_spawn(path, [path], {**os.environ, **env}, file_actions=files)
    except (CniError, OSError) as error:
        raise CniError(OTHER, f"failed to delegate {command}: {error}") from None
    os.close(write_end)
    os.close(stdin)
    answer = read_all(read_end)
    os.close(read_end)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        return answer
    try:
        told = decode(answer)
        raise CniError(int(told["code"]), str(told["msg"]), str(told.get("details", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        how = f"exited {status}" if status > 0 else f"was killed by signal {-status}"
        said = answer[:500].decode("utf-8", "replace")
        raise CniError(OTHER, f"failed to delegate {command}: {kind} {how}", said) from None


# -- what is remembered of a container ---------------------------------------------------------------------------------


def save(folder: str, container: str, data: bytes) -> None:
    """Write a container's delegate configuration, whole or not at all. Raises CniError.

    It does not wait for the disk, which takes longer than all the rest: where power is lost, so are the containers, and
    DEL knows what to do with a file that has nothing in it.
    """
    path = os.join(folder, container)
    aside = os.join(folder, f".{container}.tmp")  # no container's name begins with a dot
    try:
        os.makedirs(folder, 0o700)
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)
        os.rename(aside, path)
    except OSError as error:
        forget(aside)
        raise CniError(OTHER, f"failed to save the delegate's configuration to {path}: {error.strerror}") from None


def load(folder: str, container: str) -> bytes | None:
    """Return what `save` wrote, None if there is nothing. Raises CniError."""
    path = os.join(folder, container)
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CniError(OTHER, f"failed to read {path}: {error.strerror}") from None


def forget(path: str) -> None:
    """Remove a file that may not be there. Raises CniError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CniError(OTHER, f"failed to remove {path}: {error.strerror}") from None


def decode_saved(data: bytes) -> dict[str, Any] | None:
    """Return a saved configuration, None where it is none."""
    try:
        conf = decode(data)
    except ValueError:
        return None
    return conf if isinstance(conf, dict) else None


def containers(folder: str) -> list[str]:
    """Return the containers that something is saved of. Raises CniError."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CniError(OTHER, f"failed to list {folder}: {error.strerror}") from None
