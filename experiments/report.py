"""Makes one HTML file of a run's folder, finished or not: curves, confusions, mistakes, memory, workspaces.

    python experiments/report.py runs/digits-ait_tiny-0
    python experiments/report.py runs/digits-ait_tiny-0 --out report.html

The file needs nothing else: no network, no scripts. It follows the reader's light or dark theme.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report_content import METRICS, RunContent, is_number, read_run
from report_figures import (
    Series,
    confusion_figure,
    escape,
    interval_bar,
    line_chart,
    number,
    percent,
    picture,
    signed_heat_map,
)
from report_workspace import workspace_section
from run_folder import write_atomically

import ait

MOST_ROWS = 12  # of the lists beside a confusion matrix
STYLE = Path(__file__).with_name("report_style.css")


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, finished or not.

    Args:
        run_folder: with at least ``config.json``.
        out: the HTML file, which is replaced; by default ``report.html`` in the folder.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: there is no such folder, or it has no ``config.json``.
        ValueError: ``config.json``, ``metrics.jsonl`` or ``result.json`` is damaged. Any other damaged file is named in
            the report.
        OSError: a file cannot be read, or the report cannot be written.
    """
    run_folder = Path(run_folder)
    out = run_folder / "report.html" if out is None else Path(out)
    if out.is_dir():
        raise IsADirectoryError(f"report: expected a file to write to, got the folder {out}")
    page = render(read_run(run_folder))
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"report: expected a file in a folder that is there, got {out}")
    # JSON may hold half of a surrogate pair, which UTF-8 cannot.
    write_atomically(out, lambda file: file.write(page.encode("utf-8", errors="replace")))
    return out


