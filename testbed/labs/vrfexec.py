"""Runs a command whose sockets are in a VRF: what `ip vrf exec` does, without the rights over the machine it takes.

This file is a program, not a module: `python -I -S vrfexec.py VRF COMMAND…`.  `ip vrf exec` has the kernel run a BPF
program for each new socket, which nobody may load in a user namespace.  Here the kernel asks a helper instead (by
seccomp's user notification, Linux 5.14): whenever the command, or what it starts, makes an IPv4 or IPv6 socket, the
helper makes it, binds it to the VRF's device and hands it over.  The helper ends with the last of them.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import sys

SET_MODE_FILTER, NEW_LISTENER = 1, 8
USER_NOTIFY, ALLOW = 0x7FC00000, 0x7FFF0000
#: machine → what the kernel calls it, and its numbers of seccomp() and socket()
CALLS = {"x86_64": (0xC000003E, 317, 41), "aarch64": (0xC00000B7, 277, 198)}

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, MACHINE, FAMILY = 0, 4, 16  # offsets in what a filter sees

RECEIVE, ANSWER, HAND_OVER = 0xC0502100, 0xC0182101, 0x40182103
AND_ANSWER = 2
REQUEST = struct.Struct("QIIiIQ6Q")
REPLY = struct.Struct("QqiI")
HANDED = struct.Struct("QIIII")

libc = ctypes.CDLL(None, use_errno=True)


def ask_for_sockets() -> int:
    """From now on the kernel asks whoever holds what this returns when this process makes an IP socket."""
    machine, seccomp, socket_call = CALLS[os.uname().machine]
    steps = [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 0, 5, machine),
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 3, socket_call),
        (LOAD, 0, 0, FAMILY),
        (EQUAL, 2, 0, socket.AF_INET),
        (EQUAL, 1, 0, socket.AF_INET6),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, USER_NOTIFY),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program))
    listener: int = libc.syscall(seccomp, SET_MODE_FILTER, NEW_LISTENER, header)
    if listener < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    return listener


def socket_in(vrf: bytes, family: int, kind: int, protocol: int) -> int:
    """A socket that is bound to a VRF; a negative errno where there can be none."""
    made: int = libc.socket(family, kind, protocol)
    if made < 0:
        return -ctypes.get_errno()
    if libc.setsockopt(made, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, vrf, len(vrf)) < 0:
        number = ctypes.get_errno()
        os.close(made)
        return -number
    return made


def answer(listener: int, vrf: bytes) -> None:
    """Make the one socket that is being waited for."""
    request = bytearray(REQUEST.size)
    fcntl.ioctl(listener, RECEIVE, request)
    number, _, _, _, _, _, family, kind, protocol, *_ = REQUEST.unpack(request)
    made = socket_in(vrf, family & 0xFFFFFFFF, kind & 0xFFFFFFFF, protocol & 0xFFFFFFFF)
    fault = made
    if made >= 0:
        try:
            flags = os.O_CLOEXEC if kind & socket.SOCK_CLOEXEC else 0
            fcntl.ioctl(listener, HAND_OVER, HANDED.pack(number, AND_ANSWER, made, 0, flags))
            return
        except OSError as error:  # it may have no more descriptors, and would wait for ever
            fault = -(error.errno or errno.EIO)
        finally:
            os.close(made)
    fcntl.ioctl(listener, ANSWER, bytearray(REPLY.pack(number, 0, fault, 0)))


def serve(near: socket.socket, vrf: bytes) -> None:
    """Be the helper: answer until nobody is left who could ask."""
    message, control, _, _ = near.recvmsg(1, socket.CMSG_LEN(4))
    if not message:
        return  # the command could not be started
    listener = array.array("i", control[0][2])[0]
    near.close()
    quiet = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):  # or whoever reads the command's output would wait for the helper's end
        os.dup2(quiet, number)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        for _, events in poll.poll():
            if events & select.POLLIN:
                with contextlib.suppress(OSError):  # who asked is gone
                    answer(listener, vrf)
            elif events & (select.POLLHUP | select.POLLERR):
                return


def main() -> None:
    """Start the helper, then become the command."""
    vrf, argv = os.fsencode(sys.argv[1]), sys.argv[2:]
    if sys.argv[1] not in [name for _, name in socket.if_nameindex()]:
        sys.exit(f"there is no VRF {sys.argv[1]}")
    near, far = socket.socketpair()
    if os.fork() == 0:
        far.close()
        os.setsid()  # an interrupt from the terminal is for the command
        serve(near, vrf)
        os._exit(0)
    near.close()
    listener = ask_for_sockets()
    far.sendmsg([b"l"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
    far.close()
    os.close(listener)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 (no shell is wanted)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127 if error.errno == errno.ENOENT else 126)


main()
