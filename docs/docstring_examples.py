"""Shows examples of docstrings as code; Markdown would take them for quotations."""

import re

import griffe

# A prompt and what follows it, up to an empty line or the end.
EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Puts a fence around each example."""

    def on_object(self, *, obj, **kwargs):
        """Changes the docstring of a class, function, attribute or module."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fence, obj.docstring.value)


def fence(match):
    """Returns an example between the marks of a code block."""
    return f"{match[1]}```pycon\n{match[0]}\n{match[1]}```"
