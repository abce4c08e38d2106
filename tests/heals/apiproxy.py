"""Stands between flanneld and a real API server, and makes trouble; a program for a bare interpreter on a lab's node.

Usage: `apiproxy.py PORT SERVER SERVER-PORT FOLDER MODE-FILE`. FOLDER has the API server's own certificate. The mode is
read anew all the time: `pass`; `away` closes every connection; a status (`410`) answers everything so, and ends watches
with such an event; `half` cuts an answer or a line in two; `hang` says nothing any more.
"""

from __future__ import annotations

import http.client
import json
import select
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT, SERVER, SERVER_PORT, FOLDER, MODE_FILE = sys.argv[1:]
LOOK = 0.05


def mode() -> str:
    with open(MODE_FILE) as file:
        return file.read().strip()


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        trouble = mode()
        if trouble == "away":
            return
        if trouble.isdigit():
            self.answer(int(trouble), json.dumps(status(int(trouble))).encode())
        elif trouble == "hang":
            self.wait_while("hang")
        else:
            self.forward(body)

    do_PATCH = do_GET  # noqa: N815 - what http.server calls

    def wait_while(self, trouble: str) -> None:
        while mode() == trouble:
            time.sleep(LOOK)

    def answer(self, code: int, data: bytes, length: int = -1) -> None:
        self.send_response(code)
        for key, text in (("Content-Type", "application/json"), ("Connection", "close")):
            self.send_header(key, text)
        self.send_header("Content-Length", str(length if length >= 0 else len(data)))
        self.end_headers()
        self.wfile.write(data)

    def forward(self, body: bytes) -> None:
        context = ssl.create_default_context(cafile=f"{FOLDER}/ca.crt")
        connection = http.client.HTTPSConnection(SERVER, int(SERVER_PORT), context=context, timeout=60)
        skipped = ("host", "content-length", "connection")
        headers = {key: text for key, text in self.headers.items() if key.lower() not in skipped}
        connection.request(self.command, self.path, body or None, headers)
        response = connection.getresponse()
        if "watch=1" in self.path and response.status == 200:
            self.stream(connection, response)
        else:
            data = response.read()
            self.answer(response.status, data[: len(data) // 2] if mode() == "half" else data, len(data))
        connection.close()

    def stream(self, connection: http.client.HTTPSConnection, response: http.client.HTTPResponse) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        rest = b""
        while True:
            trouble = mode()
            if trouble == "hang":
                time.sleep(LOOK)
                continue
            if trouble == "away":
                return
            if trouble.isdigit():
                self.piece(json.dumps({"type": "ERROR", "object": status(int(trouble))}).encode() + b"\n")
                self.wfile.write(b"0\r\n\r\n")
                return
            if trouble == "half":
                self.piece(b'{"type":"MODIFIED","object":{"kind":"Node","metadata":{"name":"worker')
                return
            sock = connection.sock
            assert isinstance(sock, ssl.SSLSocket)
            if not sock.pending() and not select.select([sock], [], [], LOOK)[0]:
                continue
            data = response.read1(1 << 16)
            if not data:
                self.wfile.write(b"0\r\n\r\n")
                return
            rest += data
            whole, newline, rest = rest.rpartition(b"\n")
            if newline:
                self.piece(whole + newline)

    def piece(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


def status(code: int) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "code": code, "status": "Failure", "message": "made to fail"}


def main() -> None:
    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients go away in the middle of things here

    server = Server(("", int(PORT)), Proxy)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{FOLDER}/apiserver.crt", f"{FOLDER}/apiserver.key")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    print("listening", flush=True)
    server.serve_forever()


main()
