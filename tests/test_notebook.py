"""The notebook runs from its first cell to its last, with small sizes in place of its own, and its model learns."""

import copy
import json
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the docs extra is not installed")
nbclient = pytest.importorskip("nbclient", reason="the docs extra is not installed")

pytestmark = pytest.mark.docs

PATH = Path(__file__).resolve().parent.parent / "notebooks/tour.ipynb"
SMALL = "lengths, steps, batch_size, seq_len, new_bytes = (256, 512), 40, 4, 64, 8"
FIGURES = "import json; print(json.dumps({'losses': losses.tolist(), 'score': float(score), 'text': text.size}))"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def executed(notebook):
    """The notebook after a run with small sizes, and with a last cell that prints the figures of training."""
    run = copy.deepcopy(notebook)
    (sizes,) = (place for place, cell in enumerate(run.cells) if "parameters" in cell.metadata.get("tags", []))
    run.cells.insert(sizes + 1, nbformat.v4.new_code_cell(SMALL))
    run.cells.append(nbformat.v4.new_code_cell(FIGURES))
    return nbclient.NotebookClient(run, timeout=600, kernel_name="python3").execute()


def test_it_is_valid_and_holds_no_output(notebook):
    nbformat.validate(notebook)
    assert "colab-badge" in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]


def test_every_cell_runs_and_the_model_learns(executed):
    figures = json.loads(executed.cells[-1].outputs[0].text)
    losses = figures["losses"]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert 0 < figures["score"] < 8  # bits, of a byte's 8
    assert figures["text"] > 1e6


def test_its_pictures_are_shown(executed):
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