def render(run: RunContent) -> str:
    """The page."""
    title = f"{run.name}: {run.config['model']} on {run.config['data']}"
    sections = [
        _header(run),
        _curves(run),
        _kinds(run),
        _confusions(run),
        _mistakes(run),
        _memory(run),
        workspace_section(run),
        _facts("Options", run.config),
        _facts("Environment", {name: value for name, value in run.environment.items() if name != "git_revision"}),
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)  # after the sections, which may add some
    if notes:
        sections.insert(1, f'<ul class="notes">{notes}</ul>')
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
{chr(10).join(section for section in sections if section)}
</body>
</html>
"""


def _header(run: RunContent) -> str:
    planned, done = run.config["epochs"], len(run.lines)
    if run.result is not None:
        status = f'<p class="status finished">finished: {_epochs(run.result["epochs"])}</p>'
    else:
        when = f"; the last one was recorded {run.last_written:%Y-%m-%d %H:%M %Z}" if run.last_written else ""
        status = f'<p class="status">not finished: {done} of {_epochs(planned)} so far{escape(when)}</p>'
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in _key_figures(run)
    )
    revision = run.environment.get("git_revision")
    code = f'<p class="pale">revision <code>{escape(revision)}</code></p>' if revision else ""
    return (
        f"<header><h1>{escape(run.name)}</h1><p>{escape(run.config['model'])} on {escape(run.config['data'])}</p>"
        f'{status}{code}<dl class="figures">{figures}</dl></header>'
    )


def _key_figures(run: RunContent) -> list[tuple[str, str, str]]:
    """Name, value and remark."""
    result, lines = run.result, run.lines
    figures = []
    if result is not None:
        low, high = result["test_interval_95"]
        interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f}"
        figures.append(("test accuracy", percent(result["test_accuracy"]), interval))
        kept = f"epoch {run.kept_epoch}, whose weights are kept" if run.kept_epoch else ""
        figures.append(("validation accuracy", percent(result["validation_accuracy"]), kept))
        rate, seconds, remark = result["images_per_second"], result["seconds"], ""
    elif lines:
        best = max(line["validation_accuracy"] for line in lines)
        figures.append(("validation accuracy so far", percent(best), f"epoch {run.kept_epoch}, the best"))
        rates = sorted(line["images_per_second"] for line in lines)
        rate, seconds = rates[len(rates) // 2], lines[-1]["seconds"]
        left = (run.config["epochs"] - lines[-1]["epoch"]) * seconds / lines[-1]["epoch"]
        remark = f"about {_duration(left)} to go, if it goes on" if left > 0 else ""
    else:
        rate = seconds = None
    parameters = result["parameters"] if result is not None else _count_parameters(run)
    if parameters is not None:
        entries = sum(memory.gamma.size for memory in run.memories)
        figures.append(("parameters", f"{parameters:,}", f"memory: {entries:,} entries" if entries else ""))
    if rate is not None and seconds is not None:
        figures.append(("training images/s", number(rate), "median of the epochs"))
        figures.append(("time", _duration(seconds), remark))
    return figures


def _count_parameters(run: RunContent) -> int | None:
    """Of the model that the checkpoint names, made without memory and without drawing random numbers."""
    if run.checkpoint is None:
        return None
    try:
        with torch.device("meta"):
            model = ait.create_model(run.checkpoint["model"], **run.checkpoint["model_arguments"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        run.notes.append(f"The parameters are not counted; expected checkpoint.pt to name a model, got: {error}")
        return None
    return ait.count_parameters(model).parameters


def _curves(run: RunContent) -> str:
    lines, kept = run.lines, run.kept_epoch
    if not lines:
        return '<h2>Curves</h2><p class="pale">No epoch has been recorded.</p>'

    def series(name: str, style: str, key: str) -> Series:
        return Series(name, style, [(line["epoch"], line[key]) for line in lines])

    def both(key: str) -> list[Series]:
        return [series("validation", "validation", f"validation_{key}"), series("training", "train", f"train_{key}")]

    charts = [
        line_chart("Loss", both("loss"), kept),
        line_chart("Accuracy", both("accuracy"), kept, shares=True),
        line_chart("Learning rate", [series("learning rate", "single", "lr")], kept, from_zero=True),
        line_chart("Training images/s", [series("images/s", "single", "images_per_second")], kept, from_zero=True),
    ]
    if any(line["balance_loss"] for line in lines):  # a model without a workspace records zeros
        balance = [series("balance loss", "single", "balance_loss")]
        charts.insert(2, line_chart("Balance loss (training)", balance, kept, from_zero=True))
    names = sorted(METRICS - {"epoch"}, key=list(lines[0]).index)
    head = "".join(f'<th class="number">{escape(name.replace("_", " "))}</th>' for name in ["epoch", *names])
    rows = "".join(
        f'<tr><td class="number">{line["epoch"]}</td>'
        + "".join(f'<td class="number">{number(line[name])}</td>' for name in names)
        + "</tr>"
        for line in lines
    )
    return (
        f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'
        '<p class="pale">The loss is the cross-entropy. Training values are means over an epoch in which the weights '
        f"moved, on augmented images; validation is at its end. Dotted line: epoch {kept}, whose weights are kept.</p>"
        f'<details><summary>The numbers</summary><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
        "</details>"
    )


def _kinds(run: RunContent) -> str:
    """Accuracy by kind of question, for data sets with questions."""
    kinds = run.result.get("test_by_kind", {}) if run.result is not None else {}
    if not kinds:
        return ""
    names = {"majority_accuracy": "most frequent answer", "question_only_accuracy": "question alone"}
    rows = []
    for kind, each in kinds.items():
        low, high = each["interval_95"]
        compared = {key: each[key] for key in names if is_number(each.get(key))}
        bar = interval_bar(each["accuracy"], low, high, [(names[key], share) for key, share in compared.items()])
        rows.append(
            f'<tr><td>{escape(kind)}</td><td>{bar}</td><td class="number">{percent(each["accuracy"])}</td>'
            f'<td class="number">{100 * low:.2f} to {100 * high:.2f}</td>'
            f'<td class="number">{each["correct"]:,} of {each["total"]:,}</td>'
            + "".join(f'<td class="number">{percent(compared[key]) if key in compared else ""}</td>' for key in names)
            + "</tr>"
        )
    head = "".join(f'<th class="number">{name}</th>' for name in ("test accuracy", "95 % interval", "correct"))
    head += "".join(f'<th class="number">{name}</th>' for name in names.values())
    return (
        f'<h2>By kind of question</h2><div class="scroll"><table><tr><th>kind</th><th></th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
        '<p class="pale">Bars are test accuracies from 0 to 100 %, their thick lines the 95 % intervals. Thin lines: '
        "what is right without looking at the image, by the most frequent training answer to this kind of question, or "
        "to this very question.</p>"
    )


def _confusions(run: RunContent) -> str:
    mistakes = run.mistakes
    if run.result is not None and "confusion" in run.result:
        confusion, split = run.result["confusion"], "test"
    elif mistakes is not None and mistakes.confusion is not None:
        confusion, split = mistakes.confusion, mistakes.split
    else:
        return ""
    classes = [str(index) for index in range(len(confusion))]
    if mistakes is not None and len(mistakes.classes) == len(classes):
        classes = mistakes.classes
    elif mistakes is not None:
        run.notes.append(
            f"mistakes.npz names {len(mistakes.classes)} classes and result.json has {len(classes)}: they go by number."
        )
    totals, right = confusion.sum(1), confusion.diagonal()
    wrong = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    rows, columns = np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:MOST_ROWS], wrong.shape)
    frequent = "".join(
        f"<tr><td>{escape(classes[row])}</td><td>{escape(classes[column])}</td>"
        f'<td class="number">{wrong[row, column]:,}</td>'
        f'<td class="number">{percent(wrong[row, column] / totals[row])}</td></tr>'
        for row, column in zip(rows, columns, strict=True)
        if wrong[row, column]
    )
    recall = right / np.maximum(totals, 1)
    least = "".join(
        f'<tr><td>{escape(classes[index])}</td><td class="number">{right[index]:,} of {totals[index]:,}</td>'
        f'<td class="number">{percent(recall[index])}</td></tr>'
        for index in [index for index in np.argsort(recall, kind="stable") if totals[index]][:MOST_ROWS]
    )
    frequent = (
        '<table><tr><th>true</th><th>answered</th><th class="number">images</th>'
        f'<th class="number">of the class</th></tr>{frequent}</table>'
        if frequent
        else "<p>No mistakes.</p>"
    )
    return (
        f"<h2>Confusions on the {escape(split)} split</h2>"
        f'<p class="pale">{right.sum():,} of {totals.sum():,} right. Rows are true classes, columns what was answered; '
        "blue is right, orange is wrong, as opaque as the root of the share of the row.</p>"
        f'<div class="columns">{confusion_figure(confusion, classes)}'
        f'<div class="scroll"><h3>Most frequent confusions</h3>{frequent}</div>'
        '<div class="scroll"><h3>Classes recognised least</h3><table><tr><th>class</th><th class="number">right</th>'
        f'<th class="number">share</th></tr>{least}</table></div></div>'
    )


def _mistakes(run: RunContent) -> str:
    mistakes = run.mistakes
    if mistakes is None:
        return ""
    items = []
    for index, (image, label, prediction, probability) in enumerate(
        zip(mistakes.images, mistakes.labels, mistakes.predictions, mistakes.probabilities, strict=True)
    ):
        true, answered = mistakes.classes[label], mistakes.classes[prediction]
        caption = f"<div>{escape(mistakes.captions[index])}</div>" if mistakes.captions is not None else ""
        items.append(
            f"<figure>{picture(image, f'{true}, answered as {answered}')}<figcaption>{caption}"
            f'<div><span class="label">true</span> <b>{escape(true)}</b></div>'
            f'<div><span class="label">answered</span> {escape(answered)}, {100 * probability:.1f}&nbsp;%</div>'
            "</figcaption></figure>"
        )
    shown = f'<div class="mistakes">{"".join(items)}</div>' if items else "<p>No mistakes.</p>"
    return (
        f"<h2>Worst mistakes on the {escape(mistakes.split)} split</h2>"
        '<p class="pale">Wrong answers with the highest probabilities, worst first.</p>'
        f"{shown}"
    )


def _memory(run: RunContent) -> str:
    if run.checkpoint is None:
        return ""
    if not run.memories:
        return '<h2>Memory</h2><p class="pale">This model has no memory to show.</p>'
    largest = max(float(np.abs(memory.gamma).max()) for memory in run.memories)
    rows, layers = [], []
    for memory in run.memories:
        slots, width = memory.gamma.shape
        cosines = memory.cosines
        others = np.abs(cosines[~np.eye(slots, dtype=bool)])
        mean = f"{others.mean():.3f}" if others.size else "one slot"
        rows.append(
            f'<tr><td>{escape(memory.layer)}</td><td class="number">{slots} &times; {width}</td>'
            f'<td class="number">{memory.effective_slots:.1f} of {min(slots, width)}</td>'
            f'<td class="number">{mean}</td><td class="number">{memory.skipped_updates:,}</td></tr>'
        )
        layers.append(
            f'<figure class="layer"><figcaption><b>{escape(memory.layer)}</b></figcaption><div class="maps">'
            f"<div>slots{signed_heat_map(memory.gamma, largest, f'slots of {memory.layer}')}</div>"
            f"<div>cosines{signed_heat_map(cosines, 1.0, f'cosines of {memory.layer}')}</div>"
            "</div></figure>"
        )
    head = "".join(
        f'<th class="number">{name}</th>'
        for name in ("slots &times; width", "effective slots", "mean |cosine|", "skipped writes")
    )
    return (
        f'<h2>Memory of the kept weights</h2><div class="scroll"><table><tr><th>layer</th>{head}</tr>{"".join(rows)}'
        "</table></div>"
        '<p class="pale">Effective slots: exp of the entropy of the slots\' singular values, divided by their sum (Roy '
        "and Vetterli, The effective rank, 2007): 1 where all slots are multiples of one, at most the lesser of slots "
        "and width. Mean |cosine|: of every two different slots. Skipped writes: updates that were not finite and left "
        "the memory as it was.</p>"
        f'<div class="layers">{"".join(layers)}</div>'
        f'<p class="pale">Slots: a row each, &minus;{number(largest)}<span class="scale"></span>{number(largest)}, one '
        "scale for all layers. Cosines: of every two slots, in the same order, &minus;1"
        '<span class="scale"></span>1.</p>'
    )


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{_value(value)}</dd></div>" for name, value in facts.items()
    )
    return f'<h2>{title}</h2><dl class="facts">{rows}</dl>'


def _value(value: Any) -> str:
    """A value of a JSON object as HTML."""
    if value is None:
        return '<span class="pale">none</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(name)}: {_value(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(_value(each) for each in value) or '<span class="pale">none</span>'
    return escape(value)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, help="folder that train.py has written")
    parser.add_argument("--out", type=Path, help="HTML file to write; report.html in the folder by default")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run_folder, options.out))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
