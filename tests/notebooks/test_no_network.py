"""The cut through which notebooks run: every way to the network ends there, and loopback does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.distributions import run
from tests.notebooks.conftest import NO_NETWORK

# Addresses and names that are nobody's: TEST-NET-1 (RFC 5737), 2001:db8::/32 (RFC 3849), .invalid (RFC 6761).
WAYS = {
    "connect": "socket.socket().connect(('192.0.2.1', 80))",
    "connect of the class below": "_socket.socket().connect(('192.0.2.1', 80))",
    "connect over IPv6": "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))",
    "connect_ex": "socket.socket().connect_ex(('192.0.2.1', 80))",
    "connect of a datagram socket": "socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 80))",
    "sendto": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'hello', ('192.0.2.1', 80))",
    "sendmsg": "socket.socket(type=socket.SOCK_DGRAM).sendmsg([b'hello'], [], 0, ('192.0.2.1', 80))",
    "create_connection": "socket.create_connection(('192.0.2.1', 80))",
    "getaddrinfo": "socket.getaddrinfo('some.invalid', 80)",
    "getaddrinfo in bytes": "socket.getaddrinfo(b'some.invalid', 80)",
    "gethostbyname": "socket.gethostbyname('some.invalid')",
    "gethostbyname_ex": "socket.gethostbyname_ex('some.invalid')",
    "gethostbyaddr": "socket.gethostbyaddr('192.0.2.1')",
    "getnameinfo": "socket.getnameinfo(('192.0.2.1', 80), 0)",
    "urlopen": "urllib.request.urlopen('http://some.invalid/')",
    "asyncio": "asyncio.run(asyncio.open_connection('192.0.2.1', 80))",
    "a process of its own": "subprocess.run([sys.executable, '-c', code], check=True)",
}
IMPORTS = "import _socket, asyncio, socket, subprocess, sys, urllib.request\n"
CODE = "code = 'import no_network, socket; socket.create_connection((\"192.0.2.1\", 80))'\n"


def python(script: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", script]
    return run(command, env={"PYTHONPATH": str(NO_NETWORK.parent)}, timeout=60)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_network_is_an_error_that_says_so(way: str) -> None:
    result = python(f"import no_network\n{IMPORTS}{CODE}{WAYS[way]}")
    assert result.returncode == 1
    assert "OSError: notebooks run without a network, and this one asked for" in result.stderr


LOOPBACK = """
server = socket.create_server(("127.0.0.1", 0))
port = server.getsockname()[1]
client = socket.create_connection(("localhost", port))
client.sendall(b"hello")
assert server.accept()[0].recv(5) == b"hello"
datagrams, other = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
datagrams.bind(("127.0.0.1", 0))
other.sendto(b"hello", datagrams.getsockname())
assert datagrams.recv(5) == b"hello"
pair = socket.socketpair()
pair[0].sendmsg([b"hello"])
assert pair[1].recv(5) == b"hello"
print("heard")
"""


def test_loopback_stays() -> None:
    assert python("import no_network\n" + IMPORTS + LOOPBACK).stdout == "heard\n"


# What Python's own sockets do not see: the C library, called directly.
FROM_C = """
import ctypes, errno, os, socket, struct
assert [name for _, name in socket.if_nameindex()] == ["lo"]
c = ctypes.CDLL(None, use_errno=True)
address = struct.pack("=H", socket.AF_INET) + struct.pack("!H", 80) + socket.inet_aton("192.0.2.1") + bytes(8)
assert c.connect(c.socket(socket.AF_INET, socket.SOCK_DGRAM, 0), address, len(address)) == -1
assert ctypes.get_errno() == errno.ENETUNREACH
print(os.getuid())
"""


def test_in_a_namespace_of_its_own_code_that_is_not_python_finds_no_network_either() -> None:
    before = (sys.executable, "-S", str(NO_NETWORK))
    if run([*before, "true"]).returncode != 0:
        pytest.skip("the system gives no network namespace without privileges")
    result = python(FROM_C, before)
    assert result.stdout == f"{os.getuid()}\n", result.stderr
    assert python(IMPORTS + LOOPBACK, before).stdout == "heard\n"


def test_a_command_that_cannot_leave_the_network_does_not_run() -> None:
    script = "import ctypes\nctypes.CDLL = lambda *_, **__: type('C', (), {'unshare': lambda self, flags: -1})()\n"
    script += "import runpy, sys\nsys.argv = ['no_network', 'echo', 'ran']\n"
    script += f"runpy.run_path({str(NO_NETWORK)!r}, run_name='__main__')"
    result = python(script)
    assert result.returncode == 1
    assert "OSError" in result.stderr
    assert "ran" not in result.stdout
