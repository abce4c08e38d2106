"""A Kubernetes control plane as processes: certificates, command lines, and what to call the one program as."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from testbed.errors import LabError

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager")
SERVICES = IPv4Network("192.168.240.0/20")
"""Where Services would get addresses from; nothing in a lab uses them, but the API server wants to know."""

CERTIFICATE_DAYS = 30


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """One etcd, one API server and one controller-manager on one machine.

    `folder` holds what `certificates` made, `data` is etcd's, `programs` holds links to the program by the components'
    names. Without `network` there is no controller-manager that gives nodes their podCIDRs, of `subnet_len` bits, and
    of 64 in `network6`.
    """

    address: str
    folder: str
    data: str
    programs: str
    port: int = 6443
    etcd_port: int = 2379
    etcd_peer_port: int = 2380
    network: IPv4Network | None = None
    subnet_len: int = 24
    network6: IPv6Network | None = None

    @property
    def url(self) -> str:
        """The API's URL."""
        return f"https://{self.address}:{self.port}"

    def etcd_argv(self) -> list[str]:
        """The command line of etcd, which listens to this machine alone."""
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.etcd_peer_port}"
        return [
            f"{self.programs}/etcd",
            *("--name=lab", f"--data-dir={self.data}", f"--initial-cluster=lab={peer}"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
            *("--heartbeat-interval=50", "--election-timeout=500", "--unsafe-no-fsync", "--log-level=warn"),
        ]

    def apiserver_argv(self) -> list[str]:
        """The command line of the API server."""
        folder = self.folder
        return [
            f"{self.programs}/kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            *(f"--bind-address={self.address}", f"--advertise-address={self.address}", f"--secure-port={self.port}"),
            *(f"--tls-cert-file={folder}/apiserver.crt", f"--tls-private-key-file={folder}/apiserver.key"),
            *(f"--client-ca-file={folder}/ca.crt", "--authorization-mode=RBAC"),
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder}/tokens.crt",
            f"--service-account-signing-key-file={folder}/tokens.key",
            f"--service-cluster-ip-range={SERVICES}",
            *("--endpoint-reconciler-type=none", "--profiling=false", "--shutdown-delay-duration=0s"),
        ]

    def controllers_argv(self) -> list[str]:
        """The command line of the controller-manager, with the controller of podCIDRs alone."""
        given = [network for network in (self.network, self.network6) if network is not None]
        networks = ",".join(map(str, given))
        sizes = [f"--node-cidr-mask-size-ipv4={self.subnet_len}", "--node-cidr-mask-size-ipv6=64"]
        if len(given) == 1:
            sizes = [f"--node-cidr-mask-size={64 if self.network is None else self.subnet_len}"]
        return [
            f"{self.programs}/kube-controller-manager",
            *("--controllers=node-ipam-controller", "--allocate-node-cidrs", f"--cluster-cidr={networks}"),
            *sizes,
            f"--kubeconfig={self.folder}/controllers.json",
            *("--use-service-account-credentials", "--kube-api-qps=1000", "--kube-api-burst=2000"),
            *("--leader-elect=false", "--profiling=false", "--secure-port=0"),
        ]

    def controllers_kubeconfig(self) -> str:
        """The controller-manager's kubeconfig, in JSON."""
        cluster = {"server": self.url, "certificate-authority": f"{self.folder}/ca.crt"}
        user = {
            "client-certificate": f"{self.folder}/controllers.crt",
            "client-key": f"{self.folder}/controllers.key",
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "controllers", "user": user}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "controllers"}}],
            "current-context": "lab",
        }
        return json.dumps(config)

    def files(self) -> dict[str, bytes]:
        """Everything that belongs into `folder`, by name. Raises LabError."""
        return certificates((self.address, "127.0.0.1")) | {"controllers.json": self.controllers_kubeconfig().encode()}


def certificates(addresses: Sequence[str]) -> dict[str, bytes]:
    """Make a CA, the API server's certificate for these addresses, those of an administrator (`admin`) and of the
    controller-manager (`controllers`), and the key that tokens are signed with. Raises LabError."""
    if shutil.which("openssl") is None:
        raise LabError("openssl is missing: nothing else here makes certificates", hint="apt-get install openssl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = ",".join([*(f"IP:{address}" for address in dict.fromkeys(addresses)), "DNS:kubernetes.default.svc"])
        _certificate(folder, "ca", "/CN=kubernetes", "basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign,cRLSign")
        _certificate(
            folder, "apiserver", "/CN=kube-apiserver", f"extendedKeyUsage=serverAuth\nsubjectAltName={names}", ca=True
        )
        client = "extendedKeyUsage=clientAuth"
        _certificate(folder, "admin", "/O=system:masters/CN=admin", client, ca=True)
        _certificate(folder, "controllers", "/CN=system:kube-controller-manager", client, ca=True)
        _certificate(folder, "tokens", "/CN=tokens", client)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".crt", ".key")}


def _certificate(folder: Path, name: str, subject: str, extensions: str, *, ca: bool = False) -> None:
    config = f"[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\n[ext]\n{extensions}\n"
    (folder / "config").write_text(config)
    argv = ["openssl", "req", "-x509", "-config", "config", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    argv += [
        "-noenc",
        "-days",
        str(CERTIFICATE_DAYS),
        "-subj",
        subject,
        "-keyout",
        f"{name}.key",
        "-out",
        f"{name}.crt",
    ]
    argv += ["-CA", "ca.crt", "-CAkey", "ca.key"] if ca else []
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"openssl did not make a certificate: {done.stderr.strip()[-500:]}", hint="OpenSSL 3 is needed")
