"""Slides of the course, one page each: its questions, predictions, figures and tasks, in the order of the notebook.

    python docs/slides.py DIRECTORY"""
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import nbformat

from evoprune_nb.paper.pages import clean_html, prose

TUTORIALS = Path(__file__).parent.parent / "nbs" / "tutorials"
WORDS, LINES = 60, 16  # of a slide, before another begins; of code that is shown where prose announces it
STYLE = """
:root { color-scheme: light dark }
body { margin: 0; font: clamp(16px, 2.7vmin, 40px)/1.45 system-ui, sans-serif; color: #1f2328; background: #fff }
main { height: 100vh; overflow-y: auto; scroll-snap-type: y mandatory }
section { min-height: 100vh; box-sizing: border-box; padding: 6vh 8vw; scroll-snap-align: start;
  display: flex; flex-direction: column; justify-content: center }
h1 { font-size: 2em; line-height: 1.15 } h2 { font-size: 1.35em; margin: 0 0 .6em } p { margin: .4em 0 }
img { max-width: 100%; max-height: 62vh; object-fit: contain; align-self: center; background: #fff }
.predict { border-left: .25em solid #d55e00; padding-left: 1em; font-size: 1.25em }
.table { overflow-x: auto } table { border-collapse: collapse; font-size: .8em }
th, td { padding: .2em .7em; border-bottom: 1px solid #8888; text-align: left } th { white-space: nowrap }
pre { font-size: .8em; white-space: pre-wrap; overflow-wrap: anywhere }
.alive { align-self: center } .alive svg { max-height: 48vh }
blockquote { margin: 0; font-style: italic }
math { font-family: "Cambria Math", "STIX Two Math", "Latin Modern Math", "DejaVu Math TeX Gyre", math }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #16181d } }
@media print { main { height: auto; overflow: visible } section { break-after: page; min-height: auto } }
@page { size: landscape; margin: 12mm }
"""
KEYS = """
const slides = [...document.querySelectorAll('section')], main = document.querySelector('main');
const way = {ArrowRight: 1, ArrowDown: 1, PageDown: 1, ' ': 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1};
document.addEventListener('keydown', event => {
  if (!way[event.key]) return;
  event.preventDefault();
  const now = slides.findLastIndex(slide => slide.offsetTop <= main.scrollTop + innerHeight / 3);
  slides[Math.max(0, Math.min(slides.length - 1, now + way[event.key]))].scrollIntoView();
});
"""


def without_links(markdown: str) -> str:
    return prose(re.sub(r"(?<!!)\[([^\]]*)\]\([^)]*\)", r"\1", markdown))


def outputs(cell) -> Iterator[tuple[str, str]]:
    "Kind (figure or table) and HTML of what a cell shows."
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            yield "figure", f'<img alt="figure" src="data:image/png;base64,{data["image/png"].strip()}">'
        elif "<script>" in data.get("text/html", ""):
            yield "figure", f'<div class="alive">{data["text/html"]}</div>'
        elif "text/html" in data:
            yield "table", f'<div class="table">{clean_html(data["text/html"])}</div>'


def slides(path: Path) -> list[str]:
    "HTML of every slide of a notebook."
    found, heading, n_words, lead = [], "", 0, ""

    def begin(*parts: str) -> None:
        nonlocal n_words
        found.append([*([f"<h2>{heading}</h2>"] if heading else []), *parts])
        n_words = 0

    for cell in nbformat.read(path, 4).cells:
        shown = [] if "not answered yet" in cell.source else list(outputs(cell))
        for kind, html in shown:  # a prediction is not shown beside its answer
            begin(html) if kind == "figure" or "**Predict" in lead else found[-1].append(html)
        if cell.cell_type == "code" and lead.endswith(":") and not shown and cell.source.count("\n") < LINES and "#|" not in cell.source:
            found[-1].append(f"<pre>{escape(cell.source)}</pre>")
        lead = cell.source if cell.cell_type == "markdown" else ""
        if not lead or "<details>" in lead or "![" in lead or "running kernel" in lead:
            continue
        title, text = re.match(r"(?s)(?:## ([^\n]*)\n+)?(.*)", cell.source).groups()
        n, predict = len(text.split()), text.startswith("**Predict")
        if title:
            heading = escape(title)
        if title or predict or not found or n_words + n > WORDS:
            begin()
        n_words += n
        html = without_links(text)
        found[-1].append(f'<div class="predict">{html}</div>' if predict else html)
        if predict:
            n_words = WORDS  # alone on its slide
    return ["\n".join(parts) for parts in found]


def page(path: Path) -> str:
    "A notebook's page of slides."
    title = re.match(r"# (.*)", nbformat.read(path, 4).cells[0].source)[1]
    body = "\n".join(f"<section>{html}</section>" for html in slides(path))
    head = (f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style>")
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><main tabindex="0">\n{body}\n</main><script>{KEYS}</script></body></html>\n'


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(TUTORIALS.glob("[1-9]_*.ipynb")):
        (directory / f"{path.stem}.html").write_text(page(path), encoding="utf-8")
        print(directory / f"{path.stem}.html")
