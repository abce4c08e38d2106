"""How the Kubernetes API is found: kubeconfig files, a URL, a pod's own files; and the YAML that kubectl writes."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel.stores.base import StoreError
from flannel.stores.kubernetes_config import find_access
from flannel.stores.kubernetes_yaml import YamlError, read

CA = base64.b64encode(b"-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n").decode()

KUBECONFIG = f"""\
apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: {CA}
    server: https://10.0.0.1:6443
  name: kubernetes
- cluster:
    certificate-authority: pki/ca.crt
    server: "https://[fd00::1]/base/"
    tls-server-name: 'kubernetes.default'
  name: other  # the second
contexts:
- context:
    cluster: kubernetes
    user: admin
  name: admin@kubernetes
- context:
    cluster: other
    namespace: kube-flannel
    user: node
  name: node@other
current-context: admin@kubernetes
kind: Config
preferences: {{}}
users:
- name: admin
  user:
    client-certificate-data: Y2VydA==
    client-key-data: a2V5
- name: node
  user:
    tokenFile: /token
    token: old
- name: cloud
  user:
    exec:
      args:
      - get-token
      - --cluster
      command: aws
      env: null
      installHint: |
        Install it: see the
          manual.
      provideClusterInfo: false
"""


def write(folder: Path, text: str, context: str = "") -> str:
    if context:
        text = text.replace("current-context: admin@kubernetes", f"current-context: {context}")
    path = folder / "kubeconfig"
    path.write_text(text)
    return str(path)


def test_yaml_is_read_as_a_yaml_library_reads_it() -> None:
    text = KUBECONFIG
    assert read(text) == yaml.safe_load(text)
    assert read(json.dumps(yaml.safe_load(text))) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x 1",
        "a: *x",
        "a: !tag b",
        "a: {b: c}",
        "a: b\n c",
        "a: 'b",
        "a: 'b' c",
        "a: b: c",
        "a\nb: c",
        "a: b\n- c",
        "\ta: b",
        "a: 1\na: 2",
        "a: >\n  folded",
        "a: b\n  c: d",
        "a: b\n---\nc: d",
        'a: "\\x41"',
        "- - " * 60,
        "{",
    ],
)
def test_yaml_that_is_not_read_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(YamlError, match="line|JSON"):
        read(text)


_TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=8)
_VALUES = st.recursive(
    st.none() | st.booleans() | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES.filter(lambda value: isinstance(value, dict)))
@settings(max_examples=300, deadline=None)
def test_what_a_library_writes_is_read_back_or_refused(value: Any) -> None:
    text = yaml.safe_dump(value, width=1 << 20, allow_unicode=True)
    try:
        found = read(text)
    except YamlError:
        return
    # Keys may be scalars of another type to YAML, which they never are in a kubeconfig; numbers stay text here.
    assert found == yaml.load(text, yaml.BaseLoader) or found == value


@given(st.text(max_size=80))
@settings(max_examples=500, deadline=None)
def test_no_text_breaks_the_reader(text: str) -> None:
    with contextlib.suppress(YamlError):
        read(text)


def test_kubeconfig(tmp_path: Path) -> None:
    access = find_access("", write(tmp_path, KUBECONFIG), {})
    assert (access.url, access.verify) == ("https://10.0.0.1:6443", True)
    assert access.ca_data == base64.b64decode(CA)
    assert (access.cert_data, access.key_data) == (b"cert", b"key")
    assert "key" not in repr(access)


def test_kubeconfig_of_another_context(tmp_path: Path) -> None:
    access = find_access("", write(tmp_path, KUBECONFIG, "node@other"), {})
    assert (access.host, access.port, access.base_path) == ("fd00::1", 443, "/base")
    assert (access.ca_file, access.server_name) == (str(tmp_path / "pki/ca.crt"), "kubernetes.default")
    assert (access.token_file, access.token) == ("/token", "")


def test_url_wins_over_the_kubeconfigs_server(tmp_path: Path) -> None:
    access = find_access("http://127.0.0.1:8001", write(tmp_path, KUBECONFIG), {})
    assert (access.url, access.key_data) == ("http://127.0.0.1:8001", b"key")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("user: admin", "user: cloud"), "'exec'"),
        (("client-key-data: a2V5", "username: me"), "'username'"),
        (("client-key-data: a2V5", "as: me"), "'as'"),
        (("client-key-data: a2V5", "client-key-data: '?'"), "client-key-data is not base64"),
        (("client-key-data: a2V5", "client-key-data: 'ключ'"), "client-key-data is not base64"),
        (("user: admin", "user: nobody"), "no user named 'nobody'"),
        (("cluster: kubernetes", "cluster: none"), "no cluster named 'none'"),
        (("current-context: admin@kubernetes", "x: y"), "no current-context"),
        (("server: https://10.0.0.1:6443", "server: ftp://x"), "not a URL"),
        (("server: https://10.0.0.1:6443", "server: https://x:99999"), "[Pp]ort"),
        (("server: https://10.0.0.1:6443", "proxy-url: http://x"), "proxy-url is not supported"),
        (("clusters:", "clusters: &a"), "line 2"),
    ],
)
def test_kubeconfig_that_cannot_be_used_is_refused_by_name(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert KUBECONFIG.replace(*change) != KUBECONFIG
    text = KUBECONFIG.replace(*change)
    with pytest.raises(StoreError, match=said):
        find_access("", write(tmp_path, text), {})


def test_kubeconfig_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        find_access("", str(tmp_path / "none"), {})


def test_in_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flannel.stores import kubernetes_config

    where = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    with pytest.raises(StoreError, match="token is missing"):
        kubernetes_config.in_cluster(where, str(tmp_path))
    (tmp_path / "token").write_text("secret")
    (tmp_path / "ca.crt").write_text("")
    access = kubernetes_config.in_cluster(where, str(tmp_path))
    assert (access.url, access.token_file) == ("https://[fd00::1]:443", str(tmp_path / "token"))
    with pytest.raises(StoreError, match="this is no pod"):
        find_access("", "", {})
    with pytest.raises(StoreError, match="not a port"):
        kubernetes_config.in_cluster({**where, "KUBERNETES_SERVICE_PORT": "https"}, str(tmp_path))
