"""Contact sheets: what is written is read back, and what was damaged since is refused by name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ait.data import read_sheets, write_sheets
from tests.data_sets.noise import CLASSES, noise_images

image_module = pytest.importorskip("PIL.Image")


def _write(folder: Path, shape: tuple[int, int, int] = (3, 6, 5), **options: Any) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    sets = [noise_images(count, shape, generator) for count in (23, 7)]
    write_sheets(folder, *sets, CLASSES, **{"grid": (2, 4), **options})
    return sets


@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 4, 4)])
def test_images_and_labels_come_back_bit_for_bit_in_a_fixed_shuffle(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    written = _write(tmp_path / "a", shape)
    random = np.random.RandomState(0)
    for data, (images, labels) in zip(read_sheets(tmp_path / "a"), written, strict=True):
        order = torch.from_numpy(random.permutation(len(images)))
        assert torch.equal(data.images, images[order]) and torch.equal(data.labels, labels[order])
        assert data.classes == CLASSES
    _write(tmp_path / "b", shape)
    names = [path.name for path in sorted((tmp_path / "a").iterdir())]
    assert [path.name for path in sorted((tmp_path / "b").iterdir())] == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_the_folder_is_as_the_format_says(sheets: Path) -> None:
    meta = json.loads((sheets / "meta.json").read_text())
    assert meta["sheet"] == "2 x 4 images of 6 x 5 RGB, row-major; order is a fixed shuffle"
    assert meta["classes"] == list(CLASSES)
    pictures = []
    for index in range(3):
        with image_module.open(sheets / f"train-{index:02d}.webp") as picture:
            assert picture.size == (20, 12) and picture.mode == "RGB" and picture.format == "WEBP"
            pictures.append(np.asarray(picture))
    # By hand, image by image: the one in row i and column j of a sheet is number 4 i + j of it.
    direct = np.stack(
        [sheet[6 * i : 6 * i + 6, 5 * j : 5 * j + 5] for sheet in pictures for i in range(2) for j in range(4)]
    )
    assert meta["train"] == {"images": 23, "sheets": 3, "sha256": hashlib.sha256(direct[:23].tobytes()).hexdigest()}
    assert not direct[23:].any()  # filled up with black
    assert np.array_equal(read_sheets(sheets)[0].images.permute(0, 2, 3, 1), direct[:23])
    assert np.load(sheets / "train-labels.npy").dtype == np.uint8


def test_a_checksum_may_cover_the_labels_too_and_then_guards_them(sheets: Path) -> None:
    train, _ = read_sheets(sheets)
    labels = np.load(sheets / "train-labels.npy")
    raw = np.ascontiguousarray(train.images.permute(0, 2, 3, 1).numpy()).tobytes() + labels.tobytes()
    _edit(sheets, lambda meta: meta["train"].update(sha256=hashlib.sha256(raw).hexdigest()))
    assert torch.equal(read_sheets(sheets)[0].images, train.images)
    np.save(sheets / "train-labels.npy", labels[::-1])
    with pytest.raises(ValueError, match=r"train-\*\.webp: expected SHA-256 .* a file was altered"):
        read_sheets(sheets)


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def _save_picture(path: Path, size: tuple[int, int], change: int = 0) -> None:
    with image_module.open(path) as picture:
        pixels = np.asarray(picture.resize(size)).copy()
    pixels[0, 0, 0] ^= change
    image_module.fromarray(pixels).save(path, lossless=True)


def _truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (lambda f: [path.unlink() for path in f.iterdir()] and f.rmdir(), FileNotFoundError, "no .*meta.json"),
    "no meta": (lambda f: (f / "meta.json").unlink(), FileNotFoundError, "no .*meta.json"),
    "missing sheet": (
        lambda f: (f / "train-01.webp").unlink(),
        FileNotFoundError,
        "no .*train-01.webp; meta.json lists 3 sheets of 'train'",
    ),
    "missing labels": (lambda f: (f / "test-labels.npy").unlink(), FileNotFoundError, "no .*test-labels.npy"),
    "truncated sheet": (
        lambda f: _truncate(f / "train-02.webp", 0.7),
        ValueError,
        r"train-02.webp: expected a whole WebP picture, got \d+ bytes",
    ),
    "stump of a sheet": (
        lambda f: _truncate(f / "train-02.webp", 0.05),
        ValueError,
        r"train-02.webp: expected a whole WebP picture, got \d+ bytes",
    ),
    "empty sheet": (
        lambda f: (f / "train-00.webp").write_bytes(b""),
        ValueError,
        "train-00.webp: expected a whole WebP picture, got 0 bytes",
    ),
    "one bit altered": (
        lambda f: _save_picture(f / "train-00.webp", (20, 12), change=1),
        ValueError,
        r"train-\*\.webp: expected SHA-256 [0-9a-f]{64} \(meta.json\), got .* a file was altered",
    ),
    "sheet of another size": (
        lambda f: _save_picture(f / "test-00.webp", (25, 12)),
        ValueError,
        "test-00.webp: expected a sheet of 20 x 12 pixels, RGB, got 25 x 12",
    ),
    "sheets in another order": (
        lambda f: (
            (f / "x").write_bytes((f / "train-00.webp").read_bytes())
            and (f / "train-01.webp").replace(f / "train-00.webp")
            and (f / "x").replace(f / "train-01.webp")
        ),
        ValueError,
        "a file was altered",
    ),
    "fewer labels": (
        lambda f: np.save(f / "train-labels.npy", np.zeros(22, np.uint8)),
        ValueError,
        r"train-labels.npy: expected 23 integer labels, got \(22,\) of uint8",
    ),
    "labels of another dtype": (
        lambda f: np.save(f / "train-labels.npy", np.zeros(23)),
        ValueError,
        r"train-labels.npy: expected 23 integer labels, got \(23,\) of float64",
    ),
    "label of no class": (
        lambda f: np.save(f / "train-labels.npy", np.full(23, 3, np.uint8)),
        ValueError,
        r"train-labels.npy: expected labels in \[0, 3\), got \[3, 3\]",
    ),
    "truncated labels": (
        lambda f: _truncate(f / "train-labels.npy", 0.9),
        ValueError,
        "train-labels.npy: expected a whole .npy file of numbers",
    ),
    "pickled labels": (
        lambda f: np.save(f / "train-labels.npy", np.array([{}] * 23, dtype=object), allow_pickle=True),
        ValueError,
        "train-labels.npy: expected a whole .npy file of numbers",
    ),
    "meta is no JSON": (
        lambda f: (f / "meta.json").write_text("{"),
        ValueError,
        "meta.json: expected JSON, got something that does not parse",
    ),
    "meta is a list": (
        lambda f: (f / "meta.json").write_text("[]"),
        ValueError,
        r"meta.json: expected an object with 'train', 'test', 'classes' and 'sheet', got \[\]",
    ),
    "meta of another format": (
        lambda f: _edit(f, lambda meta: meta.update(sheet="2 x 0 images of 6 x 5 RGB")),
        ValueError,
        "meta.json: expected 'sheet' like '50 x 50 images of 32 x 32 RGB, .*', got '2 x 0 images of 6 x 5 RGB'",
    ),
    "meta without classes": (
        lambda f: _edit(f, lambda meta: meta.update(classes=[])),
        ValueError,
        r"meta.json: expected 'classes' to be a list of names, got \[\]",
    ),
    "meta with too few sheets": (
        lambda f: _edit(f, lambda meta: meta["train"].update(sheets=2)),
        ValueError,
        "meta.json: expected 'train' with 3 sheets for 23 images, got 2",
    ),
    "meta with a negative count": (
        lambda f: _edit(f, lambda meta: meta["test"].update(images=-1)),
        ValueError,
        "meta.json: expected 'test' with the numbers 'images' and 'sheets', got",
    ),
    "meta without a split's numbers": (
        lambda f: _edit(f, lambda meta: meta.update(test=None)),
        ValueError,
        "meta.json: expected 'test' with the numbers 'images' and 'sheets', got None",
    ),
    "meta without checksum": (
        lambda f: _edit(f, lambda meta: meta["test"].pop("sha256")),
        ValueError,
        "meta.json: expected 'test' with a 'sha256' of 64 hexadecimal digits, got None",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_the_files_name(sheets: Path, damage: str) -> None:
    inflict, error, message = DAMAGES[damage]
    inflict(sheets)
    with pytest.raises(error, match=f"pets: .*{message}"):
        read_sheets(sheets, "pets")


def test_writer_refuses_a_folder_with_files_in_it(sheets: Path) -> None:
    before = {path: path.read_bytes() for path in sheets.iterdir()}
    with pytest.raises(FileExistsError, match=re.escape(f"a new or empty folder, got {sheets}")):
        _write(sheets)
    assert {path: path.read_bytes() for path in sheets.iterdir()} == before


def test_writer_refuses_images_that_no_sheet_can_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of one shape, C = 1 or 3, got \(2, 4, 4\)"):
        _write(tmp_path, (2, 4, 4))
    with pytest.raises(ValueError, match=r"expected sheets of 1 to 16383 pixels a side, got \(20480, 4\)"):
        _write(tmp_path, (1, 4, 4), grid=(1, 5120))
    with pytest.raises(ValueError, match="expected sheets of 1 to 16383 pixels a side"):
        _write(tmp_path, (1, 4, 4), grid=(0, 5))
    generator = torch.Generator().manual_seed(0)
    train, test = noise_images(4, (3, 4, 4), generator), noise_images(4, (3, 4, 5), generator)
    with pytest.raises(ValueError, match=r"of one shape, C = 1 or 3, got \(3, 4, 4\) and \(3, 4, 5\)"):
        write_sheets(tmp_path, train, test, CLASSES)
    assert not any(tmp_path.iterdir())
