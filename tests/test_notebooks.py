"""The notebooks are the source: exporting and cleaning them leaves no difference, and they hold no machine noise."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evoprune_nb.paper.experiments import notebook_parameters

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))
SOURCES = [path for path in NOTEBOOKS if re.match(r"\d\d", path.name)]
EXPERIMENTS = [path for path in NOTEBOOKS if path.parent.name == "experiments"]
by_name = dict(ids=lambda path: path.relative_to(ROOT / "nbs").with_suffix("").as_posix())


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def test_clean_and_export_leave_no_difference(tmp_path):
    "After nbdev_clean and nbdev_export in a copy of the repository, every file is there with the same bytes, and no other."
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("nbs", "evoprune_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    files = lambda: {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = files()
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([str(Path(sys.executable).parent / command)], cwd=tmp_path, check=True, capture_output=True)
    after = files()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_every_module_has_its_notebook():
    "Each source notebook exports one module, and each module comes from one."
    exported = [re.search(r"#\| default_exp ([\w.]+)", text_of(cells(path)[0])).group(1) for path in SOURCES]
    by_hand = ("__init__.py", "_modidx.py")
    modules = [path.relative_to(ROOT / "evoprune_nb") for path in (ROOT / "evoprune_nb").rglob("*.py") if path.name not in by_hand]
    assert sorted(exported) == sorted(".".join(path.with_suffix("").parts) for path in modules)


@pytest.mark.parametrize("path", SOURCES, **by_name)
def test_source_notebooks_begin_with_name_title_and_purpose(path):
    "First the module's name, then a title with one line of purpose; the module's docstring is that line."
    first, second, *_ = cells(path)
    assert first["cell_type"] == "code" and re.fullmatch(r"#\| default_exp [\w.]+", text_of(first).strip())
    match = re.match(r"# \S.*\n\n> (\S.*)(\n|$)", text_of(second))
    assert second["cell_type"] == "markdown" and match
    module = (ROOT / "evoprune_nb" / f"{text_of(first).split()[-1].replace('.', '/')}.py").read_text(encoding="utf-8")
    assert module.startswith(f'"""{match.group(1)}"""')


@pytest.mark.parametrize("path", NOTEBOOKS, **by_name)
def test_no_machine_noise(path):
    "No execution counts, no progress bars or other error-stream text, no widget views, no paths of someone's machine."
    for cell in cells(path):
        outputs = cell.get("outputs", [])
        assert cell.get("execution_count") is None and all(output.get("execution_count") is None for output in outputs)
        kinds = {"error stream": any(output.get("name") == "stderr" for output in outputs), "error": any(output["output_type"] == "error" for output in outputs),
                 "widget": "widget-view" in json.dumps(outputs)}
        noise = [kind for kind, there in kinds.items() if there]
        assert not noise, f"stored below {text_of(cell)[:80]!r}"
        stored = "".join(
            "".join(value) for output in outputs for kind, value in ({"text": output["text"]} if "text" in output else output.get("data", {})).items() if not kind.startswith("image/"))
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home|Users|var)/|C:\\", stored), stored


@pytest.mark.parametrize("path", EXPERIMENTS, **by_name)
def test_experiments_have_typed_parameters(path):
    "Exactly one cell is tagged `parameters`, it holds nothing else, and each parameter has a type, a default and a meaning."
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    known, lines = notebook_parameters(path), text_of(tagged[0]).splitlines()
    assert len(known) == len(lines) and all(re.match(rf"{name}: \w+ = .+  # .+", line) for name, line in zip(known, lines))


@pytest.mark.parametrize("path", EXPERIMENTS, **by_name)
def test_experiments_import_only_the_package(path):
    "Experiments neither export nor need development tools: what they do is in the package."
    code = "\n".join(text_of(cell) for cell in cells(path) if cell["cell_type"] == "code")
    assert "#|" not in code and not re.search(r"^\s*(import|from) (nbdev|fastcore|pickle)\b", code, re.MULTILINE)


def test_the_tour_links_every_notebook_in_order():
    "Each source notebook is linked once, by part, in the order of reading."
    text = "\n".join(text_of(cell) for cell in cells(ROOT / "nbs" / "index.ipynb") if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([\w/]+\.ipynb)\)", text)
    assert all((ROOT / "nbs" / link).exists() for link in links)
    linked = [link for link in links if re.match(r"\d\d", Path(link).name)]
    assert sorted(linked) == sorted(str(path.relative_to(ROOT / "nbs")) for path in SOURCES)
    for part in {Path(link).parent for link in linked}:
        names = [Path(link).name for link in linked if Path(link).parent == part]
        assert names == sorted(names, key=lambda name: (re.match(r"\d+", name)[0], name.partition("_")[0]))
