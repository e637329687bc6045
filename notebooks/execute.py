"""Runs notebooks in place, each in an empty folder, and leaves nothing in them that differs from run to run.

python notebooks/execute.py                              # all of them
python notebooks/execute.py notebooks/2-triangle.ipynb

Prints the seconds that each took, beside those of the processor, which tell more where other things run, too. More than
90 of either is said.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
MOST_SECONDS = 90
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def processor_seconds() -> float:
    """Of processes that this one started, and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(path: Path) -> tuple[float, float]:
    """Runs one notebook; returns the seconds that it took, and those of the processor.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    started, used = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        # Times of execution, and where output was cut into pieces, would differ with every run.
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True
        )
        client.execute(cwd=folder)
    seconds, used = time.perf_counter() - started, processor_seconds() - used
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return seconds, used


def describe(name: str, seconds: float, used: float) -> str:
    said = f" (more than {MOST_SECONDS})" if max(seconds, used) > MOST_SECONDS else ""
    return f"{name}: {seconds:.0f} s, {used:.0f} s of the processor{said}"


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        print(describe(path.name, *execute(path)), flush=True)


if __name__ == "__main__":
    main()
