"""What is installed is what settings.ini says, and importing it is harmless."""
import ast
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "evoprune_nb").rglob("*.py"))
PARTS = ["baselines", "judge", "machine", "paper", "ship", "ui"]


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
    assert dict(distribution.extras_require) == {extra: configured[f"{extra}_requirements"].split() for extra in ("dev", "docs", "eval")}
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


def test_wheel_builds_with_its_model(tmp_path):
    "`pip wheel .` works, and the wheel carries the modules and the tiny model."
    import zipfile

    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"evoprune_nb/search.py", "evoprune_nb/ui/cli.py", "evoprune_nb/ship/export.py", "evoprune_nb/tiny/model.safetensors", "evoprune_nb/tiny/tokenizer.json"} <= set(names)
