"""What is installed is what settings.ini says, and importing it is harmless."""
import ast
import os
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
import yaml

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "evoprune_nb").rglob("*.py"))
PARTS = ["baselines", "cluster", "judge", "machine", "paper", "ship", "ui"]


@pytest.fixture(scope="module")
def configured():
    config = ConfigParser(delimiters="=", interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


@pytest.fixture(scope="module")
def distribution():
    "What setup.py tells setuptools, without building anything."
    import setuptools  # noqa: F401  provides distutils where Python does not
    from distutils.core import run_setup

    return run_setup(str(ROOT / "setup.py"), stop_after="init")


def test_setup_follows_settings(configured, distribution):
    "Name, version, Python version, dependencies, extras and commands are those of settings.ini."
    assert (distribution.get_name(), distribution.get_version()) == (configured["pip_name"], configured["version"])
    assert str(distribution.python_requires) == f">={configured['min_python']}"
    assert list(distribution.install_requires) == configured["requirements"].split()
    assert {extra: [*map(Requirement, wanted)] for extra, wanted in distribution.extras_require.items()} == {
        extra: [*map(Requirement, configured[f"{extra}_requirements"].split())] for extra in ("dev", "docs", "eval", "cluster", "llama")}
    assert distribution.entry_points == {"console_scripts": configured["console_scripts"].split("\n")}


def test_package_carries_its_model(distribution):
    "The wheel holds the package, all its parts, and the files of the tiny model."
    assert sorted(distribution.packages) == ["evoprune_nb", *(f"evoprune_nb.{part}" for part in PARTS)]
    carried = {path.name for pattern in distribution.package_data["evoprune_nb"] for path in (ROOT / "evoprune_nb").glob(pattern)}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= carried


def test_version_is_that_of_the_package(configured):
    "`__version__` is the version in settings.ini."
    import evoprune_nb

    assert evoprune_nb.__version__ == configured["version"]


def imported(tree: ast.Module) -> set[str]:
    "Top-level names of all packages imported anywhere in a module, in functions too."
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name.partition(".")[0] for name in plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_need_no_development_tool_and_unpickle_nothing(path):
    "No exported module imports nbdev, fastcore or execnb, or reads pickles; nothing is a star import."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imported(tree) & {"nbdev", "fastcore", "execnb", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"torch.load", "torch.hub.load", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle"}
    assert not any(alias.name == "*" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names)


def test_ruff_finds_no_fault():
    "The rules in pyproject.toml: unknown and unused names, pickles, shells, closures over loop variables …"
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "evoprune_nb", "tests", "setup.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_touch_no_network_and_no_file(tmp_path):
    "Importing every module opens no connection, resolves no name, prints nothing, and creates no cache."
    script = """
import importlib, pkgutil, socket
def refuse(*args, **kwargs): raise SystemExit(f"network: {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
import evoprune_nb
for module in pkgutil.walk_packages(evoprune_nb.__path__, "evoprune_nb."): importlib.import_module(module.name)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")} | {"EVOPRUNE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel of this checkout."
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(directory.glob("*.whl"))


def test_wheel_carries_its_model_and_its_types(wheel):
    "`pip wheel .` works, and the wheel carries the modules, the tiny model, and the mark that it is typed."
    names = zipfile.ZipFile(wheel).namelist()
    assert {"evoprune_nb/search.py", "evoprune_nb/ui/cli.py", "evoprune_nb/ship/export.py", "evoprune_nb/tiny/model.safetensors", "evoprune_nb/tiny/tokenizer.json",
            "evoprune_nb/py.typed", "evoprune_nb/__main__.py"} <= set(names)


def test_wheel_would_be_taken(wheel):
    "`twine check` finds no fault: the description renders, the metadata is whole."
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_works_in_an_empty_environment(wheel, tmp_path, configured):
    "Installed into an environment of its own, away from the checkout, command, module and model are there. Dependencies are those of this one."
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    run = lambda *command: subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = next((tmp_path / "venv").glob("*/python"))
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    site = next((tmp_path / "venv").rglob("site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert run(str(python.with_name("evoprune")), "--version") == run(str(python), "-m", "evoprune_nb", "--version") == f"evoprune_nb {configured['version']}\n"
    script = "import evoprune_nb; from evoprune_nb.models import load_model; load_model('tiny'); print(evoprune_nb.__file__)"
    assert Path(run(str(python), "-c", script).strip()).is_relative_to(site)


def test_metadata_says_who_it_is_for(configured, distribution):
    "Classifiers name status, audience, and each Python from the least to the newest; links lead to source, issues, changelog and paper."
    classifiers = distribution.metadata.get_classifiers()
    assert [line.rpartition(" ")[2] for line in classifiers if line.startswith("Programming Language :: Python :: 3.")] == ["3.10", "3.11", "3.12", "3.13"]
    assert {f"Intended Audience :: {configured['audience']}", "Development Status :: 3 - Alpha", "Typing :: Typed"} <= set(classifiers)
    assert {"Source", "Issues", "Documentation", "Changelog", "Paper"} == set(distribution.metadata.project_urls)
    from trove_classifiers import classifiers as known

    assert set(classifiers) <= known


def test_citation_is_of_this_version(configured):
    "CITATION.cff is whole, and names this version and the paper."
    row = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert row["version"] == configured["version"] and row["repository-code"] == configured["git_url"]
    assert {"cff-version", "message", "title", "authors"} <= row.keys() and "2502.07780" in row["references"][0]["url"]


def test_library_is_silent_unless_asked(tmp_path):
    "What the package logs goes nowhere by default, and to a handler of one logger when there is one."
    script = """
import logging, sys
from evoprune_nb.machine.files import written_whole
for place in ("quiet", "loud"):
    with written_whole(sys.argv[1] + place): pass
    logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
    logging.getLogger("evoprune_nb").setLevel(logging.INFO)
"""
    done = subprocess.run([sys.executable, "-c", script, f"{tmp_path}/"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout == f"evoprune_nb.machine.files wrote {tmp_path / 'loud'}\n"


def test_every_logger_is_below_the_packages():
    "Modules log by their own names."
    for path in MODULES:
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assign) and "getLogger" in ast.unparse(node)]
        assert set(calls) <= {"log = logging.getLogger(__name__)"} or path.name in ("cli.py", "evaluation.py", "modeling.py"), path


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command(shell, capsys):
    "The script that `--print-completion` prints names all commands."
    from evoprune_nb.ui.cli import COMMANDS, main

    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", shell])
    assert stopped.value.code in (0, None)
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
