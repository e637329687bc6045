"""Benchmarks the operators against plain PyTorch and against the limit of the processor.

    python experiments/bench/operators.py --help

Every figure is a ratio of times taken by turns in one process: median over the rounds, quartiles in brackets. ``P`` is
the time in which the processor's multiply-add units can do the one big product of the write, ``2*T*E*R`` operations; it
is measured in the same rounds by a loop that touches nothing but registers.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import tyro
from sections import SECTIONS, Config
from table import MARKDOWN_HEADER, PLAIN_HEADER, Row

import ait


def machine() -> dict[str, Any]:
    """Processor, threads, versions and kernels."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": name, "threads": torch.get_num_threads(), **(ait.show_config("dicts") or {})}


def headline(about: dict[str, Any]) -> str:
    """One line about the machine and what runs on it."""
    where = f"{about['processor']}, {about['threads']} threads, kernels {about['instruction set']}"
    return f"{where}; ait {about['ait']}, torch {about['torch']['running']}; float32 unless said otherwise"


def write_results(path: Path, about: dict[str, Any], rows: dict[str, list[Row]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"section": section, **row.record()} for section, members in rows.items() for row in members]
    path.write_text(json.dumps({"machine": about, "rows": records}, indent=1) + "\n")
    lines = [headline(about), "", MARKDOWN_HEADER, *(row.markdown() for members in rows.values() for row in members)]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main(config: Config) -> None:
    unknown = set(config.sections) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"operators.py: unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    about = machine()
    print(f"{headline(about)}\n\n{PLAIN_HEADER}")
    rows: dict[str, list[Row]] = {}
    for section in config.sections:
        rows[section] = []
        for row in SECTIONS[section](config):
            print(row.plain(), flush=True)
            rows[section].append(row)
        if config.out is not None:  # section by section, so that a stop loses little
            write_results(config.out, about, rows)
    if config.out is not None:
        print(f"\nwritten to {config.out} and {config.out.with_suffix('.md')}")


if __name__ == "__main__":
    main(tyro.cli(Config))
