"""How the Kubernetes API is reached: a kubeconfig file, a URL, or what a pod finds in its own file system."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flannel.log import without_userinfo
from flannel.stores.base import StoreError
from flannel.stores.kubernetes_yaml import YamlError, read

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
#: Ways to authenticate that a kubeconfig may ask for, and that need a program or a service of its own.
_REFUSED = ("exec", "auth-provider", "username", "password", "as", "as-uid", "as-groups", "as-user-extra")


class Access(NamedTuple):
    """Where the API is, and who we are to it. Files are read when they are needed: tokens and certificates rotate."""

    host: str
    port: int
    tls: bool
    base_path: str = ""
    server_name: str = ""
    verify: bool = True
    ca_file: str = ""
    ca_data: bytes = b""
    cert_file: str = ""
    cert_data: bytes = b""
    key_file: str = ""
    key_data: bytes = b""
    token: str = ""
    token_file: str = ""

    def __repr__(self) -> str:
        return f"Access({self.url})"  # no secrets

    @property
    def url(self) -> str:
        """The API's URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.base_path}"


def find_access(url: str, kubeconfig: str, environment: Mapping[str, str]) -> Access:
    """What flags and environment name: a kubeconfig, a URL (which wins over its server), else a pod's own access.

    Raises StoreError.
    """
    if kubeconfig:
        return from_kubeconfig(kubeconfig, url)
    if url:
        return _at(url, "--kube-api-url")
    return in_cluster(environment)


def in_cluster(environment: Mapping[str, str], folder: str = SERVICE_ACCOUNT) -> Access:
    """What a pod has: the API's address in its environment, a token and a CA in files. Raises StoreError."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        raise StoreError(
            "no way to the Kubernetes API: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not both set, so "
            "this is no pod; give --kubeconfig-file or --kube-api-url"
        )
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise StoreError(f"KUBERNETES_SERVICE_PORT is {port!r}, not a port")
    token, ca = f"{folder}/token", f"{folder}/ca.crt"
    for path in (token, ca):
        if not os.path.exists(path):
            raise StoreError(f"{path} is missing: the pod has no service account's token mounted")
    return Access(host, int(port), tls=True, ca_file=ca, token_file=token)


def _at(url: str, source: str) -> Access:
    """Read a server's URL; HOST:PORT alone is plain HTTP, as kubectl has it."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise StoreError(f"{source} is {without_userinfo(url)!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StoreError(f"{source} is {without_userinfo(url)!r}, not a URL such as https://10.0.0.1:6443")
    if parts.username or parts.query or parts.fragment:
        raise StoreError(f"{source}: a user, a query or a fragment cannot stand in the server's URL")
    tls = parts.scheme == "https"
    return Access(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/"))


def from_kubeconfig(path: str, url: str = "") -> Access:
    """The current context of a kubeconfig file; `url`, where it is given, replaces its server. Raises StoreError."""
    try:
        with open(path, encoding="utf-8") as file:
            config = read(file.read())
    except OSError as error:
        raise StoreError(f"cannot read the kubeconfig {path}: {error.strerror}") from None
    except (YamlError, UnicodeDecodeError) as error:
        raise StoreError(f"kubeconfig {path}: {error}") from None
    return _Kubeconfig(path, config).access(url)


class _Kubeconfig:
    def __init__(self, path: str, config: Any) -> None:
        self._path, self._config = path, config
        if not isinstance(config, dict):
            raise self._error("it is not a mapping")

    def _error(self, text: str) -> StoreError:
        return StoreError(f"kubeconfig {self._path}: {text}")

    def access(self, url: str) -> Access:
        name = self._config.get("current-context")
        if not isinstance(name, str) or not name:
            raise self._error("it has no current-context")
        context = self._named("context", name)
        cluster = self._named("cluster", self._text(context, "cluster"))
        user_name = self._text(context, "user")
        user = self._named("user", user_name) if user_name else {}
        for key in _REFUSED:
            if user.get(key):
                raise self._error(
                    f"user {user_name!r} authenticates by {key!r}, which flanneld does not do; "
                    "give it a token, a tokenFile or a client certificate"
                )
        if cluster.get("proxy-url"):
            raise self._error("proxy-url is not supported; flanneld connects to the server itself")
        server = url or self._text(cluster, "server")
        if not server:
            raise self._error("its cluster has no server")
        return self._with_secrets(_at(server, "the server" if url == "" else "--kube-api-url"), cluster, user)

    def _with_secrets(self, access: Access, cluster: dict[str, Any], user: dict[str, Any]) -> Access:
        # As kubectl has it: data count where a file is given as well, and a token's file counts where a token is.
        token_file = self._file(user, "tokenFile")
        return access._replace(
            server_name=self._text(cluster, "tls-server-name"),
            verify=cluster.get("insecure-skip-tls-verify") is not True,
            ca_file=self._file(cluster, "certificate-authority"),
            ca_data=self._data(cluster, "certificate-authority-data"),
            cert_file=self._file(user, "client-certificate"),
            cert_data=self._data(user, "client-certificate-data"),
            key_file=self._file(user, "client-key"),
            key_data=self._data(user, "client-key-data"),
            token="" if token_file else self._text(user, "token"),
            token_file=token_file,
        )

    def _named(self, kind: str, name: str) -> dict[str, Any]:
        """The entry of that name in the list of clusters, contexts or users."""
        entries = self._config.get(kind + "s") or []
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name") == name:
                found = entry.get(kind) or {}
                if isinstance(found, dict):
                    return found
        raise self._error(f"there is no {kind} named {name!r}")

    def _text(self, entry: dict[str, Any], key: str) -> str:
        value = entry.get(key)
        if value is None:
            return ""
        if not isinstance(value, str) or "\n" in value or "\r" in value:
            raise self._error(f"{key} is not a line of text")
        return value

    def _file(self, entry: dict[str, Any], key: str) -> str:
        """A path; relative ones are meant from the kubeconfig's own folder."""
        value = self._text(entry, key)
        return os.path.join(os.path.dirname(os.path.abspath(self._path)), value) if value else ""

    def _data(self, entry: dict[str, Any], key: str) -> bytes:
        try:
            return base64.b64decode(self._text(entry, key), validate=True)
        except ValueError:  # binascii.Error is one; letters beyond ASCII are another
            raise self._error(f"{key} is not base64") from None
