"""Shows examples of docstrings as code; Markdown would take them for quotations."""

import re

import griffe

# A prompt and what follows it, up to an empty line or the end.
EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Puts a fence around each example."""

    def on_package(self, *, pkg, **kwargs):
        """Changes the docstring of the package, which is no member of anything."""
        del kwargs
        fence_examples(pkg)

    def on_object(self, *, obj, **kwargs):
        """Changes the docstring of a class, function, attribute or module."""
        del kwargs
        fence_examples(obj)


def fence_examples(obj):
    """Puts each example of a docstring between the marks of a code block."""
    fence = lambda match: f"{match[1]}```pycon\n{match[0]}\n{match[1]}```"
    if obj.docstring is not None and "```pycon" not in obj.docstring.value:
        obj.docstring.value = EXAMPLE.sub(fence, obj.docstring.value)
