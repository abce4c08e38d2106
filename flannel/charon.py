"""strongSwan's charon as a child: started again where it ends, told of keys and connections, and held to them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any, NamedTuple

from flannel import log
from flannel.backends.base import BackendError
from flannel.kernel import xfrm
from flannel.kernel.netlink import Netlink
from flannel.process import find
from flannel.vici import Vici, ViciError, ViciRefused

_NAMES = ("charon", "/usr/lib/strongswan/charon", "/usr/lib/ipsec/charon", "/usr/libexec/strongswan/charon",
          "/usr/libexec/ipsec/charon", "charon-systemd")  # fmt: skip
#: Not all that is installed: one plugin does ESP without the kernel, another lets local networks past it.
_PLUGINS = "random nonce openssl aes sha1 sha2 hmac kdf gmp kernel-netlink socket-default vici"
_FOLDER = "/run/flannel"
_PID_FILE = "/run/charon.pid"
#: Seconds until charon serves at the latest, between two tries, and for its end.
_SERVES_WITHIN, _RETRY, _ENDS_WITHIN = 10.0, 1.0, 5.0
#: Seconds that a peer has which is to begin, until this node does.
_PEER_BEGINS_WITHIN = 2.0
_UPDOWN = "child-updown"


def find_charon() -> str:
    """charon's path. Raises BackendError where there is none."""
    program = next((path for name in _NAMES if (path := find(name))), "")
    if not program:
        raise BackendError("charon is not installed (Debian: charon-systemd, libstrongswan-standard-plugins)")
    return program


class _Child(NamedTuple):
    """A pair of associations that charon takes for installed, by the name of its connection and its own."""

    connection: str
    name: str
    number: str
    spi_in: int
    spi_out: int


