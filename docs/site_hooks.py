"""What mkdocs does not do by itself: pages of the notebooks, and formulas as MathML.

Formulas are converted when the site is built, so that no page loads a script for them
and the site can be read without a connection.
"""

import html
import re
from pathlib import Path

from latex2mathml import converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
# What `pymdownx.arithmatex` leaves of $...$ and of $$...$$.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_files(files, config):
    """Adds a page for each notebook, with its committed outputs and pictures."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        exporter = MarkdownExporter()
        text, resources = exporter.from_filename(
            str(path), {"output_files_dir": path.stem}
        )
        text = with_links_of_site(text)
        page = File.generated(config, f"notebooks/{path.stem}.md", content=text)
        files.append(page)
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replaces links of a page to notebooks by links to their pages."""
    del page, config, files
    return re.sub(r"\]\(\.\./(notebooks/\w+)\.ipynb", r"](\1.md", markdown)


def with_links_of_site(text):
    """Replaces links of a notebook to files by links to their pages."""
    text = re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", text)
    return text.replace("](../docs/", "](../")


def on_page_content(content, page, config, files):
    """Replaces the formulas of a page by MathML."""
    del page, config, files
    content = INLINE.sub(lambda match: to_mathml(match[1], "inline"), content)
    return DISPLAY.sub(
        lambda match: f'<div class="formula">{to_mathml(match[1], "block")}</div>',
        content,
    )


def to_mathml(latex, display):
    """Returns MathML; raises an error where the converter does not know a command."""
    mathml = converter.convert(html.unescape(latex).strip(), display=display)
    if unknown := re.findall(r"\\[a-zA-Z]+", mathml):
        raise PluginError(f"no MathML for {', '.join(unknown)} in {latex}")
    return mathml
