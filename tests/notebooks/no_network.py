"""Ends the network of the Python process that imports it, and of the processes that it starts.

Kernels and their clients talk over loopback, which stays. What Python itself asks of sockets is refused with an error
that says so. Code that is not Python finds no network where the system lets one make a network namespace without
privileges: run as a program, this starts a command in one, or fails::

    python no_network.py COMMAND ARGUMENT ...
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from typing import Any

MESSAGE = "notebooks run without a network, and this one asked for"
AT_HOME = ("127.0.0.1", "::1", "localhost", "", None)
# The audit events of connect and connect_ex, sendto, sendmsg and all functions that ask for names; what they pass first
# is a socket or a host. https://docs.python.org/3/library/audit_events.html
ON_SOCKETS = ("socket.connect", "socket.sendto", "socket.sendmsg")
ON_HOSTS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: no code can take it off again, nor reach these calls around it."""
    if event in ON_SOCKETS:
        here, address = arguments[:2]
        if here.family not in (socket.AF_INET, socket.AF_INET6) or address is None:  # None: connected already
            return
        host = address[0]
    elif event in ON_HOSTS:
        host = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes | bytearray) else host
    if host not in AT_HOME:
        raise OSError(f"{MESSAGE} {host}")


def leave_network() -> None:
    """Puts this process, which must have one thread, where loopback is the only interface.

    Raises:
        OSError: the system does not let it; the process is of no more use then.
    """
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace without privileges")
    for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16s24x", b"lo")), 16)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))


if __name__ == "__main__":
    leave_network()
    os.execvp(sys.argv[1], sys.argv[1:])
else:
    sys.addaudithook(refuse)
