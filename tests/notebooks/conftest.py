"""An environment with the wheel, the outer environment's packages, and no network."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from tests.distributions import Environment

# Imported at the start of every process of the environment. Kernels and their clients talk over loopback.
NO_NETWORK = """
import socket

connect = socket.socket.connect


def connect_at_home(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"notebooks run without a network, and this one asked for {address}")
    return connect(self, address)


socket.socket.connect = connect_at_home
"""


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Its own packages come first: ``ait`` is the wheel's, and no editable install or source tree is seen."""
    made = Environment(tmp_path_factory.mktemp("notebooks") / "environment")
    made.pip_install("--no-deps", str(wheel))
    (made.site_packages / "no_network.py").write_text(NO_NETWORK)
    # A path in a .pth file is only a path: .pth files that lie there, such as those of editable installs, are not run.
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (made.site_packages / "outer.pth").write_text("\n".join([*sorted(outer), "import no_network"]) + "\n")
    return made
