"""Measures pages of HTML in a browser, at the width of a phone and of a desktop.

    pip install PySide6
    python docs/measure_pages.py FOLDER [SCREENSHOTS]

Every page in FOLDER, such as `site` after ``make docs``, is opened at 390 and 1440
pixels. A page is named, and the exit status is 1, if it is wider than the window, if a
picture of it is missing, or if it shows a formula as its source. With SCREENSHOTS the
first screen of each page is written there. Root needs
``QTWEBENGINE_CHROMIUM_FLAGS=--no-sandbox`` in the environment.
"""

import json
import sys
from pathlib import Path
from typing import Any

from PySide6.QtCore import QEventLoop, QTimer, QUrl  # pyright: ignore
from PySide6.QtWebEngineWidgets import QWebEngineView  # pyright: ignore
from PySide6.QtWidgets import QApplication  # pyright: ignore

ARGUMENTS = ["measure_pages", "-platform", "offscreen"]
WIDTHS = (390, 1440)
HEIGHT = 900
TIMEOUT = 20_000  # milliseconds
MEASURE = r"""
JSON.stringify({
  width: document.documentElement.scrollWidth - window.innerWidth,
  missing: Array.from(document.images).filter(x => x.naturalWidth == 0)
    .map(x => x.getAttribute("src").slice(-60)),
  sources: (document.body.innerText.match(/\$\$|\\frac|\\partial/g) || []).length,
})
"""


def wait_for(start: Any) -> Any:
    """Returns what ``start(done)`` passes to ``done``, or None after the timeout."""
    loop, results = QEventLoop(), []

    def done(result: Any) -> None:
        results.append(result)
        loop.quit()

    QTimer.singleShot(TIMEOUT, loop.quit)
    start(done)
    loop.exec()
    return results[0] if results else None


def load(view: Any, path: Path) -> None:
    """Opens a page and waits until it is drawn."""

    def start(done: Any) -> None:
        view.loadFinished.connect(done)
        view.load(QUrl.fromLocalFile(str(path.resolve())))

    wait_for(start)
    view.loadFinished.disconnect()
    wait_for(lambda done: QTimer.singleShot(400, lambda: done(None)))


def find_faults(view: Any) -> list[str]:
    """Returns what is wrong with the page that is open."""
    text = wait_for(lambda done: view.page().runJavaScript(MEASURE, done))
    if text is None:
        return ["it cannot be measured"]
    measured = json.loads(text)
    faults = [f"the picture {name} is missing" for name in measured["missing"]]
    if measured["width"] > 0:
        faults.append(f"it is {measured['width']} pixels too wide")
    if measured["sources"]:
        faults.append(f"it shows the source of {measured['sources']} formulas")
    return faults


def main(folder: Path, screenshots: Path | None) -> int:
    """Prints the faults of all pages, and returns 1 if there are any."""
    app = QApplication(ARGUMENTS)
    view, num_faults = QWebEngineView(), 0
    view.show()
    pages = sorted(folder.rglob("*.html"))
    for page in pages:
        name = page.relative_to(folder).as_posix()
        for width in WIDTHS:
            view.resize(width, HEIGHT)
            load(view, page)
            for fault in find_faults(view):
                num_faults += 1
                sys.stdout.write(f"{name} at {width} pixels: {fault}\n")
            if screenshots is not None:
                screenshots.mkdir(parents=True, exist_ok=True)
                file = f"{name.replace('/', '-').removesuffix('.html')}-{width}.png"
                view.grab().save(str(screenshots / file))
    sys.stdout.write(f"{len(pages)} pages, {num_faults} faults\n")
    del view, app
    return int(num_faults > 0)


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    sys.exit(main(folders[0], folders[1] if len(folders) > 1 else None))
