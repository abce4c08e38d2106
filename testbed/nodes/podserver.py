"""What runs in every pod: it says who it is over HTTP, and echoes UDP.

A program, not a module: copied to nodes and run by a bare interpreter, small because a lab runs many.
Usage: `python -I -S podserver.py POD NODE ADDRESS`.

HTTP on port 80: `/` answers {"pod", "node", "address", "peer"}, `/bytes/N` N bytes, and a POST its body's length and
SHA-256.  UDP on port 7: the datagram comes back as it was.
"""

from __future__ import annotations

import hashlib
import json
import selectors
import socket
import sys

LIMIT = 1 << 30


class Client:
    """One HTTP connection, served in full and closed."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock = sock
        self.peer = peer
        self.head = b""
        self.body_left = -1
        self.body_size = 0
        self.digest = hashlib.sha256()
        self.out = b""
        self.filler = 0

    def read(self) -> bool:
        """Take what has arrived; False once the connection can be dropped."""
        data = self.sock.recv(1 << 16)
        if not data:
            return False
        if self.body_left < 0:
            self.head += data
            head, end, data = self.head.partition(b"\r\n\r\n")
            if not end:
                return len(self.head) < 1 << 14
            self.head = head
            self.body_left = self.content_length()
        self.digest.update(data)
        self.body_size += len(data)
        self.body_left -= len(data)
        if self.body_left <= 0:
            self.answer()
        return True

    def content_length(self) -> int:
        for line in self.head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length" and value.strip().isdigit():
                return int(value)
        return 0

    def answer(self) -> None:
        words = self.head.split(None, 2)
        path = words[1].decode("latin-1") if len(words) > 1 else "/"
        if path.startswith("/bytes/") and path[7:].isdigit():
            self.filler = min(int(path[7:]), LIMIT)
            self.respond(b"", self.filler, "application/octet-stream")
            return
        about: dict[str, str | int] = dict(IDENTITY, peer=self.peer, path=path)
        if self.body_size:
            about.update(received=self.body_size, sha256=self.digest.hexdigest())
        text = json.dumps(about).encode() + b"\n"
        self.respond(text, len(text), "application/json")

    def respond(self, body: bytes, length: int, kind: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        self.out = head.encode() + body

    def write(self) -> bool:
        """Send what is due; False once all is sent."""
        if not self.out and self.filler:
            count = min(self.filler, 1 << 16)
            self.out = b"f" * count
            self.filler -= count
        sent = self.sock.send(self.out)
        self.out = self.out[sent:]
        return bool(self.out or self.filler)


def serve(http: socket.socket, udp: socket.socket) -> None:
    """Answer for ever."""
    selector = selectors.DefaultSelector()
    selector.register(http, selectors.EVENT_READ)
    selector.register(udp, selectors.EVENT_READ)
    while True:
        for key, events in selector.select():
            if key.fileobj is udp:
                echo(udp)
            elif key.fileobj is http:
                sock, peer = http.accept()
                sock.setblocking(False)
                selector.register(sock, selectors.EVENT_READ, Client(sock, peer[0].removeprefix("::ffff:")))
            else:
                advance(selector, key.data, events)


def echo(udp: socket.socket) -> None:
    try:
        data, peer = udp.recvfrom(1 << 16)
        udp.sendto(data, peer)
    except OSError:  # a reply that cannot be sent, or an error that an earlier one brought back
        pass


def advance(selector: selectors.BaseSelector, client: Client, events: int) -> None:
    try:
        more = client.read() if events & selectors.EVENT_READ else client.write()
    except BlockingIOError:
        return
    except OSError:
        more = False
    if not more:
        selector.unregister(client.sock)
        client.sock.close()
    elif client.out or client.filler:
        selector.modify(client.sock, selectors.EVENT_WRITE, client)


def main() -> None:
    """Listen, say so on standard output, serve."""
    http = socket.create_server(("::", 80), backlog=128, family=socket.AF_INET6, dualstack_ipv6=True)
    http.setblocking(False)
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.bind(("::", 7))
    udp.setblocking(False)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    serve(http, udp)


IDENTITY = {"pod": sys.argv[1], "node": sys.argv[2], "address": sys.argv[3]}
main()
