"""
The notebooks of examples/, run without Jupyter: their cells in order, in one namespace.

    python tests/notebooks.py     writes what the cells print into the notebooks
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def recorded(cell: dict) -> str:
    """What a cell has printed, as the notebook keeps it; ValueError for an output of another kind."""
    if any(output.get("name") != "stdout" for output in cell["outputs"]):
        raise ValueError(f"A cell has outputs that are not text on standard output: {cell['outputs']}")
    return "".join(line for output in cell["outputs"] for line in output["text"])


def run(notebook: dict, folder: Path) -> list[str]:
    """
    What each cell prints if the notebook is started in this folder.

    Raises ValueError for a cell that ends in a value: Jupyter would show it, and not as text on standard output.
    """

    def refuse(value) -> None:
        if value is not None:
            raise ValueError(f"A cell ends in a value, {value!r}: print it.")

    printed, namespace = [], {"__name__": "__main__"}
    before, hook = os.getcwd(), sys.displayhook
    os.chdir(folder)
    sys.displayhook = refuse
    try:
        for number, cell in enumerate(code_cells(notebook)):
            tree = ast.parse("".join(cell["source"]))
            last = [tree.body.pop()] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(tree, f"cell {number}", "exec"), namespace)
                exec(compile(ast.Interactive(last), f"cell {number}", "single"), namespace)
            printed.append(output.getvalue())
    finally:
        os.chdir(before)
        sys.displayhook = hook
    return printed


def write(path: Path) -> None:
    notebook = read(path)
    for number, (cell, text) in enumerate(zip(code_cells(notebook), run(notebook, ROOT)), start=1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell.update(execution_count=number, outputs=[stream] if text else [])
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in NOTEBOOKS:
        write(path)
