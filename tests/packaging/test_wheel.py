"""The distribution files, used as a stranger would: in an environment that has torch and no compiler."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributions import Environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

TRAIN_ONE_STEP = """
import sys
import torch
import ait

torch.manual_seed(0)
layer = ait.GlobalWorkspaceLayer(48, num_slots=8, slot_dim=8, num_heads=2, top_k=20)
x = torch.randn(4, 16, 48, requires_grad=True)
y = layer(x)
(y.square().mean() + ait.balance_loss(layer)).backward()
assert y.shape == x.shape and torch.isfinite(y).all()
assert torch.isfinite(x.grad).all() and (x.grad != 0).any()
missing = [name for name, parameter in layer.named_parameters() if parameter.grad is None]
assert not missing, missing
kernels = ait.show_config("dicts")["kernels"]
assert all(runs.startswith("C++ on cpu") for runs in kernels.values()), kernels
model = ait.create_model("ait_tiny", img_size=8, patch_size=2, in_chans=1, num_classes=10)
model(torch.randn(2, 1, 8, 8)).sum().backward()
extras = {"torchvision", "cv2", "sklearn", "PIL", "matplotlib", "tensorboard", "tqdm", "tyro", "timm"}
extras |= {"transformers", "safetensors"}
assert not extras & set(sys.modules), extras & set(sys.modules)
print("ran on torch", torch.__version__)
"""


def test_sdist_and_wheel_hold_what_they_should(dist_dir: Path, wheel: Path) -> None:
    (sdist,) = dist_dir.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "csrc/schemas.cpp",
        "csrc/common/simd.h",
        "csrc/module.cpp",
        "csrc/exports.map",
        "LICENSE",
        "setup.py",
    } <= sources
    assert not [name for name in sources if name.endswith(".so")]
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    assert {"ait/libait_cpu.so", "ait/_build_info.py", "ait/ops/reference.py"} <= files
    weights = {f"ait/models/weights/{model}-cifar10.safetensors" for model in ("ait_tiny", "vit_tiny")}
    assert weights | {"ait/models/weights/README.md"} <= files & sources
    assert any(name.startswith("ait/_C.") and name.endswith(".so") for name in files)
    assert not [name for name in files if name.startswith(("tests", "experiments", "csrc"))]


def test_wheel_trains_with_torch_and_numpy_alone_and_no_compiler(
    wheel: Path, make_environment: Callable[[], Environment]
) -> None:
    environment = make_environment()
    environment.link_distributions("torch", "numpy")
    environment.pip_install("--no-deps", str(wheel))
    without_extras = environment.run_python("import matplotlib")
    assert "ModuleNotFoundError" in without_extras.stderr, "the environment is not empty, so the test shows nothing"
    result = environment.run_python(TRAIN_ONE_STEP)
    assert result.returncode == 0, result.stderr
    assert "ran on torch" in result.stdout


def test_the_same_binary_runs_under_an_older_torch(wheel: Path, make_environment: Callable[[], Environment]) -> None:
    environment = make_environment()
    environment.pip_install("torch==2.13.0", "numpy")
    environment.pip_install("--no-deps", str(wheel))
    result = environment.run_python(TRAIN_ONE_STEP)
    assert result.returncode == 0, result.stderr
    assert "ran on torch 2.13.0" in result.stdout
