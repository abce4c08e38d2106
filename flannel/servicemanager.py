"""Telling a service manager (systemd's protocol: a datagram to the socket in NOTIFY_SOCKET) how things are."""

from __future__ import annotations

import os
import socket

from flannel import log

_SECONDS = 5.0


class ServiceManager:
    """The service manager, where there is one; what is said twice is told once."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._last = ""

    @classmethod
    def of_environment(cls) -> ServiceManager:
        """The one that started this process."""
        return cls(os.environ.get("NOTIFY_SOCKET", ""))

    def tell(self, *assignments: str) -> None:
        """Send assignments such as `READY=1` and `STATUS=text`; a failure is logged, and costs nothing else."""
        text = "\n".join(one.replace("\n", " ") for one in assignments)
        if not self._address or text == self._last:
            return
        self._last = text
        # systemd writes a socket of the abstract namespace with an @ in front.
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_SECONDS)
                sock.sendto(text.encode("utf-8", "backslashreplace"), address)
        except OSError as error:
            log.warning(f"cannot tell the service manager at NOTIFY_SOCKET: {error}")
