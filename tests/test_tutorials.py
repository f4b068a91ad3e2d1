"""The method in a hundred lines finds what the package finds; tutorials run, and the solutions of their exercises pass the checks."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from evoprune_nb.data import load_pools
from evoprune_nb.search import Search, SearchConfig
from evoprune_nb.selection import Stage
from evoprune_nb.target import Target
from evoprune_nb.training import Training

TUTORIALS = Path(__file__).parent.parent / "nbs" / "tutorials"
HUNDRED = TUTORIALS / "hundred_lines.ipynb"
COURSE = sorted(TUTORIALS.glob("[1-9]_*.ipynb"))
names = dict(ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_hundred_lines_are_at_most_120_and_of_their_own():
    "Lines of code without blank ones; of the package, only the name of its directory is used."
    code = "\n".join(cell.source for cell in code_cells(HUNDRED))
    assert len([line for line in code.splitlines() if line.strip()]) <= 120
    assert not re.search(r"import evoprune_nb|from evoprune_nb", code) and len(re.findall("evoprune_nb", code)) == 2  # paths of weights and text


def test_hundred_lines_find_the_packages_winner(tiny, tokenizer, corpus, database, tmp_path):
    "The same genome with the same fitness, from another text, seed and schedule than the notebook's own."
    tokens = {"calibration": 2048, "tuning": 4096, "scoring": 2048, "heldout": 1024}
    stages, training = ((2, 0, 256), (1, 256, 512)), Training(lr=1e-3, batch_size=2)
    space = {}
    for cell in code_cells(HUNDRED)[:-1]:  # the last one only measures the winner
        exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []):
            space |= dict(TEXT=str(corpus), SEED=3, SEQ=64, LR=1e-3, BATCH=2, GENERATIONS=3, OFFSPRING=4, STAGES=list(stages))
            space["SPLITS"] = {split: (end, tokens[split]) for split, (end, _) in space["SPLITS"].items()}
    pools = load_pools(corpus, tokenizer, seq_len=64, tokens=tokens)
    config = SearchConfig(Target(0.5), generations=3, offspring=4, stages=tuple(Stage(*stage) for stage in stages), training=training, seed=3)
    winner = Search(tmp_path / "run", tiny, database, pools, config).run(progress=False)
    survivors = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines() if '"survivor"' in line]
    assert space["winner"] == winner.levels != space["uniform"]
    assert space["fitness"] == pytest.approx(survivors[-1]["fitness"], rel=1e-3)


TOUCH = """
def touch(view):
    leaves = lambda box: [leaf for child in box.children for leaf in (leaves(child) if hasattr(child, "children") else [child])]
    sliders = [leaf for leaf in leaves(view) if type(leaf).__name__.endswith("Slider")]
    shown = [leaf for leaf in leaves(view) if type(leaf).__name__ in ("Image", "HTML")][-1]
    for control in dict.fromkeys((sliders[0], sliders[-1])):
        before = shown.value
        control.value = control.options[-1] if hasattr(control, "options") else control.max
        assert shown.value != before, "the widget shows nothing else after its slider was moved"

touch(_)
"""


def with_solutions(path: Path) -> nbformat.NotebookNode:
    "The notebook in which each widget is touched, and every folded solution is followed by the check before it, once more; such checks are tagged."
    notebook, check, cells = nbformat.read(path, 4), None, []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            check = cell
            cells += [nbformat.v4.new_code_cell(TOUCH)] if ".observe(" in cell.source else []
        for solution in re.findall(r"<details><summary>Solution</summary>\s*```python\n(.*?)```", cell.source, re.DOTALL) if cell.cell_type == "markdown" else ():
            again = deepcopy(check)
            again.metadata["tags"] = ["solved"]
            cells += [nbformat.v4.new_code_cell(solution), again]
    notebook.cells = cells
    return notebook


@pytest.fixture(scope="module")
def executed(request) -> dict:
    "Tutorial → future of the executed notebook, two at a time; of those that are asked for."
    asked = {item.callspec.params["path"] for item in request.session.items if item.name.startswith("test_runs_as_shown")}

    def execute(path: Path) -> nbformat.NotebookNode:
        return NotebookClient(with_solutions(path), timeout=900, kernel_name="python3", resources={"metadata": {"path": str(TUTORIALS)}}).execute()

    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(execute, path) for path in [HUNDRED, *COURSE] if path in asked}


@pytest.mark.parametrize("path", [HUNDRED, *COURSE], **names)
def test_runs_as_shown(path, executed):
    "No cell fails, and each exercise is open before its solution and right after it."
    notebook = executed[path].result()
    answers = ["".join(output.get("data", {}).get("text/plain", "") for output in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    solved = [answer for cell, answer in zip((c for c in notebook.cells if c.cell_type == "code"), answers) if "solved" in cell.metadata.get("tags", [])]
    assert all("right" in answer for answer in solved)
    if path in COURSE:
        assert len(solved) == 2 and sum("not answered yet" in answer for answer in answers) == 2


@pytest.mark.parametrize("path", COURSE, **names)
def test_static_pages_make_sense(path):
    "A picture is stored above each widget; of widgets, only those are stored that need no kernel."
    cells = nbformat.read(path, 4).cells
    widgets = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and re.search(r"\.observe\(|^attach\(|<script>", cell.source)]
    assert widgets and all(bool(cells[i].outputs) == ("<script>" in cells[i].source) for i in widgets)
    pictured = [i for i, cell in enumerate(cells) if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))]
    assert pictured and pictured[0] < widgets[0]


@pytest.mark.parametrize("path", [HUNDRED, *COURSE], **names)
def test_words_are_explained_where_they_are_first_used(path):
    "The first paragraph with a word of the glossary has a link to it. Code, headings, names of buttons and of the next page do not count."
    words = [heading for cell in nbformat.read(TUTORIALS / "glossary.ipynb", 4).cells for heading in re.findall("^## (.*)", cell.source)]
    prose = [cell.source for cell in nbformat.read(path, 4).cells[1:] if cell.cell_type == "markdown"]  # below the title
    for word in words:
        used = re.compile(rf"\b{re.escape(word)}s?\b")
        first = next((text for text in prose if used.search(re.sub(r"(?s)```.*?```|`.*?`|(?m:^#[^\n]*|^Next: [^\n]*)|(?<!\*)\*[^*]+\*(?!\*)|\]\([^)]*\)", "", text))), "")
        assert not first or f"(glossary.ipynb#{word.replace(' ', '-')})" in first, f"{word}: {first}"


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.ipynb")), **names)
def test_links_lead_somewhere(path):
    "Files exist, and so do the headings that links name."
    prose = lambda notebook: "\n".join(cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "markdown")
    for link, anchor in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", prose(path)):
        assert (TUTORIALS / link).exists(), link
        headings = [heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", prose(TUTORIALS / link), re.MULTILINE)] if anchor else []
        assert not anchor or anchor in headings, f"{link}#{anchor}"