class Charon:
    """Works on a thread of its own; `want` and `look` say what it has to do."""

    def __init__(self, program: str, here: str, psk: str, folder: str = _FOLDER) -> None:
        self._program, self._here, self._psk = program, here, psk
        self._folder, self._socket = folder, f"{folder}/charon.vici"
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wanted: dict[str, dict[str, Any]] = {}
        self._told: dict[str, dict[str, Any]] = {}
        self._due: dict[str, float] = {}  # when connections are begun that their peers should have begun by then
        self._vici: Vici | None = None
        self._process = self._handle = -1
        self._looking = self._stopping = False
        self._complaint = ""
        # What an earlier charon left in the kernel; packets need it until this one has agreed on new keys.
        self._left: set[xfrm.Association] = set()
        self._thread = threading.Thread(target=self._work, name="charon", daemon=True)

    # -- from any thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it. Raises BackendError."""
        self._spawn()
        self._thread.start()

    def want(self, connections: Mapping[str, dict[str, Any]]) -> None:
        """Have these connections, and no others, from now on."""
        self._wanted = dict(connections)
        os.eventfd_write(self._wake, 1)

    def look(self) -> None:
        """An association has gone from the kernel: see whether charon knows."""
        self._looking = True
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End it, and wait for its end.

        It is killed: one that is asked to end tells the peers, and takes its associations out of the kernel, where
        packets need them until flanneld runs again.
        """
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._kill()
        if self._thread.is_alive():
            self._thread.join(_ENDS_WITHIN)
        self._kill()  # it may just have been started again
        if self._handle >= 0 and _readable(_ENDS_WITHIN, self._handle):
            self._reap()
        log.info("Stopped charon daemon")

    def _kill(self) -> None:
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    # -- the process ---------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        settings = f"{self._folder}/strongswan.conf"
        daemon = (
            f"install_routes = no\n routing_table = 0\n load = {_PLUGINS}\n"
            f" plugins {{ vici {{ socket = unix://{self._socket} }} }}"
        )
        try:
            os.makedirs(self._folder, mode=0o755, exist_ok=True)
            with open(settings, "w", encoding="ascii") as file:
                file.write(f"charon {{\n {daemon}\n}}\ncharon-systemd {{\n {daemon}\n}}\n")
            _remove_stale_pid()
            tied = find("setpriv")
            argv = [tied, "--pdeathsig", "KILL", "--", self._program] if tied else [self._program]
            environment = {**os.environ, "STRONGSWAN_CONF": settings}
            self._left = _associations()
            self._process = os.posix_spawn(
                argv[0], argv, environment, setsigdef=[signal.SIGINT, signal.SIGTERM], setpgroup=0
            )  # fmt: skip
            self._handle = os.pidfd_open(self._process)
        except OSError as error:
            raise BackendError(f"cannot start {self._program}: {error.strerror}") from None
        log.info(f"Started {self._program}")

    def _runs(self) -> bool:
        if self._handle < 0:
            return False
        if _readable(0, self._handle):
            self._reap()
            return False
        return True

    def _reap(self) -> None:
        os.waitpid(self._process, 0)
        os.close(self._handle)
        self._process = self._handle = -1

    # -- the conversation ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping:
            try:
                self._step()
                self._complaint = ""
            except (ViciError, BackendError, OSError) as error:
                self._failed(str(error))
            except Exception as error:  # noqa: BLE001 - nobody else would start charon again
                self._failed(log.place_of(error))
        self._hang_up()

    def _failed(self, why: str) -> None:
        if why != self._complaint and not self._stopping:
            log.error(f"ipsec: {why}; trying again")
        self._complaint = why
        self._hang_up()
        self._wait(_RETRY, ended=False)

    def _step(self) -> None:
        """Do what is due, then wait for more: a word of `want` or `look`, charon's, or its end."""
        if not self._runs():
            log.error("charon has ended; starting it again")
            self._hang_up()
            self._spawn()
        if self._vici is None:
            self._vici = self._call()
            self._vici.listen(_UPDOWN)
        while self._wanted != self._told and not self._stopping:
            self._tell(self._vici, self._wanted)
        if self._looking:
            self._looking = False
            self._revive(self._vici)
        self._begin_due(self._vici)
        for event in self._vici.events():
            self._replace_left(event)
        self._wait(max(0.0, min(self._due.values()) - time.monotonic()) if self._due else None)

    def _hang_up(self) -> None:
        if self._vici is not None:
            self._vici.close()
        self._vici, self._told, self._due = None, {}, {}

    def _call(self) -> Vici:
        """Wait for charon to serve. Raises ViciError where it does not in time, or ends."""
        deadline, pause = time.monotonic() + _SERVES_WITHIN, 0.01
        while True:
            try:
                return Vici(self._socket)
            except ViciError:
                if time.monotonic() > deadline or self._stopping or _readable(pause, self._handle):
                    raise
            pause = min(2 * pause, 0.2)

    def _wait(self, seconds: float | None, *, ended: bool = True) -> None:
        """Wait for a word or an event; with `ended` also for charon's end."""
        handles = [self._wake, *(handle for handle in (self._handle,) if handle >= 0 and ended)]
        if self._vici is not None:
            handles.append(self._vici.fileno())
        if not self._stopping:
            _readable(seconds, *handles)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _tell(self, vici: Vici, wanted: Mapping[str, dict[str, Any]]) -> None:
        if not self._told:
            vici.ask("load-shared", {"type": "IKE", "data": self._psk, "owners": [self._here]})
        for name in [name for name in self._told if name not in wanted]:
            vici.ask("unload-conn", {"name": name})
            try:
                vici.ask("terminate", {"ike": name, "force": "yes", "timeout": "-1"})
            except ViciError as error:
                log.debug(f"ipsec: {name} had no association to end: {error}")
            del self._told[name]
            self._due.pop(name, None)
        for name, connection in wanted.items():
            if self._told.get(name) == connection:
                continue
            peer = connection["remote_addrs"][0]
            vici.ask("load-shared", {"type": "IKE", "data": self._psk, "owners": [peer]})
            try:
                vici.ask("load-conn", {name: connection})
            except ViciRefused as error:  # the others are none the worse for it
                log.error(f"ipsec: {name}: {error}")
            self._told[name] = connection
            if all(child["start_action"] == "none" for child in connection["children"].values()):
                self._due[name] = time.monotonic() + _PEER_BEGINS_WITHIN

    def _begin_due(self, vici: Vici) -> None:
        """Begin what a peer has not begun, such as one that knew too early of this node, or not at all."""
        now = time.monotonic()
        for name in [name for name, when in self._due.items() if when <= now]:
            del self._due[name]
            sections = vici.stream("list-sas", "list-sa", {"ike": name})
            if not any(child.connection == name for section in sections for child in _children(section)):
                for child in self._told[name]["children"]:
                    vici.ask("initiate", {"ike": name, "child": child, "timeout": "-1"})

    # -- associations --------------------------------------------------------------------------------------------------

    def _revive(self, vici: Vici) -> None:
        """Have associations made again that charon takes for installed, but that are not in the kernel any more."""
        lost = self._lost(vici)
        # One that charon itself was just replacing is not there when asked for again.
        lost = lost and self._lost(vici) & lost
        for child in lost:
            with contextlib.suppress(ViciError):
                vici.ask("terminate", {"child-id": child.number, "timeout": "-1"})
        # Both nodes may have begun, so that there were two.
        for connection, name in {(child.connection, child.name) for child in lost}:
            log.warning(f"ipsec: the association {name} has gone from the kernel; agreeing on another one")
            vici.ask("initiate", {"ike": connection, "child": name, "timeout": "-1"})

    def _lost(self, vici: Vici) -> set[_Child]:
        children = {child for section in vici.stream("list-sas", "list-sa", {}) for child in _children(section)}
        there = {association.spi for association in _associations()}
        return {child for child in children if not {child.spi_in, child.spi_out} <= there}

    def _replace_left(self, event: Mapping[str, Any]) -> None:
        """Take what an earlier charon left for a peer out of the kernel, now that there is a new pair."""
        if not self._left or event.get("up") != "yes":
            return
        ends = [
            {str(one.get("local-host")), str(one.get("remote-host"))} for one in event.values() if isinstance(one, dict)
        ]
        old = {one for one in self._left if {str(one.near), str(one.far)} in ends}
        self._left -= old
        netlink = Netlink(xfrm.NETLINK_XFRM)
        for failure in netlink.batch([xfrm.delete_association(one) for one in old]):
            log.debug(f"ipsec: an association of an earlier run was gone already: {failure}")
        netlink.close()


