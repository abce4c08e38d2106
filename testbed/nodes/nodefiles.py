"""What a node gets before flanneld starts: both programs under test, the CNI plugins, flannel's configuration."""

from __future__ import annotations

import io
import json
import marshal
import os
import sys
import tarfile
from contextlib import suppress
from functools import cache
from importlib import util
from pathlib import Path
from types import CodeType

from testbed.data import folder
from testbed.errors import LabError
from testbed.flannelspec import CONFLIST, FlannelSpec
from testbed.labs import interpreter
from testbed.nodes import pods as podlib

FLANNELD = "/opt/flannel/flanneld"
LIBRARY = "/opt/flannel/lib"

STRONGSWAN = """charon {
 install_routes = no
 load = random nonce openssl aes sha1 sha2 hmac kdf gmp kernel-netlink socket-default vici
}
"""
"""What a charon needs that another flanneld starts; the bundled one has settings of its own. Of all that may be
installed, one plugin does ESP without the kernel, and another lets local networks past it."""

#: Where distributions put the reference CNI plugins.
CNI_FOLDERS = ("/usr/lib/cni", "/usr/libexec/cni", "/opt/cni/bin")


def cni_folder() -> Path:
    """Where the reference plugins are on this machine. Raises LabError."""
    for name in CNI_FOLDERS[:2]:
        if os.access(f"{name}/bridge", os.X_OK) and os.access(f"{name}/host-local", os.X_OK):
            return Path(name)
    raise LabError(
        "the CNI plugins bridge and host-local are not installed",
        hint="apt-get install containernetworking-plugins, or `./run` as root",
    )


class _Archive:
    """Files for a node, gathered as one tar so that one command puts them there."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w")  # noqa: SIM115 (closed by `bytes`)

    def add(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        content = data.encode() if isinstance(data, str) else data
        info = tarfile.TarInfo(path.lstrip("/"))
        info.size, info.mode = len(content), mode
        self.tar.addfile(info, io.BytesIO(content))

    def link(self, path: str, target: str) -> None:
        info = tarfile.TarInfo(path.lstrip("/"))
        info.type, info.linkname = tarfile.SYMTYPE, target
        self.tar.addfile(info)

    def bytes(self) -> bytes:
        self.tar.close()
        return self.buffer.getvalue()


def _compiled(code: CodeType, source: bytes) -> bytes:
    """The file of a compiled module, never to be checked against its source: nothing changes that on a node."""
    unchecked = (1).to_bytes(4, "little")
    return util.MAGIC_NUMBER + unchecked + util.source_hash(source) + marshal.dumps(code)


@cache
def bundled_library() -> dict[str, bytes]:
    """The bundled flannel's modules by file name, compiled as well: a node's plugin starts anew for each pod."""
    source = folder("flannel")
    files = {}
    for path in sorted(source.rglob("*.py")):
        name, text = path.relative_to(source), path.read_bytes()
        files[str(name)] = text
        with suppress(SyntaxError):  # said by the node's own interpreter
            code = compile(text, f"{LIBRARY}/flannel/{name}", "exec", dont_inherit=True)
            # Spelled out: where this Python keeps its own compiled files says nothing of a node's.
            compiled = f"{name.stem}.{sys.implementation.cache_tag}.pyc"
            files[str(name.parent / "__pycache__" / compiled)] = _compiled(code, text)
    return files


def bundled_launchers() -> dict[str, str]:
    """The texts of the bundled flanneld and CNI plugin as a node runs them."""
    path = folder("flannel") / "launcher.py"
    spec = util.spec_from_file_location("flannel_launcher", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts: dict[str, str] = module.launchers(interpreter(), LIBRARY)
    return texts


def node_files(flannel: FlannelSpec, flanneld: Path | None, plugin: Path | None) -> bytes:
    """Everything that a node gets before flanneld starts, as a tar archive."""
    archive = _Archive()
    for name, content in bundled_library().items():
        archive.add(f"{LIBRARY}/flannel/{name}", content)
    for target, name, given in ((FLANNELD, "flanneld", flanneld), ("/opt/cni/bin/flannel", "flannel", plugin)):
        archive.add(target, _executable(given) if given else bundled_launchers()[name], 0o755)
    if flanneld and flannel.backend.type == "ipsec":
        archive.add("/etc/strongswan.conf", STRONGSWAN)
    archive.add(podlib.SERVER, podlib.server_program())
    plugins = cni_folder()
    for path in sorted(plugins.iterdir()):
        if path.name != "flannel":
            archive.link(f"/opt/cni/bin/{path.name}", str(path))
    archive.add(CONFLIST, json.dumps(flannel.cni_conf, indent=2) + "\n")
    archive.add("/etc/kube-flannel/net-conf.json", json.dumps(flannel.net_conf, indent=2) + "\n")
    archive.add("/etc/kube-flannel/cni-conf.json", json.dumps(flannel.cni_conf, indent=2) + "\n")
    _choose_rules(archive, flannel.rules)
    return archive.bytes()


def _executable(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}", hint="give the path of a program file") from error


ALTERNATIVES = Path("/etc/alternatives")


def _choose_rules(archive: _Archive, rules: str) -> None:
    """Make `iptables` on the node the flavour that was asked for, whatever the host's default is."""
    flavour = "legacy" if rules == "iptables-legacy" else "nft"
    if not ALTERNATIVES.is_dir():
        return
    for path in filter(Path.is_symlink, ALTERNATIVES.iterdir()):
        if path.name.startswith(("iptables", "ip6tables")) and not path.name.endswith(".gz"):
            target = str(path.readlink()).replace("-legacy", f"-{flavour}").replace("-nft", f"-{flavour}")
            archive.link(str(path), target)
