"""Tests of the README and of the pages of the documentation.

The pages *How to choose*, *Several devices and hosts* and *Write your own* have tests
of their own.
"""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.runtime.compat import enable_x64

pytestmark = pytest.mark.page

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FOLDERS_BY_NAME = {"tasks", "bench"}  # The architecture does not list their files.


def read_blocks(path):
    """Returns the Python blocks of a page, except those that are scripts."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def run_blocks(path):
    """Runs the blocks of a page in order and returns their names."""
    names = {}
    for block in read_blocks(path):
        exec(compile(block, str(path), "exec"), names)
    return names


def test_the_readme_is_short_and_runs(capsys):
    """Descent is trusted and lowers the value; an early stop is untrusted, by name."""
    path = ROOT / "README.md"
    assert len(path.read_bytes()) <= 10_000
    with enable_x64(False):  # as users run it
        names = run_blocks(path)
    first, last, trusted = capsys.readouterr().out.splitlines()[0].split()
    assert float(last) < float(first)
    assert f"# {float(first):.2f} {float(last):.2f} {trusted}" in path.read_text()
    assert trusted == "True"
    f1 = names["f1"].exact(names["val"][0] @ names["f1_trace"].w, names["labels"])
    assert f"# {f1:.2f}" in path.read_text()
    assert not names["estimate"].trusted
    assert len(names["estimate"].reasons) == 1
    assert names["certificate"].error_estimate > 0.1
    assert names["f1_trace"].value[-1] < names["f1_trace"].value[0]


def test_the_first_example_of_the_site_is_that_of_the_readme():
    examples = [read_blocks(ROOT / name)[0] for name in ("README.md", "docs/index.md")]
    assert examples[0] == examples[1]


@pytest.mark.slow
def test_the_page_on_trust_runs():
    names = run_blocks(ROOT / "docs/trust.md")
    assert names["certificate"].error_estimate > 0.1
    assert names["estimate"].trusted
    assert names["estimate"].stats["error_estimate"] <= 1e-4
    assert 0 < names["average"].stats["standard_error"] < 1


def test_the_programs_of_other_libraries_agree():
    names = run_blocks(ROOT / "docs/migration.md")
    for name in ("jaxopt_gradient", "argmin_gradient", "optimistix_gradient"):
        np.testing.assert_allclose(
            names[name], names["ours"].hypergradient, rtol=1e-4, err_msg=name
        )
    for name in ("unrolled", "neumann"):
        np.testing.assert_allclose(
            names[name].hypergradient, names["ours"].hypergradient, rtol=1e-4
        )
    assert names["ours"].trusted
    assert names["kept"].trusted


@pytest.mark.slow
def test_the_page_on_models_runs():
    """Each estimate is that of central differences where the training is smooth."""
    with enable_x64(False):  # flax's layers are in float32
        names = run_blocks(ROOT / "docs/models.md")
        differences = hg.CentralDifference(names["estimator"].solver)
        expected = hg.hypergradient(names["mlp_problem"], differences)(
            names["mlp_params"], jnp.array(-4.0)
        )
    for model in ("nnx", "head", "linen", "haiku", "mlp"):
        estimate = names[f"{model}_estimate"]
        assert estimate.trusted, model
        assert jnp.abs(estimate.hypergradient) > 1e-5, model
    np.testing.assert_allclose(
        names["mlp_estimate"].hypergradient, expected.hypergradient, rtol=0.05
    )
    assert names["trace"].value[-1] < names["trace"].value[0]
    assert names["record"].value < jnp.log(2.0)
    with_hessian, with_gauss_newton, unrolled = names["tanh_estimates"]
    # The number itself depends on rounding, because H is indefinite.
    assert with_hessian.flags["negative_curvature"]
    assert not with_hessian.trusted
    difference = with_hessian.hypergradient - unrolled.hypergradient
    assert abs(difference) > abs(unrolled.hypergradient)
    assert not with_gauss_newton.trusted
    np.testing.assert_allclose(with_gauss_newton.hypergradient, -0.049, rtol=0.05)
    np.testing.assert_allclose(unrolled.hypergradient, -0.042, rtol=0.05)


@pytest.mark.slow
def test_the_page_on_the_outer_loop_runs(tmp_path, monkeypatch):
    """A continued and an interrupted run end with the bits of one run."""
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names = run_blocks(ROOT / "docs/outer_loop.md")
    assert names["stopped"].status == "stopped: time limit"
    assert jnp.array_equal(names["second"].alpha, names["finished"].alpha)
    assert names["by_budget"].cost[-2] < 100 <= names["by_budget"].cost[-1]
    assert names["refined"].stats["trusted"].all()
    assert jnp.array_equal(names["kept_w"], names["estimate"].w)


def test_the_page_on_displays_runs(tmp_path, monkeypatch):
    """The page shows what the run prints, up to rounding, and writes its figure."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/displays.md"
    with enable_x64(False):  # as users run it
        names = run_blocks(page)
    assert (tmp_path / "run.png").stat().st_size > 10_000
    expected_text = page.read_text().split("```text\n")[1].split("```")[0]
    number = r"-?\d[\d,]*(?:\.\d+)?"
    texts = re.sub(number, "#", expected_text), re.sub(number, "#", str(names["trace"]))
    assert texts[0].strip() == texts[1]
    expected_numbers, numbers = (
        [float(x.replace(",", "")) for x in re.findall(number, text)]
        for text in (expected_text, str(names["trace"]))
    )
    for actual, expected in zip(numbers, expected_numbers, strict=True):
        # Rounding may move the step at which estimates begin to be trusted.
        most = 1 if expected.is_integer() else 0
        assert actual == pytest.approx(expected, rel=0.05, abs=most), (actual, expected)


