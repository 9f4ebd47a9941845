"""Every notebook runs from top to bottom, and is stored with its outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


SMALLER = {
    "jump": ("JUMP, SEEDS = 500, 300, 8, 1e4, 1000", "JUMP, SEEDS = 100, 110, 8, 1e4, 20"),
    "multi_seed_sweep": ('sweep_grid(store="sweep"', 'sweep_grid(seeds=range(10), chunk_size=256, store="sweep"'),
    "multi_task": ("SEEDS = 8, 10_000, 100", "SEEDS = 8, 1_000, 4"),
    "reinforcement_learning": ("SEEDS, STEPS = range(20), 20_000", "SEEDS, STEPS = range(2), 1_280"),
    "split_vs_unified": ("seeds=range(1000)", "seeds=range(100)"),
    "td_learning": ("logspace(-6, 0, 13), 20, 20_000", "logspace(-6, 0, 13), 5, 4_000"),
    "your_network": ("SEEDS, STEPS = 20, 2_000", "SEEDS, STEPS = 2, 100"),
}
"""What makes a notebook run in a quarter of its time; with ``-m slow`` it runs as it is."""


LONGEST = ("jump", "multi_seed_sweep", "multi_task", "reinforcement_learning", "td_learning")
"""Notebooks that take more than ten seconds even so."""


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} > set(SMALLER)


# IPython's kernel and its sockets give warnings of their own at start.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("smaller", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["smaller", "as_it_is"])
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in LONGEST else path for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebook(path, smaller, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], "it is stored executed"
    assert any(cell.outputs for cell in code)
    if smaller and path.stem in SMALLER:
        whole, part = SMALLER[path.stem]
        assert any(whole in cell.source for cell in code)
        for cell in code:
            cell.source = cell.source.replace(whole, part)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Traceback" not in text
