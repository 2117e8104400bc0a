"""Golden traces: numbers of the library stay the same, to the bit where recorded."""

import itertools

import jax
import pytest

from tests.golden.encoding import approximate_differences, encode, exact_differences
from tests.golden.environment import get_environment
from tests.golden.record import CASES_PER_CACHE, format_difference, load_traces

pytestmark = pytest.mark.slow

TRACES = load_traces()
NUM_CASES_RUN = itertools.count(1)


@pytest.fixture(autouse=True)
def _free_compiled_programs():
    """Frees the compiled programs after every few cases."""
    yield
    if next(NUM_CASES_RUN) % CASES_PER_CACHE == 0:
        jax.clear_caches()


def test_every_case_is_recorded():
    """The recorded names are the names of the cases."""
    from tests.golden.cases import CASES

    assert sorted(TRACES["cases"]) == sorted(CASES)


@pytest.mark.parametrize("name", TRACES["cases"])
def test_golden(name: str):
    """A case has the recorded bits, or is close to them in another environment."""
    from tests.golden.cases import CASES

    is_recorded_environment = get_environment() == TRACES["environment"]
    compare = exact_differences if is_recorded_environment else approximate_differences
    differences = list(compare(TRACES["cases"][name], encode(CASES[name]())))
    assert not differences, "\n".join(
        format_difference(name, difference) for difference in differences
    )
