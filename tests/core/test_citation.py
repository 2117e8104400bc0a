"""The BibTeX of a combination has exactly the entries of its components."""

import dataclasses
import re
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from evosax.algorithms import SNES

import hypergrad as hg
from hypergrad.citation import REFERENCES, citation, find_public

FIELD = re.compile(r"^  (\w+) = \{(.*)\},$")
REQUIRED = {
    "article": {"author", "title", "journal", "year"},
    "incollection": {"author", "title", "booktitle", "publisher", "year"},
    "inproceedings": {"author", "title", "booktitle", "year"},
    "misc": {"author", "title"},
    "software": {"author", "title"},
}
ARXIV = {
    "pedregosa2016": "1602.02355",
    "lorraine2020": "1911.02590",
    "rajeswaran2019": "1909.04630",
    "hataya2023": "2302.09726",
    "frangella2023": "2110.02820",
    "luketina2016": "1511.06727",
    "franceschi2017": "1703.01785",
    "shaban2019": "1810.10667",
    "grazzi2020": "2006.16218",
    "maclaurin2015": "1502.03492",
    "blondel2022": "2105.15183",
    "lineax2023": "2311.17283",
    "optimistix2024": "2402.09983",
    "defazio2014": "1407.0202",
    "nguyen2017": "1703.00102",
    "fang2018": "1807.01695",
    "cutkosky2019": "1905.10018",
}


class CG(eqx.Module):
    tolerance: float = 1e-6
    citations = ("hestenes1952",)


class Nystrom(eqx.Module):
    rank: int = eqx.field(static=True, default=5)
    citations = ("hataya2023", "frangella2023")


class Descent(eqx.Module):
    optimizer: Any = eqx.field(static=True)
    citations = ("deepmind2020jax",)


class Implicit(eqx.Module):
    solver: Any
    linear_solver: Any
    citations = ("pedregosa2016",)


class Wrapper(eqx.Module):
    inner: Any = None


def entry_keys(text):
    return re.findall(r"^@\w+\{([^,]+),$", text, flags=re.MULTILINE)


def test_without_arguments_it_is_hypergrad_itself():
    assert citation() == REFERENCES["hypergrad"]
    assert entry_keys(citation()) == ["hypergrad"]


def test_the_text_is_the_entries_alone():
    expected = [REFERENCES["hypergrad"], REFERENCES["hestenes1952"]]
    assert citation(CG()) == "\n\n".join(expected)


def test_entries_follow_the_order_of_fields():
    estimator = Implicit(Descent(optax.sgd(0.1)), CG())
    assert entry_keys(citation(estimator)) == [
        "hypergrad",
        "pedregosa2016",
        "deepmind2020jax",
        "hestenes1952",
    ]
    swapped = citation(CG(), estimator)
    assert entry_keys(swapped)[:3] == ["hypergrad", "hestenes1952", "pedregosa2016"]


def test_names_are_found_with_and_without_their_package():
    """Searchers and surrogates are not in `hypergrad` itself; modules are not cited."""
    assert find_public("Implicit") is hg.Implicit
    assert find_public("TPE") is find_public("searchers.TPE") is hg.searchers.TPE
    assert find_public("FBeta") is hg.surrogates.FBeta
    for name in ("tasks", "searchers", ""):
        with pytest.raises(ValueError, match="no public class") as caught:
            find_public(name)
        assert "searchers," not in str(caught.value)  # nor is a module proposed
    with pytest.raises(ValueError, match="Similar names: SOBA"):
        find_public("SOAB")


def test_entries_occur_once():
    same = CG()
    expected = ["hypergrad", "hestenes1952", "hataya2023", "frangella2023"]
    assert entry_keys(citation(same, same, CG(), Nystrom, Nystrom())) == expected


def test_classes_instances_and_subclasses_cite_the_same():
    class Special(Nystrom):
        pass

    expected = ["hypergrad", "hataya2023", "frangella2023"]
    for value in (Nystrom, Nystrom(), Special, Special()):
        assert entry_keys(citation(value)) == expected


def test_dataclasses_and_containers_are_searched():
    @dataclasses.dataclass(frozen=True)
    class Run:
        estimator: Any
        components: tuple = ()
        named: Any = None

    class Pair(NamedTuple):
        left: Any
        right: Any

    run = Run(
        Wrapper(CG()), (Nystrom(), [1, None]), {"a": Pair(Wrapper, Descent(None))}
    )
    expected = ["hypergrad", "hestenes1952", "hataya2023", "frangella2023"]
    assert entry_keys(citation(run)) == [*expected, "deepmind2020jax"]
    assert entry_keys(citation([Wrapper(), "text", 3, jnp.ones(3)])) == ["hypergrad"]


