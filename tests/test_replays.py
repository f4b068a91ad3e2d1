"""What a run directory says goes into a replay's notebook as data, whatever it says."""
import ast
import json
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from helpers import short_config, small_pools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evoprune_nb.paper.experiments import notebook_parameters
from evoprune_nb.paper.replays import to_notebook
from evoprune_nb.runlog import _sha256
from evoprune_nb.search import Search
from evoprune_nb.source import Source

SOURCE = Source("tiny", text="nowhere.txt", seq_len=16, calibration_tokens=512)
INJECTION = "0)\nimport os; os.abort()  #"


@pytest.fixture(scope="module")
def run_dir(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    search = Search(directory, *small, small_pools(), short_config(generations=1), source=SOURCE)
    search.send({"command": "note", "text": '"""\n\'\'\' $\\frac{$ <b>'})
    search.run(progress=False)
    return directory


def code(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def changed(run_dir: Path, tmp_path: Path, **source) -> Path:
    "A copy of the run whose config.json says something else of its source."
    copy = tmp_path / "run"
    copy.mkdir()
    row = json.loads((run_dir / "config.json").read_text())
    row = {key: value for key, value in row.items() if key != "sha256"} | {"source": row["source"] | source}
    (copy / "config.json").write_text(json.dumps(row | {"sha256": _sha256(row)}))  # whoever changes it can hash it, too
    (copy / "events.jsonl").write_bytes((run_dir / "events.jsonl").read_bytes())
    return copy


@pytest.mark.parametrize("name", ["calibration_seed", "seq_len", "n_levels", "calibration_tokens"])
def test_text_in_the_place_of_a_number_is_refused(run_dir, tmp_path, name):
    "Not written into a cell that somebody will execute."
    with pytest.raises(ValueError, match=f"{name} of the source must be of type int( . None)?; got '0\\)"):
        to_notebook(changed(run_dir, tmp_path, **{name: INJECTION}), tmp_path / "replay.ipynb")
    assert not (tmp_path / "replay.ipynb").exists()


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_the_seed_of_the_calibration_text(run_dir, tmp_path, seed):
    notebook = to_notebook(changed(run_dir, tmp_path, calibration_seed=seed), tmp_path / "replay.ipynb")
    assert f"calibration_seed = {seed}" in code(notebook)[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(text=st.text(st.sampled_from("'\"\\\n#{}$<>é\u2028 a"), min_size=1, max_size=20))
def test_any_text_is_a_literal(run_dir, tmp_path, text):
    "Text of the source comes back as it was; cells parse, and those that are code are the same for every run."
    cells = code(to_notebook(run_dir, tmp_path / "replay.ipynb", replace(SOURCE, text=text, model_name=text)))
    names = {}
    exec(cells[0] + "\n" + cells[1], names)
    assert names["text"] == names["model_name"] == text
    assert all(ast.parse(cell) for cell in cells)
    assert [type(node).__name__ for node in ast.parse(cells[1]).body] == ["Assign"] * 7
    assert cells[2:] == code(to_notebook(run_dir, tmp_path / "other.ipynb"))[2:]


def test_paths_with_an_apostrophe(run_dir, tmp_path):
    notebook = to_notebook(run_dir, tmp_path / "it's.ipynb")
    assert all(compile(cell, "cell", "exec") for cell in code(notebook))
    assert ast.literal_eval(notebook_parameters(notebook)["run_dir"]["default"]) == "runs/it's"


def test_a_run_directory_that_is_named_like_a_tag(run_dir, tmp_path):
    "Its name is shown as it is, in the notebook and in the page."
    from evoprune_nb.paper.pages import write_html

    named = run_dir.rename(run_dir.with_name("<img src=x onerror=alert(1)>`"))
    try:
        notebook = to_notebook(named, tmp_path / "replay.ipynb")
    finally:
        named.rename(run_dir)
    assert "# Replay of `<img src=x onerror=alert(1)>'`\n" in nbformat.read(notebook, as_version=4).cells[0].source
    page = write_html(notebook, tmp_path / "report.html", "replay").read_text()
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
