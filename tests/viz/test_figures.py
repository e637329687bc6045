"""Figures hold what the recording holds; what cannot be drawn is an error that says what to do."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ait
from tests.recording.models import IMAGES, small_model, some_images

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402

from ait import viz  # noqa: E402
from ait.viz.images import find_grid, to_pixels  # noqa: E402


def recorded(images: Tensor | None = None, **options: Any) -> ait.Trace:
    model = small_model(**options).eval()
    with torch.no_grad(), ait.record(model, attention=True, energy_steps=3) as trace:
        model(some_images() if images is None else images)
    return trace


def history() -> ait.MemoryHistory:
    model = small_model().train()
    kept = ait.MemoryHistory(model)
    with torch.no_grad():
        for step in range(3):
            kept.log(step)
            model(some_images(step))
    return kept


FIGURES: dict[str, Callable[..., Figure]] = {
    "slots": lambda **options: viz.plot_slots(recorded(), some_images(), **options),
    "retrieval": lambda **options: viz.plot_retrieval(recorded(), some_images(), **options),
    "slot use": lambda **options: viz.plot_slot_use(recorded(), **options),
    "energy": lambda **options: viz.plot_energy(recorded(), **options),
    "memory": lambda **options: viz.plot_memory(history(), **options),
    "rollout": lambda **options: viz.plot_rollout(recorded(), some_images(), **options),
}


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_in_every_theme_and_width_without_pyplot(name: str) -> None:
    before, open_before = dict(matplotlib.rcParams), figures_of_pyplot()
    corners = {}
    for theme in ("light", "dark", "transparent"):
        figure = FIGURES[name](theme=theme, width=3.4 if theme == "dark" else 7.0)
        corners[theme] = pixels(figure)[0, 0].tolist()
        assert figure.get_size_inches()[0] == (3.4 if theme == "dark" else 7.0)
    assert corners == {"light": [255] * 4, "dark": [18, 18, 18, 255], "transparent": [255, 255, 255, 0]}
    assert dict(matplotlib.rcParams) == before
    assert figures_of_pyplot() == open_before


def size_of_png(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_a_notebook_shows_a_figure_with_more_pixels_than_it_takes_on_the_page() -> None:
    figure = FIGURES["slot use"](width=5.0)
    inches = figure.get_size_inches()
    content, shown = figure._repr_png_()  # type: ignore[attr-defined]
    assert size_of_png(content) == (round(192 * inches[0]), int(192 * inches[1]))
    assert shown == {"width": round(120 * inches[0]), "height": round(120 * inches[1])}


def test_jupyters_inline_backend_draws_a_figure_as_finely() -> None:
    pylabtools = pytest.importorskip("IPython.core.pylabtools")
    figure = FIGURES["slot use"](width=5.0)
    wide, _ = size_of_png(
        pylabtools.print_figure(figure, fmt="png", bbox_inches=None)
    )  # what it calls, for figures of all kinds
    assert wide == 192 * 5


def figures_of_pyplot() -> list[int]:
    return list(sys.modules["matplotlib.pyplot"].get_fignums()) if "matplotlib.pyplot" in sys.modules else []


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_of_a_figure_lies_outside_it_or_on_other_text(name: str) -> None:
    for width in (3.4, 7.0):
        figure = FIGURES[name](width=width)
        figure.canvas.draw()
        edges, hidden = figure.bbox, hidden_tick_labels(figure)
        boxes = []
        for text in figure.findobj(matplotlib.text.Text):
            if not text.get_visible() or not text.get_text().strip() or text.get_fontsize() < 5:
                continue
            if text.axes is not None and not text.axes.get_visible():
                continue
            box = text.get_window_extent()
            if box.width < 1 or id(text) in hidden:
                continue
            assert box.x0 >= edges.x0 - 2 and box.x1 <= edges.x1 + 2, (width, text.get_text())
            assert box.y0 >= edges.y0 - 2 and box.y1 <= edges.y1 + 2, (width, text.get_text())
            boxes.append((text.get_text(), box.shrunk(0.9, 0.8)))
        for number, (one, box) in enumerate(boxes):
            for other, another in boxes[number + 1 :]:
                assert not box.overlaps(another), (width, one, other)


def hidden_tick_labels(figure: Figure) -> set[int]:
    """Ticks beyond the limits of their axis have labels that are never drawn."""
    hidden = set()
    for tick in figure.findobj(matplotlib.axis.Tick):
        axis = tick.axes.xaxis if isinstance(tick, matplotlib.axis.XTick) else tick.axes.yaxis
        low, high = sorted(axis.get_view_interval())
        if not low <= tick.get_loc() <= high:
            hidden |= {id(tick.label1), id(tick.label2)}
    return hidden


def test_slots_show_the_gates_of_the_recording_at_their_patches() -> None:
    trace = recorded()
    write = trace.layer(1).require_write("test")
    figure = viz.plot_slots(trace, some_images(), layer=1, slots=[0, 3], image=[2], head=1)
    panels = [axes for axes in figure.axes if len(axes.images) == 2]
    assert len(panels) == 2
    for panel, slot in zip(panels, (0, 3), strict=True):
        shown = panel.images[1].get_array()
        expected = write.dense_gates()[1, slot].view(IMAGES, 4, 4)[2].numpy()
        assert np.array_equal(np.ma.filled(shown, 0), expected)
        assert panel.get_title() == f"slot {slot}\n{(expected > 0).sum()}"


def test_slots_of_an_image_that_none_took_are_empty_and_the_bar_runs_to_one() -> None:
    trace = recorded()
    write = trace.layer(-1).require_write("test")
    write.gates = torch.zeros_like(write.gates)
    figure = viz.plot_slots(trace, some_images(), slots=[0], image=0)
    assert figure.axes[1].get_title() == "slot 0\n0"
    assert figure.axes[1].images[1].get_clim() == (0, 1)


def test_retrieval_shows_the_slot_and_weight_of_each_patch() -> None:
    trace = recorded()
    layer = trace.layer(-1)
    figure = viz.plot_retrieval(trace, some_images(), image=1)
    numbers = [text.get_text() for text in figure.axes[1].texts]
    assert numbers == [str(int(slot)) for slot in layer.pattern.view(IMAGES, 16)[1]]
    shown = figure.axes[2].images[1].get_array()
    assert np.allclose(shown, layer.retrieval.amax(-1).view(IMAGES, 4, 4)[1].numpy())


def test_tokens_before_the_patches_are_left_out_of_images_and_marked() -> None:
    model = small_model(question_dim=5, top_k_ratio=1.0).eval()
    with torch.no_grad(), ait.record(model) as trace:
        model(some_images(), torch.randn(IMAGES, 5))
    figure = viz.plot_slots(trace, some_images(), slots=[0], image=0)
    assert figure.axes[1].get_title() == "slot 0\n16+"


def test_rollout_shows_the_mean_over_tokens_or_one_token() -> None:
    trace = recorded()
    rollout = viz.attention_rollout(trace, images=0, batch_share=1)
    for token, expected in ((None, rollout.weights[0].mean(0)), (3, rollout.weights[0, 3])):
        figure = viz.plot_rollout(trace, some_images(), image=0, token=token, batch_share=1)
        shown = np.asarray(figure.axes[2].images[1].get_array())
        assert np.allclose(shown, (expected / expected.mean()).view(4, 4).numpy(), atol=1e-5)


def test_energy_without_padding_and_with_two_points_where_no_path_was_recorded() -> None:
    layer = ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2).eval()
    mask = torch.tensor([[False, False, True]])
    f = torch.randn(1, 3, 8)
    f[0, 2] = 1e3
    with ait.record(layer) as trace:
        layer(f, mask)
    figure = viz.plot_energy(trace)
    (line,) = figure.axes[0].lines
    seen = trace.layer(0)
    assert seen.energy_before is not None and seen.energy_after is not None
    expected = [float(each.detach()[:2].quantile(0.5)) for each in (seen.energy_before, seen.energy_after)]
    assert np.allclose(line.get_ydata(), expected)


def test_slot_use_marks_dead_slots_and_sorts_the_rest() -> None:
    trace = recorded()
    figure = viz.plot_slot_use(trace, threshold=4.0)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    expected = torch.stack([layer.slot_use for layer in trace[0]]).sort(descending=True).values * 4
    assert np.allclose(shown, expected.numpy())
    assert sum(len(line.get_xdata()) for line in figure.axes[0].lines) == int((expected < 4).sum())


def test_figures_of_padding_alone_say_that_there_is_nothing_else() -> None:
    layer = ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2).eval()
    with torch.no_grad(), ait.record(layer) as trace:
        layer(torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="plot_slot_use: expected a pass in which a workspace saw tokens that are no"):
        viz.plot_slot_use(trace)
    with pytest.raises(ValueError, match=r"plot_energy: expected a layer that retrieves .* and saw tokens"):
        viz.plot_energy(trace)


@pytest.mark.parametrize(
    "shape, grid, prefix",
    [
        ((16, 16), (4, 4), 0),
        ((32, 32), (4, 4), 1),
        ((32, 64), (2, 4), 0),
        ((64, 32), (4, 2), 5),
        ((224, 224), (14, 14), 2),
    ],
)
def test_the_grid_is_found_from_the_sides_of_the_images(
    shape: tuple[int, int], grid: tuple[int, int], prefix: int
) -> None:
    layer = ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2).eval()
    with torch.no_grad(), ait.record(layer) as trace:
        layer(torch.randn(2, prefix + grid[0] * grid[1], 8))
    assert find_grid("test", trace.layer(0), torch.zeros(2, 3, *shape), None) == (*grid, prefix)


def test_images_are_shown_as_they_are_normalised_back_or_stretched() -> None:
    image = torch.arange(12).view(3, 2, 2)
    assert np.allclose(to_pixels(image.to(torch.uint8), None, None)[..., 1], np.arange(4, 8).reshape(2, 2) / 255)
    assert np.allclose(to_pixels(image / 20, None, None)[0, 0], [0, 0.2, 0.4])
    assert np.allclose(to_pixels(image / 20 - 0.5, [0.5] * 3, [1.0] * 3)[0, 0], [0, 0.2, 0.4], atol=1e-6)
    assert np.allclose(to_pixels(image * 1.0, None, None)[0, 0], [0, 4 / 11, 8 / 11])
    assert to_pixels(torch.zeros(1, 2, 2), None, None).shape == (2, 2, 3)


IMAGE_FIGURES = [viz.plot_slots, viz.plot_retrieval, viz.plot_rollout]


@pytest.mark.parametrize("plot", IMAGE_FIGURES)
@pytest.mark.parametrize(
    "images, expected",
    [
        (torch.zeros(3, 3, 16, 16), "expected the 4 images of the recorded batch"),
        (
            torch.zeros(4, 3, 18, 16),
            "expected images that 4 x 4 square patches fill, such as 32 x 32 pixels, got 18 x 16",
        ),
        (torch.zeros(4, 3, 32, 16), "square patches fill"),
        (torch.zeros(3, 16, 16), r"expected images of shape \(B, 1 or 3, H, W\)"),
        (torch.zeros(4, 16, 16, 3), r"got \(4, 16, 16, 3\); permute\(0, 3, 1, 2\)"),
        (np.zeros((4, 3, 16, 16)), "expected images to be a tensor"),
    ],
    ids=["another batch", "not filled", "not square", "one image", "channels last", "an array"],
)
def test_images_of_the_wrong_size(plot: Callable[..., Figure], images: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        plot(recorded(), images)


def test_images_that_no_grid_fits_and_grids_that_do_not_fit() -> None:
    layer = ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2).eval()
    with torch.no_grad(), ait.record(layer) as trace:
        layer(torch.randn(1, 1000, 8))
    with pytest.raises(ValueError, match=r"patches make up the 1000 tokens of layer 'workspace'.*pass grid="):
        viz.plot_slots(trace, torch.zeros(1, 3, 30, 31))
    with pytest.raises(ValueError, match=r"a grid of at most 1000 patches.*got 40 x 40"):
        viz.plot_slots(trace, torch.zeros(1, 3, 40, 40), grid=(40, 40))


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "memory"])
def test_figures_of_an_empty_recording(name: str) -> None:
    with ait.record(small_model()) as trace:
        pass
    plots: dict[str, Callable[[], Figure]] = {
        "slots": lambda: viz.plot_slots(trace, some_images()),
        "retrieval": lambda: viz.plot_retrieval(trace, some_images()),
        "slot use": lambda: viz.plot_slot_use(trace),
        "energy": lambda: viz.plot_energy(trace),
        "rollout": lambda: viz.plot_rollout(trace, some_images()),
    }
    with pytest.raises(ValueError, match="expected a forward pass of the model inside the recording, got none"):
        plots[name]()


@pytest.mark.parametrize("plot", [viz.plot_retrieval, viz.plot_rollout, viz.plot_slots])
def test_figures_of_an_empty_batch(plot: Callable[..., Figure]) -> None:
    images = some_images()[:0]
    with pytest.raises(ValueError, match=r"at least one image, got an empty batch|the batch was empty"):
        plot(recorded(images), images)


def test_a_memory_without_steps_and_arguments_that_are_wrong() -> None:
    one_step = ait.MemoryHistory(small_model())
    for number in (0, 1):
        with pytest.raises(ValueError, match=rf"plot_memory: expected .* at least two steps.*got one with {number}"):
            viz.plot_memory(one_step)
        one_step.log(number)
    trace, images = recorded(), some_images()
    for plot, options, expected in (
        (viz.plot_slots, dict(theme="sepia"), "theme to be one of 'light', 'dark', 'transparent'"),
        (viz.plot_slots, dict(width=0), "width to be a finite number"),
        (viz.plot_slots, dict(head=2), "head from 0 to 1"),
        (viz.plot_slots, dict(slots=[4]), "slots from 0 to 3, got 4"),
        (viz.plot_slots, dict(slots=0), "slots >= 1"),
        (viz.plot_slots, dict(slots=2.0), "slots to be an integer, got 2.0"),
        (viz.plot_slots, dict(image=4), "images of the recorded batch, 0 to 3, got 4"),
        (viz.plot_slots, dict(image=1.0), "images of the recorded batch, 0 to 3, got 1.0"),
        (viz.plot_slots, dict(layer="head"), "a recorded layer"),
        (viz.plot_rollout, dict(token=16), "token from 0 to 15"),
        (viz.plot_rollout, dict(token=True), "token from 0 to 15, or None, got True"),
        (viz.plot_slots, dict(head=True), "head from 0 to 1"),
        (viz.plot_slots, dict(index="last"), "the index of one of 1 recorded passes, got 'last'"),
        (viz.plot_slots, dict(grid=4), r"grid=\(rows, columns\), two positive integers, got 4"),
        (viz.plot_slots, dict(grid=(0, 4)), r"two positive integers, got \(0, 4\)"),
        (viz.plot_retrieval, dict(mean=[0.5, 0.5]), "mean with a number for each of the 3 channels, got 2 numbers"),
    ):
        with pytest.raises(ValueError, match=expected):
            plot(trace, images, **options)  # type: ignore[operator]


def test_something_else_in_the_place_of_a_trace_or_history_is_named() -> None:
    trace, images = recorded(), some_images()
    for draw in (
        lambda wrong: viz.plot_slots(wrong, images),
        lambda wrong: viz.plot_retrieval(wrong, images),
        lambda wrong: viz.plot_rollout(wrong, images),
        lambda wrong: viz.plot_energy(wrong),
        lambda wrong: viz.plot_slot_use(wrong),
        lambda wrong: viz.attention_rollout(wrong),
    ):
        for wrong in (trace[0], None, "trace.npz"):
            with pytest.raises(ValueError, match=rf"expected a Trace, such as .*got {type(wrong).__name__}"):
                draw(wrong)
    with pytest.raises(ValueError, match=r"plot_memory: expected an ait\.MemoryHistory.*got Trace"):
        viz.plot_memory(trace)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold to be a finite number"):
        viz.plot_slot_use(trace, threshold="low")  # type: ignore[arg-type]


def test_energy_of_one_layer_by_index_or_name() -> None:
    trace = recorded()
    for layers in (1, "blocks.1", [1], ("blocks.1",)):
        (line,) = viz.plot_energy(trace, layers=layers).axes[0].lines
        assert line.get_label() == "blocks.1"
    with pytest.raises(ValueError, match=r"expected a recorded layer .*got 1\.5"):
        viz.plot_energy(trace, layers=1.5)  # type: ignore[arg-type]


def test_traces_of_another_model_name_what_does_not_fit() -> None:
    """A trace of one model with the images, layers or reader of another."""
    other = recorded(torch.randn(IMAGES, 3, 24, 24), img_size=24)
    with pytest.raises(ValueError, match=r"6 x 6 square patches fill.*got 16 x 16"):
        viz.plot_slots(other, some_images())
    with pytest.raises(ValueError, match="a recorded layer"):
        viz.plot_retrieval(other, torch.zeros(IMAGES, 3, 24, 24), layer="encoder.layers.0")
    with pytest.raises(ValueError, match="a layer that retrieves by Hopfield energy"):
        viz.plot_energy(recorded(reader="attention"))
    mixed = torch.nn.Sequential(
        ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2),
        ait.GlobalWorkspace(8, num_slots=5, slot_dim=6, num_heads=2),
    )
    with ait.record(mixed) as trace:
        mixed(torch.randn(2, 4, 8))
    with pytest.raises(ValueError, match="layers with the same number of slots, got 0: 4, 1: 5"):
        viz.plot_slot_use(trace)
    with pytest.raises(ValueError, match="a write of layer"):
        viz.plot_slots(recorded(memory="fixed"), some_images())


def test_svg_files_of_the_same_figure_are_the_same(tmp_path: Path) -> None:
    files = []
    for _ in range(2):
        content = io.BytesIO()
        with viz.style():
            viz.plot_energy(recorded()).savefig(content, format="svg", metadata={"Date": None})
        files.append(content.getvalue())
    assert files[0] == files[1]


def test_importing_ait_imports_no_matplotlib_and_without_it_viz_says_what_to_install() -> None:
    script = """
import sys
import ait
assert not any(name.split(".")[0] in ("matplotlib", "lightning", "tensorboard", "safetensors") for name in sys.modules)
sys.modules["matplotlib"] = None
try:
    ait.viz
except ImportError as error:
    assert "pip install" in str(error) and "[viz]" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)
