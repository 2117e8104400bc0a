"""Tests of the committed notebooks, which people look at without running them."""

import itertools
import json
import re

import pytest

from hypergrad.certificate import CERTIFICATE_REASONS
from hypergrad.estimators.base import REASONS
from tests.house.source import ROOT

NOTEBOOKS = sorted((ROOT.parent / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(tmp|home|root|work|Users)/")


def read_code_cells(path):
    """Returns the cells of a notebook that have code."""
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def read_texts(path):
    """Returns the texts that the cells have printed, without line breaks."""
    outputs = [output for cell in read_code_cells(path) for output in cell["outputs"]]
    texts = [
        output.get("text", output.get("data", {}).get("text/plain", ""))
        for output in outputs
    ]
    return [" ".join("".join(text).split()) for text in texts]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_outputs_and_a_picture(path):
    """`CONTRIBUTING.md` says how they are made anew."""
    cells = read_code_cells(path)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run the notebook from the start"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not MACHINE_PATH.search(json.dumps(read_texts(path)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_reasons_in_a_notebook_are_those_of_this_version(path):
    """A sentence is recognized by its first words; if it is old, run the notebook."""
    sentences = [*REASONS.values(), *CERTIFICATE_REASONS.values()]
    for text, sentence in itertools.product(read_texts(path), sentences):
        beginning = " ".join(sentence.split()[:4])
        candidates = [x for x in sentences if x.startswith(beginning)]
        if beginning in text:
            assert any(x in text for x in candidates), beginning