def test_functions_may_carry_keys():
    surrogate = lambda: None
    surrogate.citations = ("blondel2022",)
    assert entry_keys(citation(Wrapper(surrogate))) == ["hypergrad", "blondel2022"]


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (optax.adam(0.1), "deepmind2020jax"),
        (optax.adam, "deepmind2020jax"),
        (lx.GMRES(1e-6, 1e-6), "lineax2023"),
        (lx.LU(), "lineax2023"),
        (optx.BFGS(1e-6, 1e-6), "optimistix2024"),
        (hg.searchers.EvolutionStrategy(SNES, 4), "lange2022"),
    ],
    ids=["optax", "optax-function", "GMRES", "LU", "BFGS", "SNES"],
)
def test_objects_of_libraries_cite_their_library(value, key):
    first, second, *rest = entry_keys(citation(Wrapper(value)))
    assert (first, second) == ("hypergrad", key)
    # optimistix's solvers hold lineax's.
    assert set(rest) <= ({"lineax2023"} if key == "optimistix2024" else set())


def test_cycles_end():
    @dataclasses.dataclass
    class Node:
        other: Any = None
        citations = ("liu1989",)

    node = Node()
    node.other = [node]
    assert entry_keys(citation(node)) == ["hypergrad", "liu1989"]


def test_an_unknown_key_is_an_error():
    class Novel(eqx.Module):
        citations = ("nobody1999",)

    with pytest.raises(KeyError, match="nobody1999"):
        citation(Implicit(CG(), Novel()))


def test_a_string_instead_of_a_tuple_is_an_error():
    class Careless(eqx.Module):
        citations = "liu1989"

    with pytest.raises(TypeError, match=r"Careless\.citations"):
        citation(Careless())


def parse_entry(key):
    """Returns the kind and the fields of an entry whose lines are well formed."""
    first_line, *lines, last_line = REFERENCES[key].split("\n")
    kind = first_line.removeprefix("@").removesuffix(f"{{{key},")
    assert (first_line, last_line) == (f"@{kind}{{{key},", "}"), key
    fields = [FIELD.findall(line)[0] for line in lines]
    assert len(fields) == len(dict(fields)), key
    return kind, dict(fields)


def test_entries_are_well_formed():
    """Braces are balanced, text is ASCII, and required fields exist."""
    for key in REFERENCES:
        kind, fields = parse_entry(key)
        for value in fields.values():
            depths = np.cumsum([{"{": 1, "}": -1}.get(c, 0) for c in value])
            assert depths.min() >= 0, key
            assert depths[-1] == 0, key
            assert value.isascii(), key
        assert fields.keys() >= REQUIRED[kind], key
        assert key == "hypergrad" or fields["year"] in key


@pytest.mark.parametrize(
    "package",
    [hg, hg.searchers, hg.surrogates, hg.objectives, hg.spaces],
    ids=lambda package: package.__name__,
)
def test_keys_of_public_objects_are_in_the_bibliography(package):
    for name in package.__all__:
        keys = getattr(getattr(package, name), "citations", ())
        assert isinstance(keys, tuple), name
        assert REFERENCES.keys() >= set(keys), name


VARIANCE_REDUCTION = {
    hg.SOBA: [],
    hg.SABA: ["defazio2014"],
    hg.SRBA: ["nguyen2017", "fang2018"],
    hg.VRBO: ["nguyen2017", "fang2018"],
    hg.MRBO: ["cutkosky2019"],
    hg.SUSTAIN: ["cutkosky2019"],
    hg.FSLA: ["cutkosky2019"],
}


def test_a_method_cites_its_variance_reduction():
    """The paper of the bilevel method comes before it."""
    for estimator, expected in VARIANCE_REDUCTION.items():
        package, method, *others = entry_keys(citation(estimator))
        assert (package, others) == ("hypergrad", expected), estimator
        assert method not in expected


def test_the_bibliography_has_the_foundations():
    for key, arxiv in ARXIV.items():
        assert f"eprint = {{{arxiv}}}" in REFERENCES[key]
    assert REFERENCES.keys() >= ARXIV.keys() | {
        "hypergrad",
        "liu1989",
        "hestenes1952",
        "dembo1982",
        "griewank2000",
        "deepmind2020jax",
    }


FUNCTIONS = {
    hg.spaces.gumbel_softmax: ["jang2017", "maddison2017"],
    hg.spaces.straight_through: ["bengio2013"],
    hg.spaces.score_function: ["williams1992", "foerster2018"],
    hg.objectives.hypervolume: ["zitzler1999"],
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_cite_their_sources(function):
    assert entry_keys(citation(function)) == ["hypergrad", *FUNCTIONS[function]]
