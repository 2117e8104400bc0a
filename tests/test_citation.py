"""BibTeX of exactly what was combined: no entry missing, none too many."""

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

import hypergrad as hg
from hypergrad.citation import REFERENCES, citation

FIELD = re.compile(r"^  (\w+) = \{(.*)\},$")
REQUIRED = {
    "article": {"author", "title", "journal", "year"},
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


class Plain(eqx.Module):
    inner: Any = None


def keys(text):
    return re.findall(r"^@\w+\{([^,]+),$", text, flags=re.MULTILINE)


def test_without_arguments_hypergrad_itself():
    assert citation() == REFERENCES["hypergrad"]
    assert keys(citation()) == ["hypergrad"]


def test_output_is_the_entries_and_nothing_else():
    expected = [REFERENCES["hypergrad"], REFERENCES["hestenes1952"]]
    assert citation(CG()) == "\n\n".join(expected)


def test_nested_fields_in_first_seen_order():
    estimator = Implicit(Descent(optax.sgd(0.1)), CG())
    assert keys(citation(estimator)) == [
        "hypergrad",
        "pedregosa2016",
        "deepmind2020jax",
        "hestenes1952",
    ]
    swapped = citation(CG(), estimator)
    assert keys(swapped)[:3] == ["hypergrad", "hestenes1952", "pedregosa2016"]


def test_no_duplicates():
    same = CG()
    expected = ["hypergrad", "hestenes1952", "hataya2023", "frangella2023"]
    assert keys(citation(same, same, CG(), Nystrom, Nystrom())) == expected


def test_classes_instances_and_subclasses():
    class Special(Nystrom):
        pass

    expected = ["hypergrad", "hataya2023", "frangella2023"]
    for thing in (Nystrom, Nystrom(), Special, Special()):
        assert keys(citation(thing)) == expected


def test_dataclasses_and_containers():
    @dataclasses.dataclass(frozen=True)
    class Run:
        estimator: Any
        parts: tuple = ()
        named: Any = None

    class Pair(NamedTuple):
        left: Any
        right: Any

    run = Run(Plain(CG()), (Nystrom(), [1, None]), {"a": Pair(Plain, Descent(None))})
    expected = ["hypergrad", "hestenes1952", "hataya2023", "frangella2023"]
    assert keys(citation(run)) == [*expected, "deepmind2020jax"]
    assert keys(citation([Plain(), "text", 3, jnp.ones(3)])) == ["hypergrad"]


def test_functions_may_carry_keys():
    surrogate = lambda: None
    # pyright knows no attributes of a function, hence not by a dot.
    setattr(surrogate, "citations", ("blondel2022",))  # noqa: B010 - no attribute that a type checker knows
    assert keys(citation(Plain(surrogate))) == ["hypergrad", "blondel2022"]


@pytest.mark.parametrize(
    ("thing", "key"),
    [
        (optax.adam(0.1), "deepmind2020jax"),
        (optax.adam, "deepmind2020jax"),
        (lx.GMRES(1e-6, 1e-6), "lineax2023"),
        (lx.LU(), "lineax2023"),
        (optx.BFGS(1e-6, 1e-6), "optimistix2024"),
    ],
    ids=["optax", "optax-function", "GMRES", "LU", "BFGS"],
)
def test_libraries_are_cited_where_their_objects_are_used(thing, key):
    first, second, *rest = keys(citation(Plain(thing)))
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
    assert keys(citation(node)) == ["hypergrad", "liu1989"]


def test_unknown_key_is_named():
    class Novel(eqx.Module):
        citations = ("nobody1999",)

    with pytest.raises(KeyError, match="nobody1999"):
        citation(Implicit(CG(), Novel()))


def test_a_bare_string_is_refused():
    class Careless(eqx.Module):
        citations = "liu1989"

    with pytest.raises(TypeError, match=r"Careless.*tuple of keys.*'liu1989'"):
        citation(Careless())


@pytest.mark.parametrize("key", REFERENCES)
def test_entries_are_well_formed(key):
    first, *body, last = REFERENCES[key].split("\n")
    kind = first.removeprefix("@").removesuffix(f"{{{key},")
    assert first == f"@{kind}{{{key},"
    assert last == "}"
    fields = {}
    for line in body:
        name, value = FIELD.findall(line)[0]
        assert name not in fields
        fields[name] = value
        depths = np.cumsum([{"{": 1, "}": -1}.get(c, 0) for c in value])
        assert depths.min() >= 0
        assert depths[-1] == 0
        assert value.isascii()
    assert fields.keys() >= REQUIRED[kind]
    if key != "hypergrad":
        assert fields["year"] in key


@pytest.mark.parametrize(
    ("estimator", "memory"),
    [
        (hg.SOBA, []),
        (hg.SABA, ["defazio2014"]),
        (hg.SRBA, ["nguyen2017", "fang2018"]),
        (hg.VRBO, ["nguyen2017", "fang2018"]),
        (hg.MRBO, ["cutkosky2019"]),
        (hg.SUSTAIN, ["cutkosky2019"]),
        (hg.FSLA, ["cutkosky2019"]),
    ],
)
def test_a_method_cites_its_variance_reduction(estimator, memory):
    """After the paper that made a bilevel method of it."""
    first, second, *rest = keys(citation(estimator))
    assert (first, rest) == ("hypergrad", memory)
    assert second not in memory


def test_the_table_holds_what_the_library_rests_on():
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
