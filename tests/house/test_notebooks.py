"""Tests of the committed notebooks, which people look at without running them."""

import json
import re

import pytest

from tests.house.source import ROOT

NOTEBOOKS = sorted((ROOT.parent / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(tmp|home|root|work|Users)/")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_outputs_and_a_picture(path):
    """`CONTRIBUTING.md` says how they are made anew."""
    cells = json.loads(path.read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run the notebook from the start"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    texts = [
        output.get("text", output.get("data", {}).get("text/plain"))
        for output in outputs
    ]
    assert not MACHINE_PATH.search(json.dumps(texts))
