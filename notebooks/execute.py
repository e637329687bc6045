"""Runs notebooks in place, each in an empty folder, and leaves nothing in them that differs from run to run.

python notebooks/execute.py                              # all of them
python notebooks/execute.py notebooks/2-triangle.ipynb
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def execute(path: Path) -> float:
    """Runs one notebook; returns the seconds that it took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # Times of execution, and where output was cut into pieces, would differ with every run.
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True
        )
        client.execute(cwd=folder)
    seconds = time.perf_counter() - started
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return seconds


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        print(f"{path.name}: {execute(path):.0f} s", flush=True)


if __name__ == "__main__":
    main()
