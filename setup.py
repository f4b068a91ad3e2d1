"""Packaging: everything comes from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters="=", interpolation=None)
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
pythons = [f"3.{minor}" for minor in range(int(cfg["min_python"].split(".")[1]), int(cfg["max_python"].split(".")[1]) + 1)]
statuses = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")}

setup(
    name=cfg["pip_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    url=cfg["git_url"],
    project_urls={
        "Source": cfg["git_url"], "Issues": f"{cfg['git_url']}/issues", "Documentation": f"{cfg['git_url']}/blob/{cfg['branch']}/nbs/index.ipynb",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md", "Paper": "https://arxiv.org/abs/2502.07780"},
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Framework :: Jupyter",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in pythons),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[f"{cfg['lib_path']}*"]),
    package_data={cfg["lib_path"]: ["py.typed", "tiny/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")},
)
