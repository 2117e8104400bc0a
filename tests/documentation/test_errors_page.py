"""Tests of the page of common mistakes, which `python -m tests.mistakes` writes."""

import re

import pytest

from tests.mistakes import GROUPS, PAGE, message_of

pytestmark = pytest.mark.page

MISTAKES = [mistake for mistakes in GROUPS.values() for mistake in mistakes]
FOREIGN = r"(?<=each other): |(?<=the losses): |\(<string>"  # JAX writes what follows


def section(title):
    """Returns what the page prints under a heading, with single spaces."""
    text = PAGE.read_text().split(f"### {title}\n")[1].split("\n##")[0]
    return " ".join(text.split())


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.title)
def test_the_page_shows_the_message_of_this_version(mistake):
    """The message names what was expected, and is the one on the page."""
    message = " ".join(message_of(mistake).split())
    own_words = re.split(FOREIGN, message)[0]
    assert own_words in section(mistake.title)
    assert mistake.remedy in section(mistake.title)


def test_the_page_has_no_other_mistakes():
    headings = re.findall(r"^### (.*)$", PAGE.read_text(), re.MULTILINE)
    assert headings == [mistake.title for mistake in MISTAKES]
