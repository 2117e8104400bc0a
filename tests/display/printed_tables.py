"""Reads the tables that results print."""

import html.parser

from hypergrad.display.tables import TEXT_WIDTH


def read_text(result) -> dict[str, str]:
    """Returns the table that a result prints as ``{name: text}``, without wraps."""
    title, *lines = str(result).splitlines()
    assert title == type(result).__name__
    table, name = {}, None
    for line in lines:
        assert len(line) <= TEXT_WIDTH
        if line[2] != " ":
            name, _, text = line.strip().partition("  ")
            table[name] = text.strip()
        else:
            table[name] += f" {line.strip()}"
    return table


class TableParser(html.parser.HTMLParser):
    """Reads the cells of a table."""

    def __init__(self):
        super().__init__()
        self.tags, self.cells = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def read_html(result) -> dict[str, str]:
    parser = TableParser()
    parser.feed(result._repr_html_())
    assert set(parser.tags) <= {"table", "caption", "tr", "th", "td", "br"}
    return dict(zip(parser.cells[::2], parser.cells[1::2], strict=True))