def _children(section: Mapping[str, Any]) -> list[_Child]:
    """The installed pairs in one answer of `list-sas`."""
    found = []
    for connection, ike in section.items():
        for child in ike.get("child-sas", {}).values() if isinstance(ike, dict) else ():
            if child.get("state") == "INSTALLED":
                spis = (int(child.get(key, "0"), 16) for key in ("spi-in", "spi-out"))
                found.append(_Child(connection, str(child.get("name")), str(child.get("uniqueid")), *spis))
    return found


def _associations() -> set[xfrm.Association]:
    netlink = Netlink(xfrm.NETLINK_XFRM)
    try:
        return set(xfrm.dump_associations(netlink))
    finally:
        netlink.close()


def _readable(seconds: float | None, *handles: int) -> bool:
    """Wait until one of the descriptors can be read; whether one can."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def _remove_stale_pid() -> None:
    """Remove the PID file of a charon that was killed: where its number is another process's by now, none starts."""
    try:
        with open(_PID_FILE, encoding="ascii", errors="replace") as file:
            number = file.read().strip()
        with open(f"/proc/{int(number)}/stat", encoding="ascii", errors="replace") as file:
            name, _, state = file.read().partition("(")[2].rpartition(")")
            if name.startswith("charon") and not state.startswith(" Z"):
                return
    except FileNotFoundError:
        if not os.path.exists(_PID_FILE):
            return
    except ValueError:
        pass
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_PID_FILE)


def connection(
    here: IPv4Address, own: str, there: IPv4Address, subnet: str, *, proposals: tuple[str, str], encap: bool
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """A connection to a peer as VICI has it, with its name. `proposals` are those of IKE and of ESP.

    The node with the lower address begins. Where both begin at once each may take the other's first contact for a new
    start, and end the one association that the other goes on to use.
    """
    child = {
        "local_ts": [own], "remote_ts": [subnet], "esp_proposals": [proposals[1]],
        "start_action": "start" if here < there else "none", "close_action": "trap", "dpd_action": "restart",
        "mode": "tunnel", "reqid": str(xfrm.REQID), "rekey_time": "1h", "policies": "no",
    }  # fmt: skip
    made = {
        "local_addrs": [str(here)], "remote_addrs": [str(there)], "proposals": [proposals[0]], "version": "2",
        "keyingtries": "0", "encap": "yes" if encap else "no",
        "local": {"auth": "psk", "id": str(here)}, "remote": {"auth": "psk", "id": str(there)},
        "children": {f"{own}-{subnet}": child},
    }  # fmt: skip
    return f"{here}-{own}-{subnet}-{there}", made
