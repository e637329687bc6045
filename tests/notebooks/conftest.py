"""An environment with the wheel, the outer environment's packages, and no network."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributions import Environment, run

NO_NETWORK = Path(__file__).with_name("no_network.py")


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Its own packages come first: ``ait`` is the wheel's, and no editable install or source tree is seen."""
    made = Environment(tmp_path_factory.mktemp("notebooks") / "environment")
    made.pip_install("--no-deps", str(wheel))
    shutil.copy(NO_NETWORK, made.site_packages)
    # A path in a .pth file is only a path: .pth files that lie there, such as those of editable installs, are not run.
    # The line that imports is run at the start of every process of the environment.
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (made.site_packages / "outer.pth").write_text("\n".join([*sorted(outer), "import no_network"]) + "\n")
    return made


@dataclass(frozen=True)
class Outside:
    """How a command is started without a network."""

    command: list[str]
    """What goes before the command: empty where the system gives no namespace, and Python's own cut has to do."""


@pytest.fixture(scope="session")
def outside(environment: Environment) -> Outside:
    command = [str(environment.python), "-S", str(NO_NETWORK)]
    return Outside(command if run([*command, "true"]).returncode == 0 else [])
