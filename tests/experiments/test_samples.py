"""The page of sample images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tyro")

import samples
from samples import SamplesConfig, draw_images, draw_questions, run

from ait.data import decode_question, sort_of_clevr, triangle


@pytest.mark.parametrize("data", ["sort_of_clevr", "triangle"])
def test_page_is_drawn_and_replaced_and_depends_on_the_seed(tmp_path: Path, data: str) -> None:
    image_module = pytest.importorskip("PIL.Image")
    pictures = []
    for seed in (0, 0, 1):
        path = run(SamplesConfig(data=data, out=tmp_path / "new" / "page.png", seed=seed))
        assert path == tmp_path / "new" / "page.png"
        with image_module.open(path) as image:
            assert min(image.size) > 1000 and image.format == "PNG"
            pictures.append(image.convert("RGB").tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_words_under_an_image_are_its_own_questions_two_of_each_kind_with_answers() -> None:
    data = sort_of_clevr(8, 3)
    panels = draw_questions(data).axes
    written = [axes.texts[0].get_text() for axes in panels if axes.texts]
    assert len(written) == 8
    for index, text in enumerate(written):
        lines = " ".join(text.replace("\n   ", " ").split("\n")).split("• ")[1:]
        own = {
            decode_question(data.questions[question], int(data.labels[question]))
            for question in (data.image_index == index).nonzero().squeeze(1).tolist()
        }
        assert len(lines) == 6 and {line.strip() for line in lines} <= own


def test_words_stay_within_their_column_and_above_the_next_image() -> None:
    figure = draw_questions(sort_of_clevr(8, 0))
    figure.canvas.draw()
    columns = figure.bbox.width / 4
    images = [axes.get_window_extent() for axes in figure.axes if axes.images]
    for axes in figure.axes:
        for text in axes.texts:
            extent = text.get_window_extent()
            assert extent.width < columns and extent.y0 >= 0 and extent.x1 <= figure.bbox.x1
            assert not any(extent.overlaps(image) for image in images)


def test_classes_stand_above_the_images() -> None:
    data = triangle(32, 3)
    titles = [axes.get_title() for axes in draw_images(data).axes]
    assert titles == [data.classes[label] for label in data.labels.tolist()]


def test_refuses_another_data_set_a_bad_seed_and_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected data to be sort_of_clevr or triangle, got 'digits'"):
        run(SamplesConfig(data="digits", out=tmp_path / "page.png"))
    with pytest.raises(ValueError, match="expected a seed"):
        run(SamplesConfig(seed=-1, out=tmp_path / "page.png"))
    with pytest.raises(ValueError, match="xyz"):
        run(SamplesConfig(data="triangle", out=tmp_path / "page.xyz"))
    assert not list(tmp_path.iterdir())


def test_command_says_where_the_page_is_and_ends_with_a_line_on_errors(tmp_path: Path) -> None:
    command = [sys.executable, samples.__file__, "--data", "triangle", "--out"]
    done = subprocess.run([*command, tmp_path / "page.png"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"Samples: {tmp_path / 'page.png'}\n"
    failed = subprocess.run([*command, tmp_path / "page.png", "--seed", "-1"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: triangle: expected a seed")