def test_the_page_on_search_runs():
    names = run_blocks(ROOT / "docs/search.md")
    assert names["descent"].value.min() < 1e-3
    assert len(names["continued"].value) == 2 * len(names["previous"]) + 1


@pytest.mark.slow
def test_the_page_on_surrogates_runs():
    """F1 rises, and its gap stays small as the temperature falls."""
    names = run_blocks(ROOT / "docs/surrogates.md")
    f1, gap = (names["trace"].metrics[name][::10] for name in ("F1", "F1_gap"))
    assert 0.5 < f1[0] < f1[-1] <= 1
    assert (abs(gap) < 0.1).all()


@pytest.mark.slow
def test_the_page_on_objectives_runs():
    """Each of two preferences has the lower value in the loss that it weighs more."""
    names = run_blocks(ROOT / "docs/objectives.md")
    error, flops = names["front"].value[:, -1].T
    assert error[0] < error[1]
    assert flops[1] < flops[0]
    assert (names["trace"].value[-1] < names["trace"].value[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results", "architecture", "index"])
def test_the_other_pages_run(name):
    assert run_blocks(ROOT / f"docs/{name}.md")


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_public_names_on_pages_exist(path):
    """Names such as ``hg.objectives.EPO``, in code and in text."""
    for name in re.findall(r"\bhg((?:\.[A-Za-z]\w*)+)", path.read_text()):
        value = hg
        for part in name.split(".")[1:]:
            assert hasattr(value, part), f"hg{name}"
            value = getattr(value, part)


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_links_to_pages_and_sections_exist(path):
    """Of files by their path, of sections by the heading."""
    for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text()):
        file, _, section = target.partition("#")
        page = (path.parent / file) if file else path
        assert page.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            }
            assert section in slugs, target


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text().split("theme:")[0]
    pages = set(re.findall(r"([\w/]+\.md)$", nav, re.MULTILINE))
    notebooks = {f"notebooks/{p.stem}.md" for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert pages == {path.name for path in PAGES} | notebooks


def test_the_architecture_names_every_module():
    """Each module stands in the tree under its folder."""
    page = (ROOT / "docs/architecture.md").read_text()
    tree = page.split("```text\n")[1].split("```")[0]
    package = Path(hg.__file__).parent
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert named_modules(tree) - {"__init__.py"} == {
        module
        for module in modules
        if not module.endswith("__init__.py")
        if module.split("/")[0] not in FOLDERS_BY_NAME
    }


def test_the_architecture_mentions_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text()
    files = set(re.findall(r"`((?:\w+/)*\w+\.py)`", page))
    assert len(files) > 5
    assert not [
        name for name in files if not (Path(hg.__file__).parent / name).exists()
    ]


def named_modules(tree):
    """Returns the modules of a tree of folders, whose levels are two spaces apart."""
    folders, modules = {}, set()
    for line in tree.splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        parent = folders.get(indent - 2, "")
        if folder := re.match(r"\w+/", line.lstrip()):
            folders[indent] = parent + folder[0]
        else:
            modules |= {parent + name for name in re.findall(r"\w+\.py", line)}
    return modules


def test_the_site_shows_the_examples_of_docstrings_as_code():
    """No prompt of the package is outside of a code block on the page of the API."""
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(str(ROOT / "docs/docstring_examples.py"))
    package = griffe.load("hypergrad", search_paths=[str(ROOT)], extensions=extensions)
    docstrings = {
        item.path: item.docstring.value for item in members(package) if item.docstring
    }
    text_outside = {
        path: re.sub(r"^( *)```pycon\n.*?\n\1```$", "", text, flags=re.M | re.S)
        for path, text in docstrings.items()
    }
    assert not [path for path, text in text_outside.items() if ">>> " in text]
    assert sum(text.count("```pycon") for text in docstrings.values()) >= 100
    assert "```pycon" in docstrings["hypergrad"]


def members(item):
    """Yields an object of griffe and all that it defines."""
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from members(member)
