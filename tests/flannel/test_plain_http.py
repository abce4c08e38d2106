"""What is loaded of the HTTP client where no TLS is spoken, and that TLS is there when it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIB = str(Path(__file__).parent.parent.parent)


def said(program: str) -> str:
    """What a fresh interpreter prints."""
    argv = [sys.executable, "-IS", "-c", f"import sys; sys.path.insert(0, {LIB!r})\n{program}"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def test_without_tls_nothing_of_it_is_loaded() -> None:
    store = "from flannel.stores.etcd_client import EtcdClient, TlsFiles"
    assert said(f"{store}\nprint('ssl' in sys.modules, '_ssl' in sys.modules)") == "False False"


def test_tls_is_there_whenever_it_is_asked_for() -> None:
    context = "from flannel.stores.etcd_client import TlsFiles, tls_context\nfrom flannel.stores import etcd_http\n"
    made = "tls_context(TlsFiles('', '', ''))\nprint(etcd_http.http.client.HTTPSConnection.__name__)"
    assert said(context + made) == "HTTPSConnection"
    assert said("import ssl\n" + context + made) == "HTTPSConnection"


def test_an_ascii_name_needs_no_table_of_international_ones() -> None:
    program = """
import socket
from flannel.stores import plainhttp
server = socket.create_server(("127.0.0.1", 0))
for host in ("127.0.0.1", "localhost"):
    plainhttp.connect(host, server.getsockname()[1], 5).close()
print("encodings.idna" in sys.modules)
"""
    assert said(program) == "False"
