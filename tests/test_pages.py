"""A page shows a report and can do nothing else, whatever the run that it tells of is called."""
import re

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from evoprune_nb.paper.pages import clean_html, formula, write_html

ATTACKS = [
    "<script>alert(1)</script>", "<scr<script></script>ipt>alert(1)</script>", "<script>alert(1)", "<script >alert(1)</script\t\n bar>", "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>", "<svg><script>alert(1)</script></svg>", "<iframe src='javascript:alert(1)'></iframe>", "<a href='java\tscript:alert(1)'>x</a>",
    "<a href=data:text/html,<script>alert(1)</script>>x</a>", "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>", "<style>@import 'https://a.b/c.css';</style>",
    "<link rel=stylesheet href=https://a.b/c.css>", "<img src=https://a.b/c.png>", "<b style='background:url(https://a.b)'>x</b>", "<base href=https://a.b>", "<form action=https://a.b><button>x</form>"]
ACTIVE = re.compile(r"<(script|iframe|svg|style|link|base|form|button|object|embed|meta)\b|<[^>]*\s(on\w+|style)\s*=|<[^>]*(src|href)\s*=\s*['\"]?\s*(javascript|data:text|https://a\.b)", re.IGNORECASE)


def body(path) -> str:
    return path.read_text(encoding="utf-8").partition("<main>")[2]


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_comes_from_others_is_inactive(attack, tmp_path):
    "In a title, in prose, in a table: markup that would run, load or restyle is gone."
    cells = [new_markdown_cell(f"# Replay of {attack}\n\n{attack}\n\n$x$ {attack}"), new_code_cell("x", outputs=[new_output("display_data", data={"text/html": f"<table><tr><td>{attack}</td></tr></table>"})])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebook.ipynb")
    path = write_html(tmp_path / "notebook.ipynb", tmp_path / "report.html", attack)
    assert not ACTIVE.search(clean_html(attack)) and not ACTIVE.search(body(path))
    assert "<script" not in path.read_text().lower()


@given(st.lists(st.sampled_from(["<", ">", "script", "/script", "</", "img src=x onerror=a ", '"', "'", "<math>", "<mtext>", "<!--", "-->", "<style>", "</style>", "a", " ", "&lt;"]), max_size=12))
def test_pieces_put_together_stay_inactive(pieces):
    assert not ACTIVE.search(clean_html("".join(pieces)))


def test_what_a_report_shows_stays():
    "Headings, frames with their headers, embedded pictures, links, formulas."
    import pandas as pd

    table = clean_html(pd.DataFrame({"a": [1.5]}, index=["b"])._repr_html_())
    assert "<thead>" in table and "<th>a</th>" in table and "<td>1.5</td>" in table and "vertical-align" not in table
    for html in ('<h2 id="x">A <em>b</em></h2>', '<img src="data:image/png;base64,AAAA">', '<a href="https://arxiv.org/abs/1">x</a>', '<a href="reports/x.html#y">x</a>'):
        assert clean_html(html) == html


@pytest.mark.parametrize("cell", [r"$\frac{a}{b}$", r"$$\frac{a}{b}$$", "\\begin{align}\na &= \\frac{a}{b}\n\\end{align}"])
def test_formulas_are_mathml(cell, tmp_path):
    "Inline, displayed, or as an environment: a browser draws it without a script."
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"Here:\n\n{cell}")]), tmp_path / "notebook.ipynb")
    page = body(write_html(tmp_path / "notebook.ipynb", tmp_path / "report.html", "formulas"))
    assert "<math" in page and "<mfrac>" in page and "$" not in page and "frac{" not in page


def test_a_broken_formula_is_shown_as_it_is():
    assert "<b>" not in formula(r"\frac{<b>") and formula(r"\frac{") == r"<code>\frac{</code>"
