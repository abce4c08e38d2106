#!/usr/bin/python3
"""A charon for tests: takes connections by VICI, and writes what it is told to a file; it agrees on no keys."""

import json
import os
import re
import socket
import sys
from pathlib import Path

sys.path.insert(0, os.environ["CHARON_LIBRARY"])
from flannel.vici import decode, encode

REQUEST, RESPONSE, REGISTER, UNREGISTER, CONFIRM = 0, 1, 3, 4, 5

settings = Path(os.environ["STRONGSWAN_CONF"]).read_text()
found = re.search(r"unix://(\S+)", settings)
assert found
Path(found[1]).unlink(missing_ok=True)
server = socket.socket(socket.AF_UNIX)
server.bind(found[1])
server.listen()
heard = Path(found[1]).with_name("heard").open("a")
heard.write(json.dumps(["started", os.getpid()]) + "\n")
heard.flush()
while True:
    peer, _ = server.accept()
    while head := peer.recv(4, socket.MSG_WAITALL):
        data = peer.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        name = data[2 : 2 + data[1]].decode()
        if data[0] == REQUEST:
            heard.write(json.dumps([name, decode(data[2 + data[1] :])]) + "\n")
            heard.flush()
        answer = bytes([RESPONSE if data[0] == REQUEST else CONFIRM])
        if name == "load-conn" and b"10.244.9.0/24" in data:
            answer += encode({"success": "no", "errmsg": "it is nine"})
        peer.sendall(len(answer).to_bytes(4, "big") + answer)
